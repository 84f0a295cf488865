"""Linear layer for every precision: the weights' spec and the input's type choose the arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.sites import Output
from quamba.layers.weight import WeightedModule
from quamba.plan import WeightSpec
from quamba.qtensor import QTensor


class Linear(WeightedModule):
    """`y = x Wᵀ + b`.

    | weight | input | arithmetic |
    |---|---|---|
    | float | float | float, in the weight's dtype |
    | int8, int4 | QTensor, axis tensor or token | int8 x int8, exact int32, scales after accumulation |
    | int8, int4 | float | weight-only |
    | float | QTensor | TypeError |

    Weight `[out, in]` as in `quamba.layers.weight`; bias `[out]` optional. `integer_input` says that the plan gives this
    layer an integer input: then a float one is a TypeError, not a silent detour. `bias_spec`: the bias may be int8.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        bias: bool = False,
        spec: WeightSpec = WeightSpec(),
        integer_input: bool = False,
        precise_bias: bool = False,
        bias_spec: WeightSpec = WeightSpec(),
    ):
        super().__init__()
        self.inputs, self.outputs, self.integer_input = inputs, outputs, integer_input
        self.hold_weight(spec, outputs, inputs)
        if bias:
            self.add_vector("bias", (outputs,), bias_spec, torch.zeros, precise_bias)
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if self.spec.is_float:
            nn.init.normal_(self.weight, std=self.inputs**-0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor | QTensor, out: Output | None = None, add_bias: bool = True):
        """x `[..., in]`; with `out`, the result goes to that site (or those sites) instead of coming back as float."""
        bias = self.vector("bias") if add_bias and self.bias is not None else None
        if bias is not None and not self.spec.is_float:
            bias = bias.float()
        if out is None or len(out.runs) == 1 or self.spec.is_float:
            y = self._product(x, bias, None if out is None else out.inv)
            return y if out is None else out.finish(y)
        done, start = [], 0
        for run in out.runs:
            rows = slice(start, start + sum(run.sizes))
            pieces = run.finish(self._product(x, bias, run.inv, rows))
            done += pieces if isinstance(pieces, list) else [pieces]
            start = rows.stop
        return done

    def _product(
        self, x: Tensor | QTensor, bias: Tensor | None, inv: Tensor | None, rows: slice | None = None
    ) -> Tensor:
        """Some rows' outputs, or all: float, or codes by inv."""

        def part(t: Tensor) -> Tensor:
            return t if rows is None else t[rows]

        bias = None if bias is None else part(bias)
        if isinstance(x, QTensor):
            if x.axis == "channel":
                raise TypeError("an integer linear takes per-tensor or per-token scales, not channel scales")
            if self.spec.bits == 8:
                scale = part(self.row_scale(self.outputs))
                return kernels.w8a8_linear(x.values, x.scale, part(self.weight), scale, bias, inv)
            if self.spec.bits == 4:
                group_scale, scale = part(self.weight_group_scale), part(self.weight_scale)
                return kernels.w4a8_linear(x.values, x.scale, part(self.weight_packed), group_scale, scale, bias, inv)
            raise TypeError("a linear with float weights was given a QTensor: its plan and its input's site disagree")
        if self.integer_input:
            raise TypeError("a linear planned for integer inputs was given a float tensor")
        if self.spec.bits == 8:
            return kernels.w8_linear(x, part(self.weight), part(self.row_scale(self.outputs)), bias, inv)
        if self.spec.bits == 4:
            group_scale, scale = part(self.weight_group_scale), part(self.weight_scale)
            return kernels.w4_linear(x, part(self.weight_packed), group_scale, scale, bias, inv)
        y = kernels.linear(x, self.weight, bias)
        return y if inv is None else kernels.quantize(y, inv)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, bits={self.spec.bits}"
