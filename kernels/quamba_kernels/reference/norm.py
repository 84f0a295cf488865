"""Root-mean-square normalisation (arXiv 1910.07467)."""

import torch
from torch import Tensor

from quamba_kernels.reference.rounding import quantize


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv: Tensor | None = None) -> Tensor:
    x = x.float()
    y = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + eps) * weight.float()
    return y.to(weight.dtype) if inv is None else quantize(y, inv)
