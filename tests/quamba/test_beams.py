"""Beam search against an oracle that scores every possible text, and against what it wrote before."""

import itertools

import pytest
import torch

import quamba
from quamba import QuambaLMHeadModel
from quamba.state import QuambaState
from tests.quamba.formats.test_old_artifacts import FOLDER
from tests.quamba.generating import free_running, random_ids, run, tiny

V, STEPS = 5, 4
PROMPT = random_ids(V, 3)


@pytest.fixture(scope="module")
def models():
    found = {"mamba1": tiny(V, seed=4), "mamba2": tiny(V, seed=6, mixer="mamba2")}
    quantized = {
        f"{name} {preset}": quamba.quantize(model, preset, calibration=random_ids(V, 32, 16))
        for name, model in found.items()
        for preset in ("w8a8", "w4a8")
    }
    return found | quantized


@pytest.fixture(params=["mamba1", "mamba1 w8a8", "mamba1 w4a8", "mamba2", "mamba2 w8a8", "mamba2 w4a8"])
def model(request, models):
    found = models[request.param]
    found.generation_config = free_running()
    return found


@pytest.fixture
def near(model):
    """How far two ways to score a text may be apart: sums of four float log-probabilities, or of four with a code moved."""
    return 1e-4 if model.config.plan.is_float else 0.2


def step_scores(model):
    """Log-probabilities `[625, STEPS, V]` along all texts, and the texts `[625, STEPS]`."""
    texts = torch.tensor(list(itertools.product(range(V), repeat=STEPS)))
    logits = model(torch.cat([PROMPT.expand(len(texts), -1), texts], dim=1)).logits.float()
    return logits[:, PROMPT.shape[1] - 1 : -1].log_softmax(-1), texts


def until(eos, text):
    return tuple(text[: text.index(eos) + 1] if eos in text else text)


def ranked(scores):
    """`{text: score}`, best first."""
    return dict(sorted(scores.items(), key=lambda item: -item[1]))


def best_of(found, oracle, near, eos=None):
    """The search found the best texts in order, and their scores, where those are further apart than `near`."""
    texts = [until(eos, text) for text in found.sequences[:, PROMPT.shape[1] :].tolist()]
    scores = found.sequences_scores.tolist()
    expected = list(oracle.values())
    assert oracle[texts[0]] >= expected[0] - 2 * near
    if expected[0] - expected[1] > 2 * near:
        assert texts[0] == next(iter(oracle))
    assert len(set(texts)) == len(texts)
    for i, (text, score) in enumerate(zip(texts, scores, strict=True)):
        assert score == pytest.approx(oracle[text], abs=near)
        assert score == pytest.approx(expected[i], abs=2 * near)


@pytest.mark.parametrize("mode", ["recurrent", "parallel"])
def test_beams_find_the_global_best_when_they_are_all_kept(model, near, mode):
    log, texts = step_scores(model)
    totals = log.gather(-1, texts[..., None]).sum((1, 2)).tolist()
    oracle = ranked({tuple(text): total for text, total in zip(texts.tolist(), totals, strict=True)})
    options = {"num_beams": V**STEPS, "num_return_sequences": 20, "length_penalty": 0.0, "mode": mode}
    best_of(run(model, PROMPT, max_new_tokens=STEPS, do_sample=False, **options), oracle, near)


@pytest.mark.parametrize("allowed", [(0, 1, 2, 3, 4), (1, 3)], ids=["all", "constrained"])
def test_the_best_of_the_texts_that_may_be_written(model, near, allowed):
    """With a token that ends the text, after two others at the earliest, and with only some tokens allowed."""
    eos = 3
    log, texts = step_scores(model)
    oracle = {}
    for row, text in zip(log, texts.tolist(), strict=True):
        text = until(eos, text)
        if len(text) > 2 and set(text) <= set(allowed):
            oracle[text] = float(sum(row[t, token] for t, token in enumerate(text)))
    options = {"num_beams": V**STEPS, "num_return_sequences": min(8, len(oracle)), "length_penalty": 0.0}
    found = run(
        model,
        PROMPT,
        max_new_tokens=STEPS,
        min_new_tokens=2,
        do_sample=False,
        eos_token_id=eos,
        early_stopping="never",
        prefix_allowed_tokens_fn=lambda batch, ids: list(allowed),
        **options,
    )
    best_of(found, ranked(oracle), near, eos)


def test_beams_do_change_places(model, monkeypatch):
    """So the tests above are about states that follow their beams."""
    orders, reorder = [], QuambaState.reorder_cache

    def note(self, rows):
        orders.append(rows.tolist())
        reorder(self, rows)

    monkeypatch.setattr(QuambaState, "reorder_cache", note)
    model.generate(PROMPT, num_beams=4, max_new_tokens=STEPS, do_sample=False)
    assert any(order != sorted(order) or len(set(order)) < 4 for order in orders[1:])


STORED = {
    "mamba1-float-first": [23, 19, 8, 5, 17, 16, 7, 9, 2, 12],
    "mamba1-w8a8-first": [23, 19, 9, 0, 7, 8, 12, 22, 10, 16],
    "mamba2-w4a8": [12, 19, 22, 16, 7, 8, 5, 10, 9, 2],
}


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("mode", ["recurrent", "parallel"])
def test_stored_artifacts_write_what_they_wrote(name, mode):
    model = QuambaLMHeadModel.from_pretrained(FOLDER / name)
    model.generation_config = free_running()
    ids = random_ids(model.config.vocab_size, 6)
    out = model.generate(ids, num_beams=4, max_new_tokens=10, no_repeat_ngram_size=1, do_sample=False, mode=mode)
    assert out[0, 6:].tolist() == STORED[name]
