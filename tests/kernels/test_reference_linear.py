"""Integer products against int64, linear layers against float64."""

import pytest
import torch

from quamba_kernels import reference

SHAPES = [(1, 1, 1), (1, 768, 33), (3, 1024, 5), (2, 1025, 7), (5, 2049, 3), (2, 20000, 3)]


def codes(rng, *shape, low=-128, high=128):
    return torch.randint(low, high, shape, generator=rng, dtype=torch.int8)


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize(("x", "w"), [(-128, -128), (-128, 127), (127, -128), (127, 127)])
def test_int8_matmul_extreme_constants(m, k, n, x, w):
    acc = reference.int8_matmul(torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), w, dtype=torch.int8))
    assert acc.dtype == torch.int32
    assert acc.tolist() == [[k * x * w] * n] * m


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_matmul_random(rng, m, k, n):
    x, w = codes(rng, m, k), codes(rng, n, k)
    assert torch.equal(reference.int8_matmul(x, w).long(), x.long() @ w.long().T)


def test_int8_matmul_extremes_mixed(rng):
    x, w = (codes(rng, *s, low=0, high=2) * -1 ^ 127 for s in ((4, 3000), (6, 3000)))  # 127 and -128 only
    assert set(x.unique().tolist()) == {-128, 127}
    assert torch.equal(reference.int8_matmul(x, w).long(), x.long() @ w.long().T)


def test_int8_matmul_empty():
    empty = torch.zeros(0, 5, dtype=torch.int8)
    assert reference.int8_matmul(empty, torch.zeros(3, 5, dtype=torch.int8)).shape == (0, 3)
    none = torch.zeros(2, 0, dtype=torch.int8)
    assert torch.equal(reference.int8_matmul(none, torch.zeros(3, 0, dtype=torch.int8)), torch.zeros(2, 3).int())


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_w8a8_linear(rng, per_token, with_bias):
    x, w = codes(rng, 2, 5, 130), codes(rng, 17, 130)
    x_scale = torch.rand(2, 5, 1, generator=rng) if per_token else torch.tensor(0.037)
    w_scale, bias = torch.rand(17, generator=rng) / 100, torch.randn(17, generator=rng) if with_bias else None
    want = (x.double() * x_scale.double()) @ (w.double() * w_scale.double()[:, None]).T
    want = want if bias is None else want + bias.double()
    y = reference.w8a8_linear(x, x_scale, w, w_scale, bias)
    assert y.dtype == torch.float32 and y.shape == (2, 5, 17)
    # Three float32 roundings (scale, scale, bias): 3 * 2^-24 of the largest value, with room for cancellation.
    torch.testing.assert_close(y.double(), want, rtol=0, atol=4e-7 * want.abs().max().item())

    inv = torch.rand(17, generator=rng) * 5
    rounded = reference.w8a8_linear(x, x_scale, w, w_scale, bias, inv)
    assert torch.equal(rounded, (y * inv).clamp(-128, 127).round().to(torch.int8))


def test_w8a8_epilogue_order():
    # (acc * w_scale) * x_scale and acc * (w_scale * x_scale) differ in the last bit: the order is the contract.
    x, w = torch.full((1, 3), 101, dtype=torch.int8), torch.full((1, 3), 97, dtype=torch.int8)
    for seed in range(20):
        x_scale, w_scale = torch.rand(2, generator=torch.Generator().manual_seed(seed)).split(1)
        acc = torch.tensor([[3 * 101 * 97]]).float()
        assert torch.equal(reference.w8a8_linear(x, x_scale[0], w, w_scale), (acc * w_scale) * x_scale)


def test_w8_linear(rng):
    x, w, scale = torch.randn(3, 70, generator=rng), codes(rng, 9, 70), torch.rand(9, generator=rng) / 100
    bias = torch.randn(9, generator=rng)
    want = x.double() @ (w.double() * scale.double()[:, None]).T + bias.double()
    torch.testing.assert_close(reference.w8_linear(x, w, scale, bias).double(), want, rtol=0, atol=1e-5)
    codes_ = reference.w8_linear(x, w, scale, bias, torch.tensor(20.0))
    assert codes_.dtype == torch.int8 and (codes_.double() - (want * 20).clamp(-128, 127)).abs().max() <= 0.51


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_keeps_the_weight_dtype(rng, dtype, rows):
    x, w, b = (torch.randn(*s, generator=rng).to(dtype) for s in ((rows, 64), (12, 64), (12,)))
    y = reference.linear(x.float(), w, b)
    assert y.dtype == dtype
    want = x.double() @ w.double().T + b.double()
    # One rounding of the result; float32 sums of 64 products inside, bounded by 64 * 2^-24 * sum |x w| (about 50).
    torch.testing.assert_close(y.double(), want, rtol=torch.finfo(dtype).eps, atol=2e-4)


def test_embedding(rng):
    table = torch.randn(11, 4, generator=rng).half()
    ids = torch.tensor([[0, 10], [3, 3]])
    assert torch.equal(reference.embedding(ids, table), table[ids])
