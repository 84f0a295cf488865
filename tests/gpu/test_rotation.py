"""The Hadamard transform."""

import pytest
import torch

from quamba_kernels import triton
from quamba_kernels.hadamard_matrices import outer_matrix
from tests.gpu import truth
from tests.gpu.cases import DEVICE, FLOATS, close, large, per_token, rounded, stable

pytestmark = pytest.mark.gpu

# rows, width, outer matrix, blocks
SIZES = [(3, 12, "paley12", 1), (5, 224, "paley28", 1), (2, 48, "paley12", 2), (3, 36, None, 9), (1, 7, None, 7)]
SIZES += [(3, 1 << k, None, 1) for k in (0, 1, 5, 10)] + [(1, 1536, "paley12", 1), (17, 96, "paley12", 1)]
# the inner widths of the 1.4b, 2.8b and 8b shapes, and others with large outer matrices
REAL = large(
    (1, 4096, None, 1),
    (2048, 4096, None, 1),
    (1, 5120, "paley20", 1),
    (2048, 5120, "paley20", 1),
    (1, 8192, None, 1),
    (333, 8192, None, 1),
    (64, 7168, "paley28", 1),
    (64, 11264, "paley44", 1),
)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rows", "width", "matrix", "blocks"), SIZES)
def test_every_dtype(rng, rows, width, matrix, blocks, dtype):
    check(rng, rows, width, matrix, blocks, dtype)


@pytest.mark.parametrize(("rows", "width", "matrix", "blocks"), REAL)
def test_real_sizes(rng, rows, width, matrix, blocks):
    check(rng, rows, width, matrix, blocks, torch.float32)


def check(rng, rows, width, matrix, blocks, dtype):
    x = rng.normal(rows, width, dtype=dtype)
    outer = None if matrix is None else outer_matrix(matrix).to(DEVICE)
    want = truth.hadamard(x.double(), None if outer is None else outer.double(), blocks)
    close(stable(lambda: triton.hadamard(x, outer, blocks)), want, 2e-6)
    inv = rng.uniform(width) * 40
    rounded(stable(lambda: triton.hadamard(x, outer, blocks, inv)), want * inv.double(), 2e-6)
    per_token(stable(lambda: triton.hadamard_per_token(x, outer, blocks)), want, 2e-6)


def test_views_and_no_rows(rng):
    wide = rng.normal(3, 2, 256)
    want = truth.hadamard(wide[..., ::2].double(), None, 1)
    close(triton.hadamard(wide[..., ::2], None), want, 2e-6)
    assert triton.hadamard(wide[:0], None).shape == (0, 2, 256)


def test_twice_is_the_identity(rng):
    x = rng.normal(4, 512)
    back = triton.hadamard(triton.hadamard(x, None), None)
    assert torch.allclose(back, x, atol=1e-5)
