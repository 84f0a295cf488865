"""Causal convolution against loops: int64 for integers, float64 for floats; the state is handed over exactly."""

import pytest
import torch

from quamba_kernels import reference


def naive(x, weight, state):
    """Sums before scales and SiLU, and the state after; any exact dtype. x [B, L, C], state [B, C, K-1]."""
    (batch, length, channels), taps = x.shape, weight.shape[1]
    acc = torch.zeros_like(x)
    line = torch.cat([state.transpose(1, 2), x], 1)  # [B, K-1+L, C]
    for b in range(batch):
        for t in range(length):
            for c in range(channels):
                acc[b, t, c] = sum(line[b, t + k, c] * weight[c, k] for k in range(taps))
    return acc, line[:, length:].transpose(1, 2)


def case(rng, batch, length, channels, taps):
    x = torch.randint(-128, 128, (batch, length, channels), generator=rng, dtype=torch.int8)
    w = torch.randint(-127, 128, (channels, taps), generator=rng, dtype=torch.int8)
    state = torch.randint(-128, 128, (batch, channels, taps - 1), generator=rng, dtype=torch.int8)
    weight_scale, bias = torch.rand(channels, generator=rng) / 100, torch.randn(channels, generator=rng)
    return x, w, state, torch.tensor(0.02), weight_scale, bias


@pytest.mark.parametrize(("length", "taps"), [(1, 4), (2, 4), (3, 4), (9, 4), (5, 2), (4, 1), (3, 7)])
def test_integers(rng, length, taps):
    x, w, state, xs, ws, bias = case(rng, 2, length, 5, taps)
    acc, last = naive(x.long(), w.long(), state.long())
    y = (acc.float() * ws) * xs + bias
    got = reference.causal_conv1d(x, w, bias, state=state, x_scale=xs, weight_scale=ws)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, y * torch.sigmoid(y), rtol=1e-6, atol=1e-6)
    assert state.dtype == torch.int8 and torch.equal(state.long(), last)


def test_extreme_integers():
    x, w = torch.full((1, 6, 3), -128, dtype=torch.int8), torch.full((3, 4), -128, dtype=torch.int8)
    one = torch.ones(3)
    got = reference.causal_conv1d(x, w, x_scale=one, weight_scale=one)
    assert got[0, :, 0].tolist() == [16384.0, 32768.0, 49152.0, 65536.0, 65536.0, 65536.0]


@pytest.mark.parametrize("split", range(1, 9))
def test_hand_off_is_exact(rng, split):
    x, w, state, xs, ws, bias = case(rng, 2, 9, 5, 4)
    scales = {"x_scale": xs, "weight_scale": ws, "inv": torch.tensor(30.0)}
    whole, parts = state.clone(), state.clone()
    want = reference.causal_conv1d(x, w, bias, state=whole, **scales)
    first = reference.causal_conv1d(x[:, :split], w, bias, state=parts, **scales)
    second = reference.causal_conv1d(x[:, split:], w, bias, state=parts, **scales)
    assert torch.equal(torch.cat([first, second], 1), want)
    assert torch.equal(parts, whole)


def test_token_by_token(rng):
    x, w, state, xs, ws, bias = case(rng, 1, 7, 6, 4)
    whole, steps = state.clone(), state.clone()
    want = reference.causal_conv1d(x, w, bias, state=whole, x_scale=xs, weight_scale=ws)
    scales = {"x_scale": xs, "weight_scale": ws}
    tokens = [reference.causal_conv1d(x[:, t : t + 1], w, bias, state=steps, **scales) for t in range(7)]
    # torch's SiLU differs in the last bit between its vectorised loop and what is left of it, so with the shape.
    torch.testing.assert_close(torch.cat(tokens, 1), want, rtol=2**-22, atol=0)
    assert torch.equal(steps, whole)


def test_no_state_is_a_zero_state(rng):
    x, w, state, xs, ws, bias = case(rng, 2, 5, 4, 4)
    zero = torch.zeros_like(state)
    want = reference.causal_conv1d(x, w, bias, state=zero, x_scale=xs, weight_scale=ws)
    assert torch.equal(reference.causal_conv1d(x, w, bias, x_scale=xs, weight_scale=ws), want)


@pytest.mark.parametrize("pad", [1, 3, 6])
def test_masked_prefix(rng, pad):
    """A left-padded row gives what the row alone gives, and 0 at the padding."""
    x, w, _, xs, ws, bias = case(rng, 2, 8, 5, 4)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[1, :pad] = False
    state, alone = torch.zeros(2, 5, 3, dtype=torch.int8), torch.zeros(1, 5, 3, dtype=torch.int8)
    got = reference.causal_conv1d(x, w, bias, state=state, mask=mask, x_scale=xs, weight_scale=ws)
    want = reference.causal_conv1d(x[1:, pad:], w, bias, state=alone, x_scale=xs, weight_scale=ws)
    assert torch.equal(got[1:, pad:], want) and torch.equal(state[1:], alone)
    assert (got[1, :pad] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_floats(rng, dtype):
    x, w = torch.randn(2, 6, 5, generator=rng).to(dtype), torch.randn(5, 4, generator=rng).to(dtype)
    bias, state = torch.randn(5, generator=rng), torch.randn(2, 5, 3, generator=rng).to(dtype)
    acc, last = naive(x.double(), w.double(), state.double())
    got = reference.causal_conv1d(x, w, bias, state=state)
    assert got.dtype == dtype
    y = acc + bias.double()
    eps = max(torch.finfo(dtype).eps, 4e-7)
    torch.testing.assert_close(got.double(), y * torch.sigmoid(y), rtol=eps, atol=5e-6)
    assert torch.equal(state.double(), last)


def test_vector_input_scale_and_codes(rng):
    x, w, state, _, ws, bias = case(rng, 1, 6, 5, 4)
    xs, inv = torch.rand(5, generator=rng) / 10, torch.rand(5, generator=rng) * 100
    y = reference.causal_conv1d(x, w, bias, state=state.clone(), x_scale=xs, weight_scale=ws)
    got = reference.causal_conv1d(x, w, bias, state=state, x_scale=xs, weight_scale=ws, inv=inv)
    assert torch.equal(got, (y * inv).clamp(-128, 127).round().to(torch.int8))
