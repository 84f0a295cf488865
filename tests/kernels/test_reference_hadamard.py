"""Hadamard matrices and their fast transform against dense matrices."""

import pytest
import torch

from quamba_kernels import reference
from quamba_kernels.hadamard_matrices import PALEY, factor, outer_matrix, sylvester

CPU = torch.device("cpu")
WIDTHS = [768, 1024, 1536, 2048, 2560, 3072, 4096, 5120, 8192, 512, 36, 7, 2816, 224]


def dense(m, matrix, n):
    """The matrix that `factor` names, unnormalised, in float32: all entries are small integers."""
    power = sylvester(n // m, CPU)
    outer = {"sylvester": torch.ones(1, 1), "identity": torch.eye(m)}.get(matrix)
    return torch.kron(outer_matrix(matrix) if outer is None else outer, power)


@pytest.mark.parametrize("name", PALEY)
def test_outer_matrices(name):
    h = outer_matrix(name)
    assert h.abs().eq(1).all() and torch.equal(h @ h.T, len(h) * torch.eye(len(h)))


@pytest.mark.parametrize("n", WIDTHS)
def test_orthogonal(n):
    m, matrix = factor(n)
    h, order = dense(m, matrix, n), n // m if matrix == "identity" else n
    some = slice(None, None, max(1, n // 1024))  # rows; all of them below 2048
    assert torch.equal(h[some] @ h.T, order * torch.eye(n)[some])  # exact: integers below 2^24


@pytest.mark.parametrize("n", WIDTHS)
def test_transform_is_the_dense_product(rng, n):
    m, matrix = factor(n)
    identity = matrix == "identity"
    outer = outer_matrix(matrix) if matrix in PALEY else None
    x = torch.randn(3, 2, n, generator=rng)
    got = reference.hadamard(x, outer, m if identity else 1)
    want = (x @ dense(m, matrix, n).T) * (n // m if identity else n) ** -0.5
    assert got.shape == x.shape and got.dtype == x.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)  # sums of up to 8192 float32 of size 1 / sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(rng, dtype):
    x = torch.randn(4, 768, generator=rng).to(dtype)
    got = reference.hadamard(x, outer_matrix("paley12"))
    assert got.dtype == dtype and torch.equal(got, reference.hadamard(x.float(), outer_matrix("paley12")).to(dtype))


def test_codes(rng):
    x, inv = torch.randn(4, 1536, generator=rng) * 3, torch.rand(1536, generator=rng) * 20
    y = reference.hadamard(x, outer_matrix("paley12"))
    assert torch.equal(reference.hadamard(x, outer_matrix("paley12"), 1, inv), reference.quantize(y, inv))


def test_blocks_are_independent(rng):
    x = torch.randn(2, 5 * 64, generator=rng)
    want = torch.cat([reference.hadamard(part, None) for part in x.split(64, -1)], -1)
    torch.testing.assert_close(reference.hadamard(x, None, 5), want, rtol=0, atol=1e-6)
