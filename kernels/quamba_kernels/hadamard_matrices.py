"""Hadamard matrices of the orders that model widths need: powers of two (Sylvester) and 12, 20, 28, 44 (Paley).

R. E. A. C. Paley, "On orthogonal matrices", 1933. With q prime, Q[i, j] = chi(i - j) the Jacobsthal matrix:
construction I (q = 3 mod 4) has order q + 1, construction II (q = 1 mod 4) has order 2 (q + 1).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.foreign_hadamard import DAO, ROWS

PALEY = {"paley12": 12, "paley20": 20, "paley28": 28, "paley44": 44}
ORDERS = PALEY | DAO
"""Order of every matrix that has a name."""
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever torch's defaults are


def _jacobsthal(q: int) -> Tensor:
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], **FLOATS)
    index = torch.arange(q, device="cpu")
    return chi[(index[:, None] - index[None, :]) % q]


def _bordered(q: int, sign: int) -> Tensor:
    """The (q + 1)-matrix [[0, 1], [sign * 1, Q]]: skew for sign -1, symmetric for +1."""
    s = torch.zeros(q + 1, q + 1, **FLOATS)
    s[0, 1:], s[1:, 0], s[1:, 1:] = 1, sign, _jacobsthal(q)
    return s


@cache
def outer_matrix(name: str) -> Tensor:
    """float32 `[m, m]` of +-1 with `H Hᵀ = m I`, for a name in `ORDERS`. Don't write to it: it is shared."""
    if name in ROWS:
        return torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in ROWS[name]], **FLOATS)
    m = PALEY[name]
    if m == 28:
        s = _bordered(13, 1)
        eye = torch.eye(14, **FLOATS)
        return torch.kron(s, torch.tensor([[1.0, 1.0], [1.0, -1.0]], **FLOATS)) + torch.kron(
            eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], **FLOATS)
        )
    return _bordered(m - 1, -1) + torch.eye(m, **FLOATS)


@cache
def sylvester(n: int, device: torch.device) -> Tensor:
    """float32 `[n, n]` of +-1, n a power of two: `H_2n = [[H, H], [H, -H]]`. Shared: don't write to it."""
    h = torch.ones(1, 1, **FLOATS)
    while h.shape[0] < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h.to(device)


def factor(n: int) -> tuple[int, str]:
    """How to rotate width n: `(m, matrix)` with n = m * 2^k.

    matrix is "sylvester" (m = 1), a Paley name, or "identity" where no Hadamard matrix of order m is known:
    then the rotation is `I_m ⊗ H_{2^k}`, still orthogonal.
    """
    for name, m in [("sylvester", 1), *PALEY.items()]:
        if n % m == 0 and (n // m) & (n // m - 1) == 0:
            return m, name
    return n // (n & -n), "identity"
