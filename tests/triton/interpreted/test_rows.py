"""Quantization, norms and gates on rows against the reference."""

import pytest
import torch

from quamba_kernels import reference, triton
from tests.kernels.agreement import close, codes, normal, same_codes

SHAPES = [(1, 768), (2, 3, 33), (17, 1000), (4, 1), (5, 16)]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1500)])
def test_quantize(rng, shape, dtype):
    x, width = (normal(rng, *shape) * 3).to(dtype), shape[-1]
    x.view(-1, width)[-1] = 0
    for inv in (torch.tensor(11.0), torch.rand(width, generator=rng) * 90):
        assert torch.equal(triton.quantize(x, inv), reference.quantize(x, inv))
    (got, scale), (want, want_scale) = triton.quantize_per_token(x), reference.quantize_per_token(x)
    same_codes(got, want)  # torch divides 127 by the scale in two roundings
    assert torch.equal(scale, want_scale)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(rng, shape, dtype):
    x, width = (normal(rng, *shape) * 3).to(dtype), shape[-1]
    x.view(-1, width)[-1] = 0
    w = (torch.rand(width, generator=rng) * 2).to(dtype)
    close(triton.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5), max(1e-6, torch.finfo(dtype).eps))
    for inv in (torch.tensor(30.0), torch.rand(width, generator=rng) * 60):
        same_codes(triton.rms_norm(x, w, 1e-5, inv), reference.rms_norm(x, w, 1e-5, inv))
    (got, scale), (want, want_scale) = (f.rms_norm_per_token(x, w, 1e-5) for f in (triton, reference))
    same_codes(got, want)
    torch.testing.assert_close(scale, want_scale, rtol=1e-6, atol=0)


def test_half_to_even_and_saturation():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, float("inf"), -128.5, -129.0, float("-inf")])
    assert triton.quantize(x, torch.tensor(1.0)).tolist() == [-2, -2, 0, 0, 2, 2, 126, 127, 127, 127, -128, -128, -128]


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("every", [True, False])
def test_nan_reaches_the_scale_of_its_token(every):
    x = torch.randn(3, 17)
    x[1, slice(None) if every else 8] = float("nan")
    _, scale = triton.quantize_per_token(x)
    assert scale[1].isnan().all() and torch.isfinite(scale[[0, 2]]).all()


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 1, 1536), 1), ((2, 3, 66), 2), ((5, 36), 4), ((33, 64), 1), ((3, 7), 7)]
)
def test_gated_norm(rng, shape, groups, norm_before_gate):
    width = shape[-1]
    x, weight = normal(rng, *shape) * 3, normal(rng, width)
    x.view(-1, width)[-1] = 0
    wide = normal(rng, *shape[:-1], 2 * width)
    gates = [(wide[..., width:], None), (wide[..., :width].bfloat16(), None)]
    gates += [(codes(rng, *shape), s) for s in (torch.tensor(0.03), torch.rand(width, generator=rng) / 20)]
    for z, scale in gates:
        got, want = (
            f.gated_rms_norm(x, z, weight, 1e-5, groups, norm_before_gate, z_scale=scale) for f in (triton, reference)
        )
        close(got, want)
    half = triton.gated_rms_norm(x, x, weight.half(), 1e-5, groups, norm_before_gate)
    close(half, reference.gated_rms_norm(x, x, weight.half(), 1e-5, groups, norm_before_gate), 2**-10)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 33), (17, 1500)])
def test_gate(rng, shape):
    x, scale = normal(rng, *shape).half(), torch.rand(shape[-1], generator=rng) / 20
    wide = normal(rng, *shape[:-1], 2 * shape[-1]) * 3
    for z, s in ((wide[..., : shape[-1]], None), (codes(rng, *shape), scale), (codes(rng, *shape), torch.tensor(0.04))):
        close(triton.gate(x, z, z_scale=s), reference.gate(x, z, z_scale=s), 1e-6)


def test_views_and_no_rows(rng):
    x, w = normal(rng, 4, 3, 50), torch.rand(25)
    for view in (x[:, :, ::2], x[:, :, 25:], x.transpose(0, 1)[:, :, :25]):
        close(triton.rms_norm(view, w, 1e-5), reference.rms_norm(view, w, 1e-5), 1e-6)
        assert torch.equal(triton.quantize(view, w), reference.quantize(view, w))
    assert triton.rms_norm(x[:0, :, :25], w, 1e-5).shape == (0, 3, 25)
    assert triton.quantize_per_token(x[:0])[1].shape == (0, 3, 1)
    assert triton.gated_rms_norm(x[:0, :, :25], x[:0, :, :25], w, 1e-5).shape == (0, 3, 25)
