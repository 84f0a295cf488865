"""Depthwise causal convolution with SiLU, for float and int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.precise import PreciseModule, frozen
from quamba.layers.sites import Output
from quamba.plan import WeightSpec
from quamba.qtensor import QTensor


class CausalConv1d(PreciseModule):
    """weight `[C, 1, K]`, float or int8 with `weight_scale` float32 `[C]`; optional bias `[C]`."""

    precise = ("weight_scale",)

    def __init__(self, channels: int, taps: int, bias: bool, spec: WeightSpec = WeightSpec()):
        super().__init__()
        self.channels, self.taps, self.spec = channels, taps, spec
        self.weight_scale: Tensor | None
        if spec.is_float:
            self.weight = nn.Parameter(torch.empty(channels, 1, taps))
            self.register_parameter("weight_scale", None)
        else:
            self.weight = frozen(channels, 1, taps, dtype=torch.int8)
            self.weight_scale = frozen(channels, dtype=torch.float32)
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def reset_parameters(self) -> None:
        if self.spec.is_float:
            nn.init.normal_(self.weight, std=self.taps**-0.5)

    def forward(self, x: Tensor | QTensor, out: Output, state: Tensor | None = None, mask: Tensor | None = None):
        """x `[B, L, C]`; state `[B, C, K-1]` in x's dtype, updated in place; mask bool `[B, L]`."""
        weight = self.weight.squeeze(1)
        integer = isinstance(x, QTensor)
        if integer != (self.weight_scale is not None):
            have, want = ("a QTensor", "float") if integer else ("a float tensor", "integer")
            raise TypeError(f"a convolution with {want} weights was given {have}")
        values, scale = (x.values, x.scale) if isinstance(x, QTensor) else (x, None)
        y = kernels.causal_conv1d(
            values,
            weight,
            self.bias,
            state=state,
            mask=mask,
            x_scale=scale,
            weight_scale=self.weight_scale,
            inv=out.inv,
        )
        return out.finish(y)
