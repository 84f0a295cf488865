"""Linear layers: int8 and int4 weights times int8 codes, exact, or times floats; float weights where the rows are few."""

from typing import Any

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import (
    FLOATS,
    INT8,
    check,
    check_codes,
    check_epilogue,
    check_packed,
    check_sums,
    check_x_scale,
    last_axis,
    needs_grad,
)
from quamba_kernels.triton.common import FEW_ROWS
from quamba_kernels.triton.matmul import product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Many rows are torch's own."""
    inputs = last_axis("x", x, FLOATS, x.device)
    check("weight", weight, FLOATS, -1, inputs, device=x.device)
    if bias is not None:
        check("bias", bias, FLOATS, weight.shape[0], device=x.device)
    if inputs == 0 or x.numel() > FEW_ROWS * inputs or needs_grad(x, weight, bias):
        return reference.linear(x, weight, bias)
    return product(x, weight, dtype=weight.dtype, bias=bias, out_dtype=weight.dtype)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    check("x", x, INT8, -1, -1, device=x.device)
    _, inputs = check_codes(x, weight, x.device)
    if inputs == 0:
        return reference.int8_matmul(x, weight)
    return product(x, weight, dtype=torch.int8, out_dtype=torch.int32)


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    outputs, inputs = check_codes(x, weight, x.device)
    check_epilogue(outputs, weight_scale, bias, x.device)
    check_x_scale(x, x_scale, x.device)
    if inputs == 0 or needs_grad(x_scale, weight_scale, bias, inv):
        return reference.w8a8_linear(x, x_scale, weight, weight_scale, bias, inv)
    return product(x, weight, dtype=torch.int8, x_scale=x_scale, weight_scale=weight_scale, bias=bias, inv=inv)


def w8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, inv: Tensor | None = None
) -> Tensor:
    inputs = last_axis("x", x, FLOATS, x.device)
    check("weight", weight, INT8, -1, inputs, device=x.device)
    check_epilogue(weight.shape[0], weight_scale, bias, x.device)
    if inputs == 0 or needs_grad(x, weight_scale, bias, inv):
        return reference.w8_linear(x, weight, weight_scale, bias, inv)
    return product(x, weight, dtype=x.dtype, weight_scale=weight_scale, bias=bias, inv=inv)


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    inputs = last_axis("x", x, INT8, x.device)
    group = check_packed(packed, group_scale, inputs, x.device)
    check_sums(inputs)
    check_epilogue(packed.shape[0], weight_scale, bias, x.device)
    check_x_scale(x, x_scale, x.device)
    if needs_grad(x_scale, weight_scale, group_scale, bias, inv):
        return reference.w4a8_linear(x, x_scale, packed, group_scale, weight_scale, bias, inv)
    scales: dict[str, Any] = {"x_scale": x_scale, "weight_scale": weight_scale, "group_scale": group_scale}
    return product(x, packed.view(torch.int8), dtype=torch.int8, group=group, **scales, bias=bias, inv=inv)


def w4_linear(
    x: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    inputs = last_axis("x", x, FLOATS, x.device)
    group = check_packed(packed, group_scale, inputs, x.device)
    check_epilogue(packed.shape[0], weight_scale, bias, x.device)
    if needs_grad(x, weight_scale, group_scale, bias, inv):
        return reference.w4_linear(x, packed, group_scale, weight_scale, bias, inv)
    # The product of a code and an int8 multiplier is exact in half precision too; one with a float16 scale isn't.
    dtype = torch.float32 if group_scale.is_floating_point() else x.dtype
    scales: dict[str, Any] = {"weight_scale": weight_scale, "group_scale": group_scale}
    return product(x, packed.view(torch.int8), dtype=dtype, group=group, **scales, bias=bias, inv=inv)
