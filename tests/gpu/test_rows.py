"""Quantization, norms and gates on rows."""

import pytest
import torch

from quamba_kernels import triton
from tests.gpu import truth
from tests.gpu.cases import DEVICE, FLOATS, close, large, per_token, rounded, stable

pytestmark = pytest.mark.gpu

ODD = [(1, 768), (2, 3, 33), (17, 1000), (4, 1), (5, 16)]
SHAPES = [*ODD, *[pytest.param(p.values, marks=p.marks) for p in large((1, 2560), (2048, 4096), (3, 333, 8192))]]
EPS = 1e-5


def rows_of(rng, shape, dtype):
    """One row of zeros, where there are several."""
    x = rng.normal(*shape, dtype=dtype) * 3
    if x.numel() > shape[-1]:
        x.view(-1, shape[-1])[-1] = 0
    return x


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(rng, shape, dtype):
    x = rows_of(rng, shape, dtype)
    for inv in (torch.tensor(11.0, device=DEVICE), rng.uniform(shape[-1]) * 90):
        rounded(stable(lambda inv=inv: triton.quantize(x, inv)), x.double() * inv.double(), 1e-7)
    per_token(stable(lambda: triton.quantize_per_token(x)), x.double(), 0)


def test_half_to_even_and_saturation():
    x = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 1e30, float("inf"), -128.5, -129.0, float("-inf")]
    got = triton.quantize(torch.tensor(x, device=DEVICE), torch.tensor(1.0, device=DEVICE))
    assert got.tolist() == [-2, -2, 0, 0, 2, 2, 126, 127, 127, 127, -128, -128, -128]


def test_nan_reaches_the_scale_of_its_token(rng):
    x = rng.normal(3, 1700)
    x[1, 8] = float("nan")
    _, scale = triton.quantize_per_token(x)
    assert bool(scale[1].isnan().all()) and bool(torch.isfinite(scale[[0, 2]]).all())


@pytest.mark.parametrize("kinds", [(x, w) for x in FLOATS for w in FLOATS if x in (torch.float32, w)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(rng, shape, kinds):
    x, weight = rows_of(rng, shape, kinds[0]), (rng.uniform(shape[-1]) * 2).to(kinds[1])
    want = truth.rms_norm(x.double(), weight.double(), EPS)
    close(stable(lambda: triton.rms_norm(x, weight, EPS)), want, 1e-6)
    for inv in (torch.tensor(30.0, device=DEVICE), rng.uniform(shape[-1]) * 60):
        rounded(stable(lambda inv=inv: triton.rms_norm(x, weight, EPS, inv)), want * inv.double(), 1e-6)
    per_token(stable(lambda: triton.rms_norm_per_token(x, weight, EPS)), want, 1e-6)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 1536), 1), ((2, 3, 66), 2), ((5, 36), 4), ((33, 64), 1), ((3, 7), 7)]
    + large(((1, 5120), 1), ((64, 1, 8192), 8), ((1, 2048, 8192), 8)),
)
def test_gated_norm(rng, shape, groups, norm_before_gate):
    width = shape[-1]
    x, weight = rows_of(rng, shape, torch.float32), rng.normal(width)
    wide = rng.normal(*shape[:-1], 2 * width)
    gates = [(wide[..., width:], None), (wide[..., :width].bfloat16(), None)]
    gates += [(rng.codes(*shape), s) for s in (torch.tensor(0.03, device=DEVICE), rng.uniform(width) / 20)]
    for z, scale in gates:
        got = stable(
            lambda z=z, scale=scale: triton.gated_rms_norm(x, z, weight, EPS, groups, norm_before_gate, z_scale=scale)
        )
        gate = truth.real(z, scale)
        close(got, truth.gated_rms_norm(x.double(), gate, weight.double(), EPS, groups, norm_before_gate))
    for dtype in FLOATS[1:]:
        got = triton.gated_rms_norm(x.to(dtype), z, weight.to(dtype), EPS, groups, norm_before_gate, z_scale=scale)
        inputs = x.to(dtype).double(), gate, weight.to(dtype).double()
        close(got, truth.gated_rms_norm(*inputs, EPS, groups, norm_before_gate))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate(rng, shape, dtype):
    x, wide = rng.normal(*shape, dtype=dtype), rng.normal(*shape[:-1], 2 * shape[-1], dtype=dtype) * 3
    scales = (torch.tensor(0.04, device=DEVICE), rng.uniform(shape[-1]) / 20)
    for z, scale in ((wide[..., : shape[-1]], None), *((rng.codes(*shape), s) for s in scales)):
        got = stable(lambda z=z, scale=scale: triton.gate(x, z, z_scale=scale))
        close(got, x.double() * truth.silu(truth.real(z, scale)), 1e-6)


def test_views_and_no_rows(rng):
    x, weight = rng.normal(4, 3, 50), rng.uniform(25)
    for view in (x[:, :, ::2], x[:, :, 25:], x.transpose(0, 1)[:, :, :25]):
        close(triton.rms_norm(view, weight, EPS), truth.rms_norm(view.double(), weight.double(), EPS), 1e-6)
        rounded(triton.quantize(view, weight), view.double() * weight.double(), 1e-7)
    assert triton.rms_norm(x[:0, :, :25], weight, EPS).shape == (0, 3, 25)
    assert triton.quantize_per_token(x[:0])[1].shape == (0, 3, 1)
