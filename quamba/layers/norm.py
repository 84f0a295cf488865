"""Root-mean-square norm, float or integer out, decided by the site it writes to."""

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.sites import Output


class RMSNorm(nn.Module):
    """weight `[D]`. Computed in float32 from the residual; float results have the weight's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, out: Output):
        weight = self.weight.float() if out.integer else self.weight
        return out.finish(kernels.rms_norm(x, weight, self.eps, out.inv))
