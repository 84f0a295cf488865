"""Decoding with recorded tokens: as the eager ones, in few launches."""

import pytest
import torch

import quamba
import quamba_kernels as kernels
from quamba.decoding import _Step
from quamba.generation import left_pad
from tests.quamba.models import random_model

SMALL = {"hidden": 32, "inner": 64, "vocab": 48}
MOST_LAUNCHES = 4  # a layer
CASES = [("mamba1", "", 3), ("mamba1", "w8a8", 1), ("mamba1", "w4a8", 2)]
CASES += [("mamba2", "", 1), ("mamba2", "w8a8", 2), ("mamba2", "w4a8", 1)]


@pytest.fixture(autouse=True)
def poisoned():
    """Not here: writing poison is a step that would be recorded."""


def ids_of(rows, length, seed=1):
    return torch.randint(0, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


def model_of(family, preset, layers, folder):
    extra = {"head_dim": 8} if family == "mamba2" else {}
    model = random_model(family, **SMALL, **extra, layers=layers)
    if not preset:
        return model.half()
    return quamba.quantize(model, preset, calibration=ids_of(2, 16), out=folder / f"{layers}")


def decode(model, ids, eager):
    state, out = model.new_state(), []
    for t in range(ids.shape[1]):
        if eager:
            model._decoder._known.clear()
        out.append(model(ids[:, t : t + 1], past_key_values=state).logits)
    return torch.cat(out, dim=1), state


def recorded(model, ids):
    """Logits and state after the tokens, and what was launched for each but the first two."""
    with kernels.backend("triton"), torch.no_grad():
        got, state = decode(model, ids, eager=False)
    (step,) = [step for step in model._decoder._known.values() if isinstance(step, _Step)]
    names = [getattr(s, "kernel", getattr(s, "function", s)).__name__ for s in step.recording.launches]
    return got, state, names


@pytest.mark.parametrize(("family", "preset", "rows"), CASES)
def test_replayed_tokens_in_few_launches(tmp_path, family, preset, rows):
    ids, model = ids_of(rows, 3), model_of(family, preset, 1, tmp_path)
    got, state, names = recorded(model, ids)
    with kernels.backend("triton"), torch.no_grad():
        want, wanted = decode(model, ids, eager=True)
    largest = float(want.abs().max())
    assert torch.allclose(got, want, rtol=0, atol=1e-4 * largest), (got - want).abs().max() / largest
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    for a, b in zip(state.layers, wanted.layers, strict=True):
        assert torch.allclose(a.recurrent, b.recurrent, rtol=1e-3, atol=1e-3)
    _, _, more = recorded(model_of(family, preset, 2, tmp_path), ids[:, :2])
    assert 0 < len(more) - len(names) <= MOST_LAUNCHES, (names, more)


def test_generate_writes_what_it_writes_elsewhere(tmp_path):
    """Beams, of prompts padded on the left."""
    model = model_of("mamba2", "w8a8", 1, tmp_path)
    ids, mask = left_pad([[3, 1, 4, 1], [5, 9]])
    options = {"attention_mask": mask, "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with kernels.backend("reference"):
        want = model.generate(ids, **options)
    with kernels.backend("triton"):
        got = model.generate(ids, **options)
    assert torch.equal(got, want) and len(set(want[:, 4:].flatten().tolist())) > 1
