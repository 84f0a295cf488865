"""Fast Hadamard transform: two or three small matrix products instead of one n x n."""

from torch import Tensor

from quamba_kernels.hadamard_matrices import sylvester
from quamba_kernels.reference.rounding import quantize, quantize_per_token


def hadamard(x: Tensor, outer: Tensor | None, blocks: int = 1, inv: Tensor | None = None) -> Tensor:
    n = x.shape[-1] // blocks
    m = 1 if outer is None else outer.shape[0]
    power = n // m
    right = 1 << (power.bit_length() // 2)  # H_{2^k} = H_left ⊗ H_right
    left = power // right
    y = x.float().reshape(-1, left, right)
    y = sylvester(left, x.device) @ (y @ sylvester(right, x.device))
    if outer is not None:
        y = outer @ y.reshape(-1, m, power)
    y = y.reshape(x.shape) * n**-0.5
    return y.to(x.dtype) if inv is None else quantize(y, inv)


def hadamard_per_token(x: Tensor, outer: Tensor | None, blocks: int = 1) -> tuple[Tensor, Tensor]:
    return quantize_per_token(hadamard(x.float(), outer, blocks))
