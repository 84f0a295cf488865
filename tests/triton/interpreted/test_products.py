"""Linear layers on codes against the reference."""

import importlib

import pytest
import torch

from quamba_kernels import reference, triton
from tests.kernels.agreement import close, codes, normal, same_codes

matmul = importlib.import_module("quamba_kernels.triton.matmul")
# rows of x, inputs, outputs, parts that the sums are cut into: few rows, two tiles of them, many; odd everything
SHAPES = [(1, 333, 131, 3), (1, 1, 1, 1), (2, 31, 5, 1), (17, 333, 7, 2), (33, 130, 70, 1), (67, 40, 130, 1)]
GROUPS = [(32, torch.int8), (64, torch.float16), (128, torch.int8), (32, torch.float16)]


@pytest.fixture(autouse=True)
def split(request, monkeypatch):
    """Sums are cut into as many parts as the test's `parts` says, where there is enough to sum."""
    parts = request.node.callspec.params.get("parts", 1) if hasattr(request.node, "callspec") else 1
    if request.node.originalname != "test_how_far_sums_are_split":
        monkeypatch.setattr(matmul, "splits", lambda tiles, columns, BK, device: parts)


def weight(rng, outputs, inputs, group, kind):
    """packed, group_scale, weight_scale; all 16 codes, scales of both signs, float ones that saturate."""
    groups = -(-inputs // group)
    q = torch.randint(-8, 8, (outputs, inputs), generator=rng, dtype=torch.int8)
    q[-1] = 0
    if kind == torch.int8:
        g = torch.randint(-15, 16, (outputs, groups), generator=rng, dtype=torch.int8)
    else:
        g = (normal(rng, outputs, groups) * 10).half()
        g[0, 0] = 0.5  # halves to round
    return reference.pack_int4(q, group), g, torch.rand(outputs, generator=rng) / inputs + 1e-4


@pytest.mark.parametrize(("m", "k", "n", "parts"), SHAPES)
def test_w8a8_linear(rng, m, k, n, parts):
    x, w, w_scale, bias = codes(rng, m, k), codes(rng, n, k), torch.rand(n, generator=rng) / k, normal(rng, n)
    got = triton.int8_matmul(x, w)
    assert got.dtype == torch.int32 and torch.equal(got.long(), x.long() @ w.long().T)
    for x_scale, b in ((torch.tensor(0.03), None), (torch.rand(m, 1, generator=rng), bias)):
        # Equal, not close: exact sums, and the same roundings in the same order.
        assert torch.equal(
            triton.w8a8_linear(x, x_scale, w, w_scale, b), reference.w8a8_linear(x, x_scale, w, w_scale, b)
        )
    inv = torch.rand(n, generator=rng) * 30
    got, want = (f.w8a8_linear(x, x_scale, w, w_scale, bias, inv) for f in (triton, reference))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n", "parts"), [(1, 333, 131, 3), (2, 31, 5, 1), (16, 70, 33, 2)])
def test_linear(rng, m, k, n, parts, dtype):
    """Few rows; against float64 products of the same halves, rounded once."""
    x, w, bias = normal(rng, m, k), normal(rng, n, k).to(dtype), normal(rng, n).to(dtype)
    exact = x.to(dtype).double() @ w.double().T
    for b in (None, bias):
        want = exact if b is None else exact + b.double()
        got = triton.linear(x, w, b)
        assert got.dtype == dtype and got.shape == (m, n)
        step = max(torch.finfo(dtype).eps, 2e-6) * want.abs().max()
        assert (got.double() - want).abs().max() <= step


def test_many_rows_of_floats_are_torchs(rng, monkeypatch):
    x, w = normal(rng, 17, 8), normal(rng, 5, 8)
    monkeypatch.setattr(matmul, "launch", None)
    assert torch.equal(triton.linear(x, w), reference.linear(x, w))


@pytest.mark.parametrize(("x", "w"), [(-128, -128), (-128, 127), (127, -128)])
def test_extreme_accumulators(x, w):
    got = triton.int8_matmul(torch.full((2, 5000), x, dtype=torch.int8), torch.full((3, 5000), w, dtype=torch.int8))
    assert got.tolist() == [[5000 * x * w] * 3] * 2


@pytest.mark.parametrize(("group", "kind"), GROUPS)
@pytest.mark.parametrize(("m", "k", "n", "parts"), SHAPES)
def test_w4a8_linear(rng, m, k, n, parts, group, kind):
    packed, g, s = weight(rng, n, k, group, kind)
    x, bias = codes(rng, m, k), normal(rng, n)
    x[0, 0] = -128
    x_scale, inv = torch.rand(m, 1, generator=rng), torch.rand(n, generator=rng) * 30
    for b, i in ((bias, None), (None, inv)):
        got, want = (f.w4a8_linear(x, x_scale, packed, g, s, b, i) for f in (triton, reference))
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [1, 41])
def test_extreme_products_do_not_saturate(rows):
    one = torch.tensor(1.0)
    for code, multiplier, value in ((-8, 15, -128), (-8, -15, 127), (7, 15, -128), (7, -15, -128)):
        packed = reference.pack_int4(torch.full((3, 300), code, dtype=torch.int8), 32)
        g = torch.full((3, 10), multiplier, dtype=torch.int8)
        x = torch.full((rows, 300), value, dtype=torch.int8)
        got = triton.w4a8_linear(x, one, packed, g, torch.ones(3))
        assert got.tolist() == [[300.0 * code * multiplier * value] * 3] * rows


def test_float_scales_round_half_to_even_and_saturate():
    one, x = torch.tensor(1.0), torch.full((2, 64), -128, dtype=torch.int8)
    for code, scale in ((-8, 65504.0), (7, 65504.0), (-8, 16.0), (3, 0.5), (-1, 0.5), (5, 0.5)):
        packed = reference.pack_int4(torch.full((3, 64), code, dtype=torch.int8), 32)
        g = torch.full((3, 2), scale).half()
        want = max(-128, min(127, round(code * scale))) * -128.0 * 64
        assert triton.w4a8_linear(x, one, packed, g, torch.ones(3)).tolist() == [[want] * 3] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "k", "n", "parts"), SHAPES)
def test_w8_linear(rng, m, k, n, parts, dtype):
    x, w, s, bias = normal(rng, m, k).to(dtype), codes(rng, n, k), torch.rand(n, generator=rng) / k, normal(rng, n)
    for b in (None, bias):
        close(triton.w8_linear(x, w, s, b), reference.w8_linear(x, w, s, b))
    inv = torch.rand(n, generator=rng) * 30
    same_codes(triton.w8_linear(x, w, s, bias, inv), reference.w8_linear(x, w, s, bias, inv))


@pytest.mark.parametrize(
    ("group", "kind", "dtype"),
    [
        (*GROUPS[0], torch.float32),
        (*GROUPS[1], torch.bfloat16),
        (*GROUPS[2], torch.bfloat16),
        (64, torch.int8, torch.half),
    ],
)
@pytest.mark.parametrize(("m", "k", "n", "parts"), SHAPES)
def test_w4_linear(rng, m, k, n, parts, group, kind, dtype):
    packed, g, s = weight(rng, n, k, group, kind)
    x, bias = normal(rng, m, k).to(dtype), normal(rng, n)
    close(triton.w4_linear(x, packed, g, s, bias), reference.w4_linear(x, packed, g, s, bias))
    inv = torch.tensor(20.0)
    same_codes(triton.w4_linear(x, packed, g, s, None, inv), reference.w4_linear(x, packed, g, s, None, inv))


def test_views_batches_and_no_rows(rng):
    x, w = codes(rng, 2, 3, 80)[:, :, ::2], codes(rng, 40, 24).T
    assert not x.is_contiguous() and not w.is_contiguous()
    xs, ws = torch.rand(2, 3, 1, generator=rng), torch.rand(24, generator=rng)
    assert torch.equal(triton.w8a8_linear(x, xs, w, ws), reference.w8a8_linear(x, xs, w, ws))
    wide = codes(rng, 24, 60)[:, 7:47]
    assert torch.equal(triton.w8a8_linear(x, xs, wide, ws), reference.w8a8_linear(x, xs, wide, ws))
    assert triton.w8a8_linear(x[:0], xs[:0], w, ws).shape == (0, 3, 24)
    packed, g, s = weight(rng, 24, 40, 32, torch.int8)
    wide = torch.cat([packed, packed], 1)[:, packed.shape[1] :]
    assert torch.equal(triton.w4a8_linear(x, xs, wide, g, s), reference.w4a8_linear(x, xs, packed, g, s))
    assert triton.w4_linear(x[:0].float(), packed, g, s).shape == (0, 3, 24)


def test_how_far_sums_are_split(monkeypatch):
    monkeypatch.setattr(matmul, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert matmul.splits(4, 8192, 128, device) == 16  # four blocks of columns each
    assert matmul.splits(40, 1 << 16, 128, device) == 6  # two programs for every processor
    assert matmul.splits(300, 1 << 16, 128, device) == matmul.splits(1, 100, 128, device) == 1
