"""Linear layer for every precision: the weights' spec and the input's type choose the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.precise import PreciseModule, frozen
from quamba.layers.sites import Output
from quamba.plan import WeightSpec
from quamba.qtensor import QTensor


class Linear(PreciseModule):
    """`y = x Wᵀ + b`.

    | weight | input | arithmetic |
    |---|---|---|
    | float | float | float, in the weight's dtype |
    | int8 | QTensor, axis tensor or token | int8 x int8, exact int32, scales after accumulation |
    | int8 | float | weight-only |
    | float | QTensor | TypeError |

    weight `[out, in]`, float or int8; `weight_scale` float32 `[out]` with int8; bias optional. `integer_input` says that
    the plan gives this layer an integer input: then a float one is a TypeError, not a silent detour.
    """

    precise: tuple[str, ...] = ("weight_scale",)

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        spec: WeightSpec = WeightSpec(),
        integer_input: bool = False,
        precise_bias: bool = False,
    ):
        super().__init__()
        self.inputs, self.outputs, self.spec, self.integer_input = inputs, outputs, spec, integer_input
        self.weight_scale: Tensor | None
        if spec.is_float:
            self.weight = nn.Parameter(torch.empty(outputs, inputs))
            self.register_parameter("weight_scale", None)
        else:
            self.weight = frozen(outputs, inputs, dtype=torch.int8)
            self.weight_scale = frozen(outputs, dtype=torch.float32)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        if precise_bias:
            self.precise = ("weight_scale", "bias")

    def reset_parameters(self) -> None:
        if self.spec.is_float:
            nn.init.normal_(self.weight, std=self.inputs**-0.5)

    def forward(self, x: Tensor | QTensor, out: Output | None = None, add_bias: bool = True):
        """x `[..., in]`; with `out`, the result goes to that site (or those sites) instead of coming back as float."""
        bias: Tensor | None = self.bias if add_bias else None
        if bias is not None and self.weight_scale is not None:
            bias = bias.float()
        inv = None if out is None else out.inv
        y: Tensor
        if isinstance(x, QTensor):
            if self.weight_scale is None:
                raise TypeError(
                    "a linear with float weights was given a QTensor: its plan and its input's site disagree"
                )
            if x.axis == "channel":
                raise TypeError("an integer linear takes per-tensor or per-token scales, not channel scales")
            y = kernels.w8a8_linear(x.values, x.scale, self.weight, self.weight_scale, bias, inv)
        elif self.weight_scale is not None:
            if self.integer_input:
                raise TypeError("a linear planned for integer inputs was given a float tensor")
            y = kernels.w8_linear(x, self.weight, self.weight_scale, bias, inv)
        else:
            y = kernels.linear(x, self.weight, bias)
            if inv is not None:
                y = kernels.quantize(y, inv)
        return y if out is None else out.finish(y)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, bits={self.spec.bits}"
