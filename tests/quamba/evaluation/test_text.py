import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quamba.errors import DataError, QuambaError
from quamba.evaluation import encode_text, score_text
from quamba.evaluation.text import batches, scored_tokens


class Stub(nn.Module):
    """Each position's logits depend on its token and on the window's first, so a wrong window shows."""

    def __init__(self, vocab=11, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(vocab, vocab, generator=random), requires_grad=False)
        self.config = SimpleNamespace(vocab_size=vocab)
        self.device = torch.device("cpu")
        self.seen = []

    def forward(self, input_ids):
        self.seen.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.table[input_ids] + 0.5 * self.table[input_ids[:, :1]])


def naive(model, ids, context):
    """Negative log-likelihood of every scored token, by loops."""
    found = []
    for start in range(0, len(ids), context):
        window = ids[start : start + context].tolist()
        for previous, token in itertools.pairwise(window):
            scores = [float(a + 0.5 * b) for a, b in zip(model.table[previous], model.table[window[0]], strict=True)]
            found.append(math.log(sum(map(math.exp, scores))) - scores[token])
    return found


def some_ids(n, vocab=11):
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("length", [2, 7, 8, 9, 10, 16, 17, 29])
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_score_equals_a_loop_over_tokens(length, batch_size):
    model, ids = Stub(), some_ids(length)
    expected = naive(model, ids, 8)
    score = score_text(model, ids, context=8, batch_size=batch_size)
    assert score.tokens == len(expected) == scored_tokens(length, 8)
    assert score.nll_sum == pytest.approx(sum(expected), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    if len(expected) > 1:
        mean = sum(expected) / len(expected)
        variance = sum((x - mean) ** 2 for x in expected) / (len(expected) - 1)
        assert score.stderr == pytest.approx(math.sqrt(variance / len(expected)), rel=1e-4)
        assert score.perplexity_stderr == pytest.approx(score.perplexity * score.stderr)
    else:
        assert score.stderr is None and score.perplexity_stderr is None


def test_nothing_is_padded_and_the_tail_stands_alone():
    model = Stub()
    score_text(model, some_ids(29), context=8, batch_size=2)
    assert model.seen == [(2, 8), (1, 8), (1, 5)]
    assert [tuple(b.shape) for b in batches(some_ids(17), 8, 4)] == [(2, 8)]  # a tail of one token is dropped


def test_large_vocabularies_are_worked_on_in_pieces(monkeypatch):
    model, ids = Stub(), some_ids(29)
    whole = score_text(model, ids, context=8)
    monkeypatch.setattr("quamba.evaluation.text._CHUNK", 3 * 11)
    assert score_text(model, ids, context=8).nll_sum == pytest.approx(whole.nll_sum, rel=1e-12)


def test_half_precision_logits_are_scored_in_float32():
    model, ids = Stub(), some_ids(29)
    model.table.data = model.table.data.half().float()
    exact = score_text(model, ids, context=8)
    forward = model.forward
    model.forward = lambda input_ids: SimpleNamespace(logits=forward(input_ids).logits.to(torch.float16))
    # Only the rounding of the logits themselves is left: 2^-11 of values below 5, either way.
    assert score_text(model, ids, context=8).nll_sum == pytest.approx(exact.nll_sum, abs=29 * 5 * 2**-11)


def test_progress_counts_scored_tokens():
    calls = []
    score_text(Stub(), some_ids(29), context=8, batch_size=2, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(14, 25), (21, 25), (25, 25)]


def test_nan_scores_and_foreign_ids_are_refused():
    model = Stub()
    with pytest.raises(DataError, match="id 11, but the model's vocabulary has 11"):
        score_text(model, torch.tensor([1, 11, 2]))
    model.table.data[3] = math.nan
    with pytest.raises(QuambaError, match="NaN"):
        score_text(model, torch.tensor([1, 3, 2, 4]))


def characters(text, **options):
    assert options["add_special_tokens"] is False
    return {"input_ids": [ord(c) for c in text]}


def test_a_text_is_a_file_or_the_name_of_a_sample(tmp_path):
    from quamba import bundled

    (tmp_path / "a.txt").write_text("abc")
    assert encode_text(characters, tmp_path / "a.txt").tolist() == [97, 98, 99]
    sample = bundled.sample("wikitext2_sample").read_text(encoding="utf-8")
    assert len(encode_text(characters, "wikitext")) == len(sample)


def test_unusable_texts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt.*wikitext or novels"):
        encode_text(characters, tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        encode_text(characters, tmp_path / "empty.txt")
    (tmp_path / "one.txt").write_text("a")
    with pytest.raises(DataError, match="two or more"):
        encode_text(characters, tmp_path / "one.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="UTF-8"):
        encode_text(characters, tmp_path / "binary.txt")
