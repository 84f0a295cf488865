import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quamba.errors import DataError, QuambaError
from quamba.evaluation import compare, score_text

V = 13


class Table(nn.Module):
    """Next-token logits by a table."""

    def __init__(self, table):
        super().__init__()
        self.table = table
        self.config = SimpleNamespace(vocab_size=table.shape[1])
        self.device = torch.device("cpu")

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.table[input_ids])


def pair(noise=0.8):
    random = torch.Generator().manual_seed(3)
    table = 2 * torch.randn(V, V, generator=random)
    return Table(table + noise * torch.randn(V, V, generator=random)), Table(table)


IDS = torch.randint(0, V, (101,), generator=torch.Generator().manual_seed(1))


def distribution(scores):
    total = sum(map(math.exp, scores))
    return [math.exp(s) / total for s in scores]


def naive(model, reference, ids, context):
    """(KL, whether the best tokens agree) of every scored token, by loops."""
    kls, same = [], []
    for start in range(0, len(ids), context):
        for token in ids[start : start + context][:-1].tolist():
            q, p = (distribution(m.table[token].tolist()) for m in (model, reference))
            kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
    return kls, same


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_equals_loops_over_tokens_and_vocabulary(batch_size):
    model, reference = pair()
    kls, same = naive(model, reference, IDS, 16)
    found = compare(model, reference, IDS, context=16, batch_size=batch_size)
    assert found.tokens == len(kls) == 101 - 7
    assert found.mean_kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert found.top1_agreement == sum(same) / len(same) and 0 < found.top1_agreement < 1
    rank = 0.999 * (len(kls) - 1)
    low, high = sorted(kls)[int(rank)], sorted(kls)[int(rank) + 1]
    assert found.p999_kl == pytest.approx(low + (rank - int(rank)) * (high - low), rel=1e-4)
    mean = sum(kls) / len(kls)
    error = math.sqrt(sum((k - mean) ** 2 for k in kls) / (len(kls) - 1) / len(kls))
    assert found.mean_kl_stderr == pytest.approx(error, rel=1e-3)


def test_perplexities_are_those_of_score_text():
    model, reference = pair()
    found = compare(model, reference, IDS, context=16)
    assert found.score.perplexity == pytest.approx(score_text(model, IDS, context=16).perplexity, rel=1e-9)
    assert found.reference_score.perplexity == pytest.approx(
        score_text(reference, IDS, context=16).perplexity, rel=1e-9
    )


def test_a_model_does_not_differ_from_itself():
    model, _ = pair()
    found = compare(model, model, IDS, context=16)
    assert (found.mean_kl, found.p999_kl, found.top1_agreement) == (0, 0, 1)


def test_direction_is_reference_to_model():
    model, reference = pair(noise=1.5)
    there, back = compare(model, reference, IDS).mean_kl, compare(reference, model, IDS).mean_kl
    kls, _ = naive(model, reference, IDS, 1024)
    assert there == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert abs(there - back) > 0.01


def test_is_json():
    assert json.loads(json.dumps(dataclasses.asdict(compare(*pair(), IDS)), allow_nan=False))["tokens"] == 100


def test_different_vocabularies_and_nan_are_refused():
    model, reference = pair()
    with pytest.raises(DataError, match="different vocabularies"):
        compare(model, Table(torch.zeros(V, V + 1)), IDS)
    model.table[5] = math.nan
    with pytest.raises(QuambaError, match="NaN"):
        compare(model, reference, IDS)
