"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.rounding import quantize, quantize_per_token, real


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv: Tensor | None = None) -> Tensor:
    x = x.float()
    y = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
    return y.to(weight.dtype) if inv is None else quantize(y, inv)


def rms_norm_per_token(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return quantize_per_token(rms_norm(x, weight.float(), eps))


def gate(x: Tensor, z: Tensor, *, z_scale: Tensor | None = None) -> Tensor:
    return x.float() * F.silu(real(z, z_scale))


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    norm_before_gate: bool = False,
    *,
    z_scale: Tensor | None = None,
) -> Tensor:
    x, gate = x.float(), F.silu(real(z, z_scale))
    if not norm_before_gate:
        x = x * gate
    g = x.unflatten(-1, (groups, -1))
    y = (g * torch.rsqrt(g.pow(2).mean(dim=-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    return (y * gate if norm_before_gate else y).to(weight.dtype)
