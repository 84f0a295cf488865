"""Root-mean-square norms: the blocks' own, float or integer out, decided by the site it writes to; and Mamba2's."""

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.sites import Output
from quamba.qtensor import QTensor, parts


class RMSNorm(nn.Module):
    """weight `[D]`. Computed in float32 from the residual; float results have the weight's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, out: Output):
        if out.per_token:
            return QTensor(*kernels.rms_norm_per_token(x, self.weight, self.eps), "token")
        weight = self.weight.float() if out.integer else self.weight
        return out.finish(kernels.rms_norm(x, weight, self.eps, out.inv))


class GatedRMSNorm(nn.Module):
    """Mamba2's norm, per group of channels, with its gate. weight `[I]`. Computed in float32."""

    def __init__(self, width: int, eps: float, groups: int = 1, norm_before_gate: bool = False):
        super().__init__()
        self.eps, self.groups, self.norm_before_gate = eps, groups, norm_before_gate
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, z: Tensor | QTensor, precise: bool = False) -> Tensor:
        """x float, z float or int8, `[..., I]`; the result has the weight's dtype, or float32 if `precise`."""
        weight = self.weight.float() if precise else self.weight
        gate, scale = parts(z)
        return kernels.gated_rms_norm(x, gate, weight, self.eps, self.groups, self.norm_before_gate, z_scale=scale)
