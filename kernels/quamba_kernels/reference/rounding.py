"""From reals to int8 codes."""

import torch
from torch import Tensor


def quantize(x: Tensor, inv: Tensor) -> Tensor:
    return (x.float() * inv).clamp_(-128, 127).round_().to(torch.int8)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    absmax = x.float().abs().amax(dim=-1, keepdim=True)
    return quantize(x, 127.0 / absmax.clamp(min=1e-10)), absmax / 127.0


def finish(y: Tensor, inv: Tensor | None) -> Tensor:
    """The epilogue: codes when an inverse scale is given, else `y` as it is."""
    return y if inv is None else quantize(y, inv)


def real(x: Tensor, scale: Tensor | None) -> Tensor:
    """float32 value of a float tensor, or of codes and their scale."""
    return x.float() if scale is None else x.float() * scale
