"""The causal convolution against the reference."""

import pytest
import torch

from quamba_kernels import reference, triton
from tests.kernels.agreement import close, codes, normal, same_codes

DTYPES = [torch.int8, torch.float32, torch.float16, torch.bfloat16]


def conv_case(rng, batch, length, channels, taps, dtype):
    if dtype == torch.int8:
        x, w = codes(rng, batch, length, channels), codes(rng, channels, taps)
        state = codes(rng, batch, channels, taps - 1)
        scales = {"x_scale": torch.tensor(0.02), "weight_scale": torch.rand(channels, generator=rng) / 100}
    else:
        x, w = normal(rng, batch, length, channels).to(dtype), normal(rng, channels, taps).to(dtype)
        state, scales = normal(rng, batch, channels, taps - 1).to(dtype), {}
    return x, w, normal(rng, channels), state, scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "channels", "taps"),
    [(2, 1, 70, 4), (1, 2, 64, 4), (1, 37, 70, 4), (1, 5, 3, 1), (1, 35, 17, 9), (3, 3, 5, 2)],
)
def test_conv(rng, dtype, batch, length, channels, taps):
    x, w, bias, state, scales = conv_case(rng, batch, length, channels, taps, dtype)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 2] = False
    for b, m in ((bias, None), (None, mask)):
        mine, theirs = state.clone(), state.clone()
        got = triton.causal_conv1d(x, w, b, state=mine, mask=m, **scales)
        want = reference.causal_conv1d(x, w, b, state=theirs, mask=m, **scales)
        close(got, want, max(1e-6, torch.finfo(want.dtype).eps))
        assert torch.equal(mine, theirs)
        inv = torch.rand(channels, generator=rng) * 40
        mine.copy_(state), theirs.copy_(state)
        same_codes(
            triton.causal_conv1d(x, w, b, state=mine, mask=m, inv=inv, **scales),
            reference.causal_conv1d(x, w, b, state=theirs, mask=m, inv=inv, **scales),
        )
        assert torch.equal(mine, theirs)
    got, want = (f.causal_conv1d(x, w, **scales) for f in (triton, reference))
    close(got, want, max(1e-6, torch.finfo(want.dtype).eps))


@pytest.mark.parametrize(("dtype", "split"), [(torch.int8, split) for split in (1, 3, 32, 69)] + [(torch.float32, 31)])
def test_hand_off_is_exact(rng, dtype, split):
    x, w, bias, state, scales = conv_case(rng, 1, 70, 19, 4, dtype)
    whole, parts = state.clone(), state.clone()
    want = triton.causal_conv1d(x, w, bias, state=whole, **scales)
    got = [triton.causal_conv1d(p, w, bias, state=parts, **scales) for p in (x[:, :split], x[:, split:])]
    assert torch.equal(torch.cat(got, 1), want) and torch.equal(parts, whole)


def test_views_and_no_tokens(rng):
    x, w, bias, state, scales = conv_case(rng, 2, 9, 40, 4, torch.int8)
    wide = torch.cat([x, x], -1)[:, :, :40]
    turned = state.transpose(1, 2).contiguous().transpose(1, 2)
    scales["x_scale"] = torch.rand(40, generator=rng) / 50
    got = triton.causal_conv1d(wide, w, bias, state=turned, **scales)
    want = reference.causal_conv1d(x, w, bias, state=state, **scales)
    close(got, want, 1e-6)
    assert torch.equal(turned, state)
    assert triton.causal_conv1d(x[:, :0], w, bias, state=turned, **scales).shape == (2, 0, 40)
    assert torch.equal(turned, state)
