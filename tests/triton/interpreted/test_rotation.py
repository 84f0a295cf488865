"""The Hadamard transform against the reference."""

import pytest
import torch

from quamba_kernels import reference, triton
from quamba_kernels.hadamard_matrices import outer_matrix
from quamba_kernels.triton import rotation
from tests.kernels.agreement import close, normal, same_codes


@pytest.mark.parametrize(
    ("n", "matrix", "blocks"),
    [(1536, "paley12", 1), (2560, "paley20", 1), (224, "paley28", 1), (2816, "paley44", 1), (12, "paley12", 1)]
    + [(48, "paley12", 2), (36, None, 9), (7, None, 7)]
    + [(1 << k, None, 1) for k in (0, 1, 2, 5, 10, 13)],
)
def test_hadamard(rng, n, matrix, blocks):
    x, outer = normal(rng, 3, 2, n), None if matrix is None else outer_matrix(matrix)
    close(triton.hadamard(x, outer, blocks), reference.hadamard(x, outer, blocks), 2e-6)
    inv = torch.rand(n, generator=rng) * 40
    same_codes(triton.hadamard(x, outer, blocks, inv), reference.hadamard(x, outer, blocks, inv))
    (got, scale), (want, want_scale) = (f.hadamard_per_token(x, outer, blocks) for f in (triton, reference))
    same_codes(got, want)
    torch.testing.assert_close(scale, want_scale, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 17, 33])
def test_half_precision_and_many_rows(rng, rows, dtype):
    x = normal(rng, rows, 240).to(dtype)[:, ::2]
    outer = outer_matrix("paley12")
    close(triton.hadamard(x[:, :96], outer), reference.hadamard(x[:, :96], outer), torch.finfo(dtype).eps)
    assert triton.hadamard(x[:0, :96], outer).shape == (0, 96)


@pytest.mark.parametrize("width", [1 << 15, 1 << 16])
def test_a_row_too_wide_for_a_program(rng, monkeypatch, width):
    """For any, or for one with as little shared memory as AMD's."""
    monkeypatch.setattr(rotation, "launch", None)
    x = normal(rng, 1, width)
    assert torch.equal(triton.hadamard(x, None), reference.hadamard(x, None))
