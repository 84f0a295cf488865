"""Mamba1's and Mamba2's scans with float32 states."""

import pytest
import torch

from quamba_kernels import triton
from tests.gpu import scans
from tests.gpu.cases import FLOATS, LARGE, close, large, same_bits, stable

pytestmark = pytest.mark.gpu

# batch, tokens, channels, states
MAMBA1 = [(2, 33, 50, 16), (1, 1, 300, 16), (3, 2, 16, 1), (1, 9, 5, 3), (1, 5, 9, 256)]
MAMBA1_REAL = large((1, 1, 5120, 16), (64, 1, 5120, 16), (1, 2048, 5120, 16), (3, 700, 1536, 16), (1, 8192, 1536, 16))
# batch, tokens, heads, channels, groups, states: single tokens, one chunk, several, more channels than a program takes
MAMBA2 = [(2, 7, 4, 16, 2, 8), (1, 1, 3, 5, 1, 1), (2, 20, 6, 33, 3, 20), (1, 70, 2, 80, 1, 128), (1, 33, 2, 8, 2, 256)]
MAMBA2_REAL = large(
    (1, 1, 128, 64, 8, 128), (64, 1, 80, 64, 1, 128), (1, 2048, 128, 64, 8, 128), (3, 700, 24, 64, 1, 128)
)


def check(op, inputs, start, **options):
    """With a state, and without one from zero."""
    y, end = stable(lambda: scans.run(op, inputs, start, **options))
    want, wanted_end = scans.exact(op, inputs, start, **options)
    close(y, want)
    close(end, wanted_end)
    (alone,) = stable(lambda: scans.run(op, inputs, None, **options))
    close(alone, scans.exact(op, inputs, None, **options)[0])


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("batch", "length", "inner", "states"), MAMBA1 + MAMBA1_REAL)
def test_mamba1(rng, batch, length, inner, states, codes):
    inputs = scans.selective_scan(rng, batch, length, inner, states, codes=codes)
    start = rng.normal(batch, inner, states)
    check("selective_scan", inputs, start)
    check("selective_scan", inputs, start, mask=rng.mask(batch, length))


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("batch", "length", "heads", "width", "groups", "states"), MAMBA2 + MAMBA2_REAL)
def test_mamba2(rng, batch, length, heads, width, groups, states, codes):
    shape = (batch, length, heads, width, groups, states)
    inputs = scans.ssd_scan(rng, *shape, codes=codes, D_per_channel=width == 33)
    start = rng.normal(batch, heads, width, states)
    check("ssd_scan", inputs, start)
    check("ssd_scan", inputs, start, mask=rng.mask(batch, length), dt_limit=(0.05, 0.4))


@pytest.mark.parametrize("dtype", FLOATS[1:])
@pytest.mark.parametrize("length", [1, 40, pytest.param(1000, marks=LARGE)])
def test_half_precision_inputs(rng, length, dtype):
    check("selective_scan", scans.selective_scan(rng, 2, length, 96, 16, dtype), rng.normal(2, 96, 16))
    check("ssd_scan", scans.ssd_scan(rng, 2, length, 6, 24, 2, 48, dtype), rng.normal(2, 6, 24, 48))


@pytest.mark.parametrize("cut", [1, 8, 9, 32, 39, *[pytest.param(n, marks=LARGE) for n in (63, 64, 65, 500, 999)]])
def test_hand_off(rng, cut):
    length = 40 if cut < 40 else 1000
    cases = {
        "selective_scan": (scans.selective_scan(rng, 2, length, 70, 16, codes=True), rng.normal(2, 70, 16)),
        "ssd_scan": (scans.ssd_scan(rng, 2, length, 4, 20, 2, 12, codes=True), rng.normal(2, 4, 20, 12)),
    }
    for op, (inputs, start) in cases.items():
        want, end = scans.exact(op, inputs, start)
        state, first, rest = start.clone(), *scans.pieces(op, inputs, cut)
        got = torch.cat([getattr(triton, op)(**part, state=state) for part in (first, rest)], 1)
        close(got, want)
        close(state, end)


def test_a_state_of_other_strides(rng):
    inputs, turned = scans.selective_scan(rng, 2, 7, 24, 16), rng.normal(2, 16, 24).transpose(1, 2)
    dense = turned.contiguous()
    assert same_bits(triton.selective_scan(**inputs, state=turned), triton.selective_scan(**inputs, state=dense))
    assert torch.equal(turned, dense)
    inputs, turned = scans.ssd_scan(rng, 2, 12, 4, 24, 2, 16), rng.normal(2, 4, 16, 24).transpose(2, 3)
    dense = turned.contiguous()
    assert same_bits(triton.ssd_scan(**inputs, state=turned), triton.ssd_scan(**inputs, state=dense))
    assert torch.equal(turned, dense)


def test_large_and_small_decays(rng):
    """Tokens that erase the state among tokens that keep it; softplus and the gate far out."""
    inputs = scans.ssd_scan(rng, 1, 70, 2, 16, 1, 16)
    inputs["dt"][:, 5], inputs["dt"][:, 20] = 5000.0, 300.0
    check("ssd_scan", inputs, rng.normal(1, 2, 16, 16))
    inputs = scans.selective_scan(rng, 1, 70, 32, 4)
    inputs["dt"] = torch.linspace(-100, 60, 32, device=inputs["dt"].device).expand(1, 70, 32).contiguous()
    inputs["z"] = torch.linspace(-120, 120, 32, device=inputs["dt"].device).expand(1, 70, 32).contiguous()
    check("selective_scan", inputs, rng.normal(1, 32, 4))
