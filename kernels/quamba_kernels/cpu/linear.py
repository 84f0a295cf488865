"""int8 times int8: exact accumulators, and the linear layer with its epilogue."""

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.cpu.checks import FLOAT32, INT8, check, last_axis, needs_grad, pointer, vector
from quamba_kernels.cpu.library import LinearArgs, call, threads

MAX_INPUTS = 2**17 - 1  # more products of -128 * -128 overflow int32


def _check_codes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    inputs = last_axis("x", x, INT8)
    check("weight", weight, INT8, -1, inputs)
    if inputs > MAX_INPUTS:
        raise ValueError(f"x: {inputs} inputs could overflow int32, the most is {MAX_INPUTS}")
    return weight.shape[0], inputs


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    check("x", x, INT8, -1, -1)
    outputs, inputs = _check_codes(x, weight)
    acc = torch.empty(x.shape[0], outputs, dtype=torch.int32)
    if acc.numel() == 0 or inputs == 0:
        return acc.zero_()
    x, weight = x.contiguous(), weight.contiguous()
    args = LinearArgs(x=x.data_ptr(), weight=weight.data_ptr(), acc=acc.data_ptr(), threads=threads())
    args.rows, args.outputs, args.inputs = x.shape[0], outputs, inputs
    call("int8_linear", args)
    return acc


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    outputs, inputs = _check_codes(x, weight)
    check("weight_scale", weight_scale, FLOAT32, outputs)
    if bias is not None:
        check("bias", bias, FLOAT32, outputs)
    per_token = isinstance(x_scale, Tensor) and x_scale.numel() != 1
    check("x_scale", x_scale, FLOAT32, *((*x.shape[:-1], 1) if per_token else x_scale.shape))
    if needs_grad(x_scale, weight_scale, bias, inv):
        return reference.w8a8_linear(x, x_scale, weight, weight_scale, bias, inv)
    out = torch.empty(*x.shape[:-1], outputs, dtype=torch.float32 if inv is None else torch.int8)
    args = LinearArgs(x_scale_stride=int(per_token), outputs=outputs, inputs=inputs, threads=threads())
    if inv is None:
        args.y = out.data_ptr()
    else:
        inv, args.inv_stride = vector("inv", inv, outputs)
        args.inv, args.codes = inv.data_ptr(), out.data_ptr()
    if out.numel() == 0:
        return out
    if inputs == 0:
        return reference.w8a8_linear(x, x_scale, weight, weight_scale, bias, inv)
    x, x_scale, weight, weight_scale = (t.contiguous() for t in (x, x_scale, weight, weight_scale))
    bias = None if bias is None else bias.contiguous()
    args.x, args.x_scale, args.weight, args.weight_scale = (pointer(t) for t in (x, x_scale, weight, weight_scale))
    args.bias, args.rows = pointer(bias), out.numel() // outputs
    call("int8_linear", args)
    return out


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    weight = reference.expand_int4(packed, group_scale, last_axis("x", x, INT8))
    return w8a8_linear(x, x_scale, weight, weight_scale, bias, inv)
