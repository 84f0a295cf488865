"""Depthwise causal convolution with SiLU, for float and int8."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.sites import Output
from quamba.layers.weight import WeightedModule
from quamba.plan import WeightSpec
from quamba.qtensor import QTensor, parts


class CausalConv1d(WeightedModule):
    """weight `[C, 1, K]`, float or int8 with `weight_scale` float32, `[C]` or one for all; optional bias `[C]`."""

    def __init__(
        self,
        channels: int,
        taps: int,
        bias: bool,
        spec: WeightSpec = WeightSpec(),
        bias_spec: WeightSpec = WeightSpec(),
    ):
        super().__init__()
        self.channels, self.taps = channels, taps
        self.hold_weight(spec, channels, 1, taps)
        if bias:
            self.add_vector("bias", (channels,), bias_spec, torch.zeros, precise=False)
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if self.spec.is_float:
            nn.init.normal_(self.weight, std=self.taps**-0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor | QTensor, out: Output, state: Tensor | None = None, mask: Tensor | None = None):
        """x `[B, L, C]`; state `[B, C, K-1]` in x's dtype, updated in place; mask bool `[B, L]`."""
        integer = isinstance(x, QTensor)
        if integer == self.spec.is_float:
            have, want = ("a QTensor", "float") if integer else ("a float tensor", "integer")
            raise TypeError(f"a convolution with {want} weights was given {have}")
        values, scale = parts(x)
        y = kernels.causal_conv1d(
            values,
            self.weight.squeeze(1),
            None if self.bias is None else self.vector("bias"),
            state=state,
            mask=mask,
            x_scale=scale,
            weight_scale=self.row_scale(self.channels) if integer else None,
            inv=out.inv,
        )
        return out.finish(y)
