"""Mamba2's scan against the reference, whole and in stretches."""

import importlib

import pytest
import torch

from quamba_kernels import reference, triton
from quamba_kernels.triton.common import Launch
from tests.kernels.agreement import close, rounded, same_codes, stored

duality = importlib.import_module("quamba_kernels.triton.duality")

# batch, length, heads, width, groups, states: single tokens, one chunk, several, more channels than a program takes
SHAPES = [
    (2, 5, 4, 16, 2, 8),
    (1, 1, 3, 5, 1, 1),
    (1, 20, 6, 33, 3, 20),
    (1, 70, 1, 80, 1, 128),
    (3, 2, 1, 1, 1, 3),
    (1, 33, 2, 8, 2, 256),
]
# the same, and into how many stretches: of one tile of tokens, of two, of small tiles, of single tokens; the last is short
CUT = [
    ((1, 150, 2, 20, 2, 12), 3),
    ((1, 200, 1, 80, 1, 20), 2),
    ((1, 70, 2, 5, 1, 256), 3),
    ((1, 5, 2, 16, 1, 8), 3),
]
PER_TOKEN = ("x", "dt", "B", "C")


def arguments(shape, integer, D_per_channel=False):
    batch, length, heads, width, groups, states = shape
    random = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=random)

    values = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads) - 1,
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, width) if D_per_channel else normal(heads),
        "dt_bias": normal(heads),
    }
    if integer:
        for name, size in (("x", heads * width), ("B", groups * states), ("C", groups * states)):
            values[name] = torch.randint(-128, 128, values[name].shape, generator=random).to(torch.int8)
            scale = torch.rand(size, generator=random) / 64
            values[f"{name}_scale"] = scale if name != "C" else scale[0].clone()
    return values


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that ran."""
    names, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda step: names.append(step.kernel.fn.__name__) or call(step))
    return names


def cut_into(monkeypatch, count):
    monkeypatch.setattr(duality, "stretches", lambda length, programs, device: min(length, count))


@pytest.mark.parametrize(
    ("shape", "count", "integer"),
    [(shape, 1, True) for shape in SHAPES]
    + [(*case, True) for case in CUT]
    + [(SHAPES[2], 1, False), (*CUT[1], False)],
    ids=str,
)
def test_equals_the_reference(monkeypatch, launched, shape, count, integer):
    cut_into(monkeypatch, count)
    batch, length, heads, width, _, states = shape
    values = arguments(shape, integer, D_per_channel=width == 33)
    start = torch.randn(batch, heads, width, states, generator=torch.Generator().manual_seed(9))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    for options in ({"mask": mask}, {"dt_limit": (0.1, 0.2)}):
        ours, theirs = start.clone(), start.clone()
        got = triton.ssd_scan(**values, state=ours, **options)
        close(got, reference.ssd_scan(**values, state=theirs, **options))
        close(ours, theirs)
    close(triton.ssd_scan(**values), reference.ssd_scan(**values))
    many = ["_ssd"] if count == 1 else ["_ssd", "_carry", "_ssd"]
    plain = ["_ssd_step"] if length == 1 else many
    assert launched == many + plain + plain


@pytest.mark.parametrize(
    ("length", "cut", "count"),
    [(40, cut, 1) for cut in (1, 32)] + [(150, cut, 3) for cut in (9, 149)],
)
def test_hand_off(monkeypatch, length, cut, count):
    cut_into(monkeypatch, count)
    values = arguments((1, length, 2, 20, 1, 12), integer=True)
    whole, parts = torch.zeros(1, 2, 20, 12), torch.zeros(1, 2, 20, 12)
    want = triton.ssd_scan(**values, state=whole)
    pieces = [{n: t[:, s] if n in PER_TOKEN else t for n, t in values.items()} for s in (slice(cut), slice(cut, None))]
    close(torch.cat([triton.ssd_scan(**piece, state=parts) for piece in pieces], 1), want)
    close(parts, whole)


@pytest.mark.parametrize(("length", "count"), [(33, 1), (70, 2)])
def test_large_decays_leave_small_ones_exact(monkeypatch, length, count):
    """A token that erases the state, among tokens that keep it."""
    cut_into(monkeypatch, count)
    values = arguments((1, length, 2, 16, 1, 16), integer=False)
    values["dt"][:, 5] = 5000.0
    values["dt"][:, 20] = 300.0
    close(triton.ssd_scan(**values), reference.ssd_scan(**values))


def test_strides_halves_and_no_tokens():
    values = arguments((2, 12, 4, 24, 2, 16), integer=True)
    wide = torch.zeros(2, 12, 200, dtype=torch.int8)
    wide[..., 7:103] = values["x"].flatten(2)
    got = triton.ssd_scan(**values | {"x": wide[..., 7:103].unflatten(-1, (4, 24))})
    assert torch.equal(got, triton.ssd_scan(**values))
    floats = arguments((2, 12, 4, 24, 2, 16), integer=False)
    half = {name: t.bfloat16() for name, t in floats.items() if name in PER_TOKEN}
    turned, dense = torch.zeros(2, 4, 16, 24).transpose(2, 3), torch.zeros(2, 4, 24, 16)
    close(triton.ssd_scan(**floats | half, state=turned), reference.ssd_scan(**floats | half, state=dense))
    close(turned, dense)
    before = dense.clone()
    empty = {n: t[:, :0] if n in PER_TOKEN else t for n, t in floats.items()}
    assert triton.ssd_scan(**empty, state=dense).shape == (2, 0, 4, 24) and torch.equal(dense, before)


def test_more_states_than_the_kernel_takes():
    values = arguments((1, 3, 2, 4, 1, 257), integer=False)
    assert torch.equal(triton.ssd_scan(**values), reference.ssd_scan(**values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize(
    ("shape", "count"),
    [((2, 1, 4, 33, 2, 20), 1), ((1, 20, 2, 80, 1, 128), 1), ((1, 150, 2, 20, 2, 12), 3)],
    ids=["token", "tile", "stretches"],
)
def test_states_in_low_precision(monkeypatch, launched, shape, count, dtype):
    cut_into(monkeypatch, count)
    batch, _, heads, width, _, states = shape
    values = arguments(shape, integer=True)
    h = torch.randn(batch, heads, width, states, generator=torch.Generator().manual_seed(9))
    h[0, 0, 1] = 0
    ours, h = stored(h, dtype)
    theirs = {name: t.clone() for name, t in ours.items()}
    got = triton.ssd_scan(**values, **ours)
    assert len(launched) == (1 if count == 1 else 3)
    close(got, reference.ssd_scan(**values, **theirs))
    reference.ssd_scan(**values, state=h)
    rounded(h, **ours)
    if dtype == torch.int8:
        same_codes(ours["state"], theirs["state"])


def test_a_state_in_other_strides_and_what_has_no_range():
    values = arguments((1, 3, 4, 6, 2, 8), integer=False)
    ours = {
        "state": torch.zeros(1, 4, 8, 6, dtype=torch.int8).transpose(2, 3),
        "state_scale": torch.zeros(1, 6, 4).transpose(1, 2),
    }
    theirs = {name: t.contiguous() for name, t in ours.items()}
    close(triton.ssd_scan(**values, **ours), reference.ssd_scan(**values, **theirs))
    assert ours["state_scale"].min() > 0
    close(ours["state_scale"], theirs["state_scale"])
    same_codes(ours["state"], theirs["state"])
    values["x"].zero_()
    values["dt"] += 1e6  # forgets everything
    triton.ssd_scan(**values, **ours)
    assert all((t == 0).all() for t in ours.values())
    half = torch.full((1, 4, 6, 8), 65504.0).half()
    values |= {"A": torch.full((4,), -0.01), "B": torch.ones(1, 3, 2, 8), "x": torch.full((1, 3, 4, 6), 1e5)}
    values["dt"].zero_()
    triton.ssd_scan(**values, state=half)
    assert (half == 65504).all()


def test_into_how_many_stretches(monkeypatch):
    monkeypatch.setattr(duality, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert duality.stretches(8192, 80, device) == 3  # two programs for every processor
    assert duality.stretches(256, 24, device) == 2  # of at least 128 tokens
    assert duality.stretches(1, 24, device) == duality.stretches(8192, 200, device) == 1
