"""Linear layers on codes: exact int8 products with their epilogue, and weight-only ones; int8 and int4 weights."""

import ctypes
import functools
import time
from collections.abc import Callable

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
    vector,
)
from quamba_kernels.cpu.library import KINDS, LinearArgs, call, empty, library, pointer, threads
from quamba_kernels.recording import listening
from quamba_kernels.reference.int4 import real_int4
from quamba_kernels.reference.rounding import finish

FEW_ROWS = 16  # weight-only: beyond, it pays to make floats of the weight and leave the products to torch
FEW_ROWS_OF_FLOATS = 4  # float weights: beyond, torch's products are faster
MANY_ROWS = 64  # int8 products: from here on torch's may be faster
FEW_INPUTS = 512  # of int8 weights: the C++ is fast for any number of rows, and the same bits for each
PANEL = 512  # weight rows to make floats of at once: they stay in the cache


def _int4(group_scale: Tensor, group: int) -> tuple[Tensor, ctypes.Structure]:
    """The group scales as C takes them, to be kept alive during the call, and arguments that point there."""
    is_float = group_scale.is_floating_point()
    group_scale = (group_scale.float() if is_float else group_scale).contiguous()
    return group_scale, LinearArgs(group=group, group_scale=pointer(group_scale), group_scale_is_float=is_float)


def _run(
    op: str,
    x: Tensor,
    x_scale: Tensor | None,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    inv: Tensor | None,
    args: ctypes.Structure,
) -> Tensor:
    """Fill in what the ops share and call: float32, or int8 codes with `inv`."""
    outputs, inputs = weight.shape[0], x.shape[-1]
    out = empty(*x.shape[:-1], outputs, dtype=torch.float32 if inv is None else torch.int8)
    if inv is None:
        args.y = pointer(out)
    else:
        inv, args.inv_stride = vector("inv", inv, outputs)
        args.inv, args.codes = pointer(inv), pointer(out)
    if out.numel() == 0:
        return out
    x, weight, weight_scale = x.contiguous(), weight.contiguous(), weight_scale.contiguous()
    if x_scale is not None:
        x_scale, args.x_scale_stride = x_scale.contiguous(), int(x_scale.numel() != 1)
    bias = None if bias is None else bias.contiguous()
    args.x, args.weight, args.weight_scale = pointer(x), pointer(weight), pointer(weight_scale)
    args.x_scale, args.bias = pointer(x_scale), pointer(bias)
    args.rows, args.outputs, args.inputs, args.threads = out.numel() // outputs, outputs, inputs, threads()
    call(op, args)
    return out


def _by_panels(
    x: Tensor, real: Callable[[slice], Tensor], weight_scale: Tensor, bias: Tensor | None, inv: Tensor | None
) -> Tensor:
    """The weight-only product of many rows; `real` gives the floats of some weight rows."""
    rows, outputs = x.float().reshape(-1, x.shape[-1]), weight_scale.shape[0]
    y = empty(rows.shape[0], outputs)
    for n in range(0, outputs, PANEL):
        panel = slice(n, n + PANEL)
        torch.mm(rows, real(panel).T, out=y[:, panel])
    y *= weight_scale
    if bias is not None:
        y += bias
    return finish(y.view(*x.shape[:-1], outputs), inv)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    inputs = last_axis("x", x, FLOATS)
    check("weight", weight, FLOATS, -1, inputs)
    if bias is not None:
        check("bias", bias, FLOATS, weight.shape[0])
    if inputs == 0 or x.numel() > FEW_ROWS_OF_FLOATS * inputs or needs_grad(x, weight, bias):
        return reference.linear(x, weight, bias)
    out = empty(*x.shape[:-1], weight.shape[0])
    if out.numel() > 0:
        x, weight = x.to(weight.dtype).float().contiguous(), weight.contiguous()
        bias = None if bias is None else bias.to(weight.dtype).float().contiguous()
        args = LinearArgs(x=pointer(x), weight=pointer(weight), weight_kind=KINDS[weight.dtype], bias=pointer(bias))
        args.rows, args.outputs, args.inputs = out.numel() // weight.shape[0], weight.shape[0], inputs
        args.y, args.threads = pointer(out), threads()
        call("float_linear", args)
    return out.to(weight.dtype)


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    check("x", x, INT8, -1, -1)
    outputs, inputs = check_codes(x, weight)
    acc = empty(x.shape[0], outputs, dtype=torch.int32)
    if acc.numel() == 0 or inputs == 0:
        return acc.zero_()
    x, weight = x.contiguous(), weight.contiguous()
    args = LinearArgs(x=pointer(x), weight=pointer(weight), acc=pointer(acc), threads=threads())
    args.rows, args.outputs, args.inputs = x.shape[0], outputs, inputs
    call("int8_linear", args)
    return acc


def expand_int4(packed: Tensor, group_scale: Tensor, inputs: int) -> Tensor:
    group = check_packed(packed, group_scale, inputs)
    codes = empty(packed.shape[0], inputs, dtype=torch.int8)
    if codes.numel() > 0:
        packed, (group_scale, args) = packed.contiguous(), _int4(group_scale, group)
        args.weight, args.codes, args.threads = pointer(packed), pointer(codes), threads()
        args.outputs, args.inputs = codes.shape
        call("expand_int4", args)
    return codes


def w8a8_linear(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    outputs, inputs = check_codes(x, weight)
    check_epilogue(outputs, weight_scale, bias)
    check_x_scale(x, x_scale)
    if inputs == 0 or needs_grad(x_scale, weight_scale, bias, inv):
        return reference.w8a8_linear(x, x_scale, weight, weight_scale, bias, inv)
    if _by_torch(x.numel() // inputs):
        acc = torch._int_mm(x.reshape(-1, inputs), weight.T)
        return _run("int8_epilogue", x, x_scale, weight, weight_scale, bias, inv, LinearArgs(acc=pointer(acc)))
    return _run("int8_linear", x, x_scale, weight, weight_scale, bias, inv, LinearArgs())


def _by_torch(rows: int) -> bool:
    return rows >= MANY_ROWS and _torch_is_better(library().quamba_cpu_isa())


@functools.cache
def _torch_is_better(isa: bytes) -> bool:
    """Whether torch's int8 product is exact on this machine, extremes included, and faster than ours for many rows."""
    if isa not in (b"avx512", b"avxvnni"):
        return False  # without VNNI it is a plain loop
    random = torch.Generator().manual_seed(0)  # the global one is the user's
    x, weight = (torch.randint(-128, 128, (512, 768), generator=random, device="cpu").to(torch.int8) for _ in range(2))
    x[0], x[1], weight[0], weight[1] = 127, -128, -128, 127

    def seconds(product: Callable[[], Tensor]) -> float:
        runs = []
        for _ in range(4):
            started = time.perf_counter()
            product()
            runs.append(time.perf_counter() - started)
        return min(runs)

    def theirs() -> Tensor:
        return torch._int_mm(x, weight.T)

    def ours() -> Tensor:
        return int8_matmul(x, weight)

    before, listening.to = listening.to, None  # this is no part of what is recorded
    try:
        return torch.equal(theirs(), ours()) and seconds(theirs) < seconds(ours)
    finally:
        listening.to = before


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    inputs = last_axis("x", x, INT8)
    group = check_packed(packed, group_scale, inputs)
    check_sums(inputs)
    check_epilogue(packed.shape[0], weight_scale, bias)
    check_x_scale(x, x_scale)
    if needs_grad(x_scale, weight_scale, group_scale, bias, inv):
        return reference.w4a8_linear(x, x_scale, packed, group_scale, weight_scale, bias, inv)
    group_scale, args = _int4(group_scale, group)
    return _run("int8_linear", x, x_scale, packed, weight_scale, bias, inv, args)


def w8_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None, inv: Tensor | None = None
) -> Tensor:
    inputs = last_axis("x", x, FLOATS)
    check("weight", weight, INT8, -1, inputs)
    check_epilogue(weight.shape[0], weight_scale, bias)
    if inputs == 0 or needs_grad(x, weight_scale, bias, inv):
        return reference.w8_linear(x, weight, weight_scale, bias, inv)
    if inputs > FEW_INPUTS and x.numel() > FEW_ROWS * inputs:
        return _by_panels(x, lambda panel: weight[panel].float(), weight_scale, bias, inv)
    return _run("float_linear", x.float(), None, weight, weight_scale, bias, inv, LinearArgs())


def w4_linear(
    x: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    inputs = last_axis("x", x, FLOATS)
    group = check_packed(packed, group_scale, inputs)
    check_epilogue(packed.shape[0], weight_scale, bias)
    if needs_grad(x, weight_scale, group_scale, bias, inv):
        return reference.w4_linear(x, packed, group_scale, weight_scale, bias, inv)
    if x.numel() > FEW_ROWS * inputs:

        def real(rows: slice) -> Tensor:
            if group_scale.is_floating_point():
                return real_int4(packed[rows], group_scale[rows], inputs)
            return expand_int4(packed[rows], group_scale[rows], inputs).float()

        return _by_panels(x, real, weight_scale, bias, inv)
    group_scale, args = _int4(group_scale, group)
    return _run("float_linear", x.float(), None, packed, weight_scale, bias, inv, args)
