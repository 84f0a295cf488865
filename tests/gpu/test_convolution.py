"""The causal convolution, in one call and handed from call to call."""

import pytest
import torch

from quamba_kernels import triton
from tests.gpu import truth
from tests.gpu.cases import DEVICE, FLOATS, close, large, rounded, same_bits, stable

pytestmark = pytest.mark.gpu

# batch, tokens, channels, taps
SIZES = [(2, 1, 70, 4), (1, 2, 64, 4), (2, 67, 131, 4), (1, 5, 3, 1), (1, 40, 17, 9), (3, 3, 5, 2)]
REAL = large((1, 1, 5120, 4), (256, 1, 10240, 4), (1, 2048, 5120, 4), (1, 2048, 10240, 4), (7, 333, 3072, 4))


def case(rng, batch, length, channels, taps, dtype):
    """x, weight, state and the scales of codes."""
    if dtype == torch.int8:
        x, weight, state = (
            rng.codes(batch, length, channels),
            rng.codes(channels, taps),
            rng.codes(batch, channels, taps - 1),
        )
        return x, weight, state, {"x_scale": rng.uniform(channels) / 50, "weight_scale": rng.uniform(channels) / 100}
    shapes = ((batch, length, channels), (channels, taps), (batch, channels, taps - 1))
    return *(rng.normal(*shape, dtype=dtype) for shape in shapes), {}


@pytest.mark.parametrize("dtype", [torch.int8, *FLOATS])
@pytest.mark.parametrize(("batch", "length", "channels", "taps"), SIZES + REAL)
def test_conv(rng, batch, length, channels, taps, dtype):
    x, weight, start, scales = case(rng, batch, length, channels, taps, dtype)
    bias, inv, x_scale = rng.normal(channels), rng.uniform(channels) * 40, scales.get("x_scale")
    w = truth.real(weight, None) if x_scale is None else truth.real(weight.T, scales["weight_scale"]).T
    for given, mask in ((bias, None), (None, rng.mask(batch, length)), (bias, rng.mask(batch, length))):
        past = truth.real(start.transpose(1, 2), x_scale).transpose(1, 2)
        b = None if given is None else given.double()
        want, _ = truth.conv(truth.real(x, x_scale), w, b, past, mask)
        _, end = truth.conv(x.double(), w, None, start.double(), mask)  # codes, as they are

        def run(inv=None, given=given, mask=mask):
            state = start.clone()
            return triton.causal_conv1d(x, weight, given, state=state, mask=mask, inv=inv, **scales), state

        y, state = stable(run)
        close(y, want, 1e-6)
        assert torch.equal(state.double(), end)
        y, state = stable(lambda run=run: run(inv))
        rounded(y, want * inv.double(), 1e-6)
        assert torch.equal(state.double(), end)
    want, _ = truth.conv(truth.real(x, x_scale), w, None, None, None)
    close(triton.causal_conv1d(x, weight, **scales), want, 1e-6)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
@pytest.mark.parametrize("split", [1, 2, 3, 31, 32, 33, 69])
def test_hand_off_is_exact(rng, dtype, split):
    x, weight, start, scales = case(rng, 2, 70, 300, 4, dtype)
    whole, parts = start.clone(), start.clone()
    want = triton.causal_conv1d(x, weight, state=whole, **scales)
    got = [triton.causal_conv1d(p, weight, state=parts, **scales) for p in (x[:, :split], x[:, split:])]
    assert same_bits(torch.cat(got, 1), want) and same_bits(parts, whole)


def test_views_and_no_tokens(rng):
    x, weight, state, scales = case(rng, 2, 9, 40, 4, torch.int8)
    scales["x_scale"] = torch.tensor(0.02, device=DEVICE)
    wide, turned = (
        torch.cat([rng.codes(2, 9, 24), x], -1)[:, :, 24:],
        state.transpose(1, 2).contiguous().transpose(1, 2),
    )
    got = triton.causal_conv1d(wide, weight, state=turned, **scales)
    assert same_bits(got, triton.causal_conv1d(x, weight, state=state, **scales))
    assert torch.equal(turned, state)
    assert triton.causal_conv1d(x[:, :0], weight, state=turned, **scales).shape == (2, 0, 40)
    assert torch.equal(turned, state)
