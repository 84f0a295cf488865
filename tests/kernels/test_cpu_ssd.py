"""Mamba2's scan in C++ against the reference, on every variant that this machine runs."""

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels import cpu
from tests.kernels.agreement import on_threads

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no compiled library: {cpu.why_not()}")
VARIANTS = cpu.variants()
# batch, length, heads, width, groups, states
SHAPES = [(2, 7, 4, 16, 2, 8), (1, 1, 3, 5, 1, 1), (2, 20, 6, 33, 3, 20), (1, 5, 8, 64, 8, 128), (3, 2, 1, 1, 1, 3)]


def arguments(shape, integer, seed=0, D_per_channel=False):
    batch, length, heads, width, groups, states = shape
    random = torch.Generator().manual_seed(seed)

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
            codes = torch.randint(-128, 128, values[name].shape, generator=random)
            values[name] = codes.to(torch.int8)
            scale = torch.rand(size, generator=random) / 64
            values[f"{name}_scale"] = scale if name != "C" else scale[0].clone()
    return values


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()) + 1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference(variant, shape, integer):
    batch, length, heads, width, _, states = shape
    values = arguments(shape, integer, D_per_channel=width == 33)
    start = torch.randn(batch, heads, width, states, generator=torch.Generator().manual_seed(9))
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[0, : length // 2] = False
    for options in ({}, {"mask": mask}, {"dt_limit": (0.05, 0.4)}, {"mask": mask, "dt_limit": (0.1, 0.2)}):
        ours, theirs = start.clone(), start.clone()
        with cpu.force_variant(variant):
            got = cpu.ssd_scan(**values, state=ours, **options)
        close(got, kernels.reference.ssd_scan(**values, state=theirs, **options))
        close(ours, theirs)
    with cpu.force_variant(variant):
        close(cpu.ssd_scan(**values), kernels.reference.ssd_scan(**values))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_gives_the_same_bits(variant):
    shape = (2, 40, 4, 20, 2, 12)
    values = arguments(shape, integer=True)
    per_token = ("x", "dt", "B", "C")
    with cpu.force_variant(variant):
        whole_state = torch.zeros(2, 4, 20, 12)
        whole = cpu.ssd_scan(**values, state=whole_state)
        for cut in (1, 2, 3, 15, 16, 17, 33, 39):
            state, pieces = torch.zeros(2, 4, 20, 12), []
            for run in (slice(0, cut), slice(cut, 40)):
                piece = {name: t[:, run] if name in per_token else t for name, t in values.items()}
                pieces.append(cpu.ssd_scan(**piece, state=state))
            assert torch.equal(torch.cat(pieces, 1), whole) and torch.equal(state, whole_state)


def test_variants_threads_strides_and_halves_agree():
    values = arguments((2, 6, 4, 24, 2, 16), integer=True)
    found = []
    for variant in VARIANTS:
        with cpu.force_variant(variant):
            found.append(cpu.ssd_scan(**values))
    assert all(torch.equal(other, found[0]) for other in found)
    long = arguments((1, 40, 6, 40, 2, 24), integer=True)
    on_threads(lambda: cpu.ssd_scan(**long))
    wide = torch.zeros(2, 6, 200, dtype=torch.int8)
    wide[..., 7:103] = values["x"].flatten(2)
    assert torch.equal(cpu.ssd_scan(**values | {"x": wide[..., 7:103].unflatten(-1, (4, 24))}), found[0])
    floats = arguments((2, 6, 4, 24, 2, 16), integer=False)
    half = {name: t.half() for name, t in floats.items() if name in ("x", "dt", "B", "C")}
    with_floats = {name: t.float() for name, t in half.items()}
    assert torch.equal(cpu.ssd_scan(**floats | half), cpu.ssd_scan(**floats | with_floats))


def test_a_state_elsewhere_in_memory_and_empty_inputs():
    values = arguments((2, 3, 4, 8, 2, 6), integer=False)
    transposed = torch.zeros(2, 4, 6, 8).transpose(2, 3)
    dense = torch.zeros(2, 4, 8, 6)
    close(cpu.ssd_scan(**values, state=transposed), cpu.ssd_scan(**values, state=dense))
    assert torch.equal(transposed, dense)
    empty = {n: t[:, :0] if n in ("x", "dt", "B", "C") else t for n, t in values.items()}
    assert cpu.ssd_scan(**empty, state=dense).shape == (2, 0, 4, 8)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"B": torch.zeros(1, 2, 3, 4)}, "4 heads|groups can't share"),
        ({"dt": torch.zeros(1, 2, 3)}, "dt: expected shape"),
        ({"D": torch.zeros(5)}, "D: expected shape"),
        ({"state": torch.zeros(1, 4, 8, 5)}, "state: expected shape"),
        ({"x_scale": torch.ones(())}, "x_scale: belongs to int8 codes"),
        ({"mask": torch.ones(1, 2)}, "mask: expected bool"),
    ],
)
def test_wrong_arguments_are_named(change, why):
    values = arguments((1, 2, 4, 8, 2, 4), integer=False)
    if "B" in change:
        change = change | {"C": change["B"]}
    with pytest.raises((ValueError, TypeError), match=why):
        cpu.ssd_scan(**values | change)
