"""Rounding to int8 (half to even, saturating, zero rows) and RMSNorm."""

import pytest
import torch

from quamba_kernels import reference


def test_half_to_even():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 126.5, 0.49999997, 2.5000002])
    got = reference.quantize(x, torch.tensor(1.0))
    assert got.dtype == torch.int8 and got.tolist() == [-2, -2, 0, 0, 2, 2, 4, 126, 0, 3]


def test_saturates():
    x = torch.tensor([127.4, 127.5, 128.0, 1e30, float("inf"), -128.4, -128.5, -129.0, -1e30, float("-inf")])
    assert reference.quantize(x, torch.tensor(1.0)).tolist() == [127] * 5 + [-128] * 5


def test_inv_per_channel(rng):
    x, inv = torch.randn(3, 4, 6, generator=rng), torch.rand(6, generator=rng) * 50
    got = reference.quantize(x, inv)
    for c in range(6):
        assert torch.equal(got[..., c], reference.quantize(x[..., c], inv[c]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_per_token(rng, dtype):
    x = (torch.randn(3, 5, 40, generator=rng) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    got, scale = reference.quantize_per_token(x)
    assert got.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (3, 5, 1)
    assert torch.equal(got.abs().amax(-1), torch.full((3, 5), 127, dtype=torch.int8))
    error = (got.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() * 0.50001).all()  # half a step, and the rounding of the scale


def test_per_token_odd_rows():
    x = torch.stack([torch.zeros(8), -torch.ones(8), torch.full((8,), 1e-30), torch.full((8,), 3e38)])
    got, scale = reference.quantize_per_token(x)
    assert scale.isfinite().all() and scale[0] == 0
    assert got.tolist() == [[0] * 8, [-127] * 8, [0] * 8, [127] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm(rng, dtype):
    x, w = torch.randn(2, 3, 33, generator=rng).to(dtype), torch.randn(33, generator=rng).to(dtype)
    d = x.double()
    want = d / (d.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w.double()
    got = reference.rms_norm(x, w, 1e-5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=max(torch.finfo(dtype).eps, 1e-6), atol=0)


def test_rms_norm_of_a_zero_row_is_zero():
    assert torch.equal(reference.rms_norm(torch.zeros(2, 16), torch.ones(16), 1e-5), torch.zeros(2, 16))


def test_rms_norm_codes(rng):
    x, w, inv = torch.randn(4, 20, generator=rng), torch.rand(20, generator=rng), torch.tensor(40.0)
    want = reference.quantize(reference.rms_norm(x, w, 1e-5), inv)
    assert torch.equal(reference.rms_norm(x, w, 1e-5, inv), want)
