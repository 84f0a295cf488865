"""Every preset generates as float models do: with a state as without, a row in a batch as alone, beams with true scores."""

import pytest
import torch

import quamba
from quamba.generation import last_logits, left_pad
from tests.quamba.generating import agree, free_running, run
from tests.quamba.models import random_model

VOCAB, NEW = 48, 10
PRESETS = {
    "mamba1": ("float", "w8a8", "w4a8", "w4a16", "quamba1-w8a8"),
    "mamba2": ("float", "w8a8", "w4a8", "w4a16", "quamba2-w8a8", "quamba2-w4a8", "quamba2-w4a16"),
}
CASES = [(family, preset) for family, presets in PRESETS.items() for preset in presets]


def ids_of(rows, length, seed=1):
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models():
    return {}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def model(request, models):
    family, preset = request.param
    if request.param not in models:
        head = {"head_dim": 8} if family == "mamba2" else {}
        found = random_model(family, hidden=32, inner=64, vocab=VOCAB, tied=False, **head)
        with torch.no_grad():  # text that wanders
            found.backbone.embedding.weight.mul_(0.1)
            found.lm_head.weight.normal_()
        if preset != "float":
            found = quamba.quantize(found, preset, calibration=ids_of(4, 32))
        found.generation_config = free_running()
        models[request.param] = found
    return models[request.param]


@pytest.fixture
def most(model):
    """Largest difference of two scores, in logits whose spread is given by `spread`: float sums; a code moved by one step here
    and there; and an int8 state, which is rounded after every call, so that the cuts count by design (unrelated logits differ
    by three spreads and more)."""
    spread = float(model(ids_of(1, 32)).logits.std())
    if model.config.plan.is_float:
        return 1e-5 * spread
    return (0.05 if all(block.scales.specs["state"].is_float for block in model.backbone.layers) else 1.0) * spread


def written(model, ids, **options):
    out = run(model, ids, max_new_tokens=NEW, do_sample=False, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.scores)


def test_recurrent_agrees_with_parallel(model, most):
    ids, mask = left_pad([ids_of(1, n, seed=n)[0] for n in (4, 12, 7)])
    a, b = (written(model, ids, attention_mask=mask, mode=mode) for mode in ("recurrent", "parallel"))
    agree(a, b, most)


def test_rows_agree_with_the_row_alone(model, most):
    rows = [ids_of(1, n, seed=n)[0] for n in (4, 12, 7)]
    ids, mask = left_pad(rows)
    tokens, scores = written(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        agree((tokens[i : i + 1], scores[:, i : i + 1]), written(model, row[None]), most)


def test_beams_report_true_scores(model, most):
    """Those of their texts, scored anew; and the best text is as good as the best that is found without a state."""
    ids, beams = ids_of(2, 9), 4
    options = {"num_beams": beams, "num_return_sequences": beams, "length_penalty": 0.0, "max_new_tokens": NEW}
    found = run(model, ids, do_sample=False, **options)
    log = model(found.sequences).logits.float().log_softmax(-1)[:, ids.shape[1] - 1 : -1]
    anew = log.gather(-1, found.sequences[:, ids.shape[1] :, None]).sum((1, 2))
    bound = NEW * most + 1e-4
    torch.testing.assert_close(found.sequences_scores, anew, rtol=0, atol=bound)
    parallel = run(model, ids, do_sample=False, mode="parallel", **options)
    best = slice(None, None, beams)
    torch.testing.assert_close(found.sequences_scores[best], parallel.sequences_scores[best], rtol=0, atol=2 * bound)


def test_last_logits_by_state_and_by_text(model, most):
    ids, state = ids_of(2, 16), model.new_state()
    by_state = [last_logits(model, piece, state) for piece in ids.split([5, 4, 1, 1, 5], dim=1)]
    by_text = [last_logits(model, ids[:, :end]) for end in (5, 9, 10, 11, 16)]
    torch.testing.assert_close(torch.stack(by_state), torch.stack(by_text), rtol=0, atol=most)
    if model.config.plan.is_float:
        torch.testing.assert_close(by_text[-1], model(ids).logits[:, -1], rtol=1e-5, atol=1e-5)
