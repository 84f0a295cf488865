"""Models through `generate` on the device: the captured step writes the tokens that eager calls write."""

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import torch

from tests.gpu.cases import COMPILED, DEVICE


def _why_not() -> str:
    """Why transformers can't be used here; empty if it can."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    least = next(d.split(">=")[1] for d in project["dependencies"] if d.startswith("transformers>="))
    if importlib.util.find_spec("transformers") is None:
        return f"needs transformers {least} or newer, there is none"
    have = importlib.metadata.version("transformers")
    old = [int(n) for n in re.findall(r"\d+", have)[:2]] < [int(n) for n in re.findall(r"\d+", least)[:2]]
    return f"needs transformers {least} or newer, has {have}" if old else ""


if _reason := _why_not():
    pytest.skip(_reason, allow_module_level=True)

import quamba  # noqa: E402
from quamba import QuambaLMHeadModel  # noqa: E402

pytestmark = [pytest.mark.gpu, COMPILED]

MODELS = ["mamba1-nano", "mamba2-nano"]
OPTIONS = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def poisoned():
    """Whole models run as they are."""


def random_ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, 4096, (batch, length))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """`quantized(model, preset)`: the folder of the artifact."""
    folder = tmp_path_factory.mktemp("quantized")

    def make(name, preset):
        out = folder / f"{name}-{preset}"
        if not out.is_dir():
            quamba.quantize(name, preset, calibration=random_ids(2, 64), out=out, device="cpu")
        return out

    return make


def recordings(model) -> list:
    return [step for step in model._decoder._known.values() if step is not None and not isinstance(step, str)]


def check(model, batch):
    ids = random_ids(batch, 9).to(DEVICE)
    decoder = model._decoder
    captured = [model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS) for _ in range(2)]
    assert recordings(model), "nothing was captured"
    try:
        model._decoder = lambda model, ids, state, run: run(ids)
        eager = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)
    finally:
        model._decoder = decoder
    assert eager.shape == (batch, 9 + 48)
    assert all(torch.equal(tokens, eager) for tokens in captured)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_floats(name, dtype, batch):
    check(QuambaLMHeadModel.from_pretrained(name, dtype=dtype, device=str(DEVICE)), batch)


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("name", MODELS)
def test_quantized(quantized, name, preset):
    check(QuambaLMHeadModel.from_pretrained(quantized(name, preset), device=str(DEVICE)), 3)


@pytest.mark.parametrize("name", MODELS)
def test_left_padded_rows(quantized, name):
    """A padded row writes what it writes alone."""
    model = QuambaLMHeadModel.from_pretrained(quantized(name, "w8a8"), device=str(DEVICE))
    long, short = random_ids(1, 12).to(DEVICE), random_ids(1, 5).to(DEVICE)
    ids = torch.cat([long, torch.cat([short.new_zeros(1, 7), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    both = model.generate(ids, attention_mask=mask, **OPTIONS | {"max_new_tokens": 12})
    assert both.shape == (2, 24)
    alone = model(short).logits[:, -1]
    padded = model(ids, attention_mask=mask).logits[1:, -1]
    assert float((alone - padded).abs().max()) <= 0.05 * float(alone.abs().max())  # a few codes fall the other way


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_main_memory(name):
    """In float32, where rounding is all that differs."""
    ids = random_ids(2, 100)
    want = QuambaLMHeadModel.from_pretrained(name, dtype=torch.float32)(ids).logits.double()
    model = QuambaLMHeadModel.from_pretrained(name, dtype=torch.float32, device=str(DEVICE))
    got = model(ids.to(DEVICE)).logits.cpu().double()
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
