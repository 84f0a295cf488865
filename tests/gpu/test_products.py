"""Products with weights in codes."""

import pytest
import torch

from quamba_kernels import reference, triton
from tests.gpu import truth
from tests.gpu.cases import DEVICE, FLOATS, GROUPS, close, large, rounded, same_bits, stable

pytestmark = pytest.mark.gpu

# rows of x, inputs, outputs
ODD = [(1, 1, 1), (1, 333, 131), (2, 31, 5), (17, 333, 7), (33, 130, 70), (67, 40, 130), (130, 257, 300)]
# in_proj, x_proj, dt_proj, out_proj and head of the 2.8b and 8b shapes, from one token to a chunk of a prompt
REAL = large(
    (1, 2560, 10240),
    (1, 8192, 4096),
    (1, 4096, 256000),
    (16, 4096, 18560),
    (64, 5120, 2560),
    (256, 4096, 18560),
    (300, 160, 5120),
    (1000, 5120, 192),
    (2048, 4096, 18560),
    (2048, 5120, 2560),
)
FEW = [(1, 333, 131), (19, 130, 70), (130, 257, 300)]
FEW_REAL = large((1, 4096, 18560), (64, 8192, 4096), (2048, 2560, 10240))


def scaled(total, weight_scale, x_scale, bias):
    """The epilogue of integer products in float32, each step rounded as the contract says."""
    y = (total.to(torch.int32).float() * weight_scale) * x_scale
    return y if bias is None else y + bias


@pytest.mark.parametrize(("rows", "inputs", "outputs"), ODD + REAL)
def test_int8_codes(rng, rows, inputs, outputs):
    x, w = rng.codes(rows, inputs), rng.codes(outputs, inputs)
    weight_scale, bias = rng.uniform(outputs) / inputs, rng.normal(outputs)
    total = x.double() @ w.double().T  # below 2^53: exact
    assert torch.equal(stable(lambda: triton.int8_matmul(x, w)).double(), total)
    for x_scale, b in ((torch.tensor(0.03, device=DEVICE), None), (rng.uniform(rows, 1), bias)):
        got = stable(lambda x_scale=x_scale, b=b: triton.w8a8_linear(x, x_scale, w, weight_scale, b))
        want = total * weight_scale.double() * x_scale.double() + (0 if b is None else b.double())
        close(got, want, 1e-6)
        assert same_bits(got, scaled(total, weight_scale, x_scale, b))
    inv = rng.uniform(outputs) * 30
    rounded(stable(lambda: triton.w8a8_linear(x, x_scale, w, weight_scale, bias, inv)), want * inv.double(), 1e-6)


@pytest.mark.parametrize(("x", "w"), [(-128, -128), (-128, 127), (127, -128)])
@pytest.mark.parametrize("rows", [1, 40, 200])
def test_the_largest_sums(rows, x, w):
    codes = [torch.full((n, 70_000), code, dtype=torch.int8, device=DEVICE) for n, code in ((rows, x), (3, w))]
    assert bool((triton.int8_matmul(*codes) == 70_000 * x * w).all())


@pytest.mark.parametrize(("group", "kind"), GROUPS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), FEW + FEW_REAL)
def test_int4_weights_and_int8_codes(rng, rows, inputs, outputs, group, kind):
    packed, group_scale, weight_scale = rng.int4(outputs, inputs, group, kind)
    x, x_scale, bias, inv = (
        rng.codes(rows, inputs),
        rng.uniform(rows, 1),
        rng.normal(outputs),
        rng.uniform(outputs) * 30,
    )
    # float16 scales: rounded to int8 codes, half to even
    total = x.double() @ truth.int4(packed, group_scale, inputs).round().clamp(-128, 127).T
    got = stable(lambda: triton.w4a8_linear(x, x_scale, packed, group_scale, weight_scale, bias))
    want = total * weight_scale.double() * x_scale.double() + bias.double()
    close(got, want, 1e-6)
    assert same_bits(got, scaled(total, weight_scale, x_scale, bias))
    rounded(triton.w4a8_linear(x, x_scale, packed, group_scale, weight_scale, bias, inv), want * inv.double(), 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), FEW + FEW_REAL)
def test_int8_weights_and_floats(rng, rows, inputs, outputs, dtype):
    x, w = rng.normal(rows, inputs, dtype=dtype), rng.codes(outputs, inputs)
    weight_scale, bias, inv = rng.uniform(outputs) / inputs, rng.normal(outputs), rng.uniform(outputs) * 30
    want = (x.double() @ w.double().T) * weight_scale.double() + bias.double()
    close(stable(lambda: triton.w8_linear(x, w, weight_scale, bias)), want)
    rounded(triton.w8_linear(x, w, weight_scale, bias, inv), want * inv.double())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("group", "kind"), GROUPS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), FEW[:2] + large((1, 4096, 18560), (300, 5120, 2560)))
def test_int4_weights_and_floats(rng, rows, inputs, outputs, group, kind, dtype):
    packed, group_scale, weight_scale = rng.int4(outputs, inputs, group, kind)
    x, bias = rng.normal(rows, inputs, dtype=dtype), rng.normal(outputs)
    want = (x.double() @ truth.int4(packed, group_scale, inputs).T) * weight_scale.double() + bias.double()
    close(stable(lambda: triton.w4_linear(x, packed, group_scale, weight_scale, bias)), want)
    inv = torch.tensor(20.0, device=DEVICE)
    rounded(triton.w4_linear(x, packed, group_scale, weight_scale, bias, inv), want * 20)


@pytest.mark.parametrize("rows", [1, 41])
def test_extreme_int4_products_do_not_saturate(rows):
    one = torch.ones((), device=DEVICE)
    for code, multiplier, value in ((-8, 15, -128), (-8, -15, 127), (7, 15, -128), (7, -15, -128)):
        packed = reference.pack_int4(torch.full((3, 300), code, dtype=torch.int8, device=DEVICE), 32)
        g = torch.full((3, 10), multiplier, dtype=torch.int8, device=DEVICE)
        x = torch.full((rows, 300), value, dtype=torch.int8, device=DEVICE)
        got = triton.w4a8_linear(x, one, packed, g, torch.ones(3, device=DEVICE))
        assert got.tolist() == [[300.0 * code * multiplier * value] * 3] * rows


def test_views(rng):
    x, w = rng.codes(2, 3, 160)[:, :, ::2], rng.codes(80, 24).T
    x_scale, weight_scale = rng.uniform(2, 3, 1), rng.uniform(24)
    dense = triton.w8a8_linear(x.contiguous(), x_scale, w.contiguous(), weight_scale)
    assert same_bits(triton.w8a8_linear(x, x_scale, w, weight_scale), dense)
    wide = torch.cat([rng.codes(24, 16), w, rng.codes(24, 5)], 1)[:, 16:96]
    assert same_bits(triton.w8a8_linear(x, x_scale, wide, weight_scale), dense)
    assert triton.w8a8_linear(x[:0], x_scale[:0], w, weight_scale).shape == (0, 3, 24)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 333, 131), (16, 70, 33), (130, 257, 300), *FEW_REAL])
def test_float_weights(rng, rows, inputs, outputs, dtype):
    """Few rows are Triton's, many torch's."""
    x, w, bias = (rng.normal(*shape, dtype=dtype) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
    tolerance = max(2e-5, torch.finfo(dtype).eps)  # torch may add parts in half precision
    close(stable(lambda: triton.linear(x, w, bias)), x.double() @ w.double().T + bias.double(), tolerance)
    close(triton.linear(x, w), x.double() @ w.double().T, tolerance)
