"""Ops on rows of floats: quantization, norms, Hadamard transform."""

import ctypes

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import (
    FLOAT32,
    FLOATS,
    FLOATS_OR_INT8,
    check,
    code_scale,
    float_vector,
    last_axis,
    needs_grad,
    vector,
)
from quamba_kernels.cpu.library import GatedNormArgs, RowsArgs, call, empty, pointer, threads, tokens


def _call(op: str, x: Tensor, args: ctypes.Structure) -> None:
    if x.numel() > 0:
        width = x.shape[-1]
        x = x.float().contiguous()
        args.x, args.rows, args.width, args.threads = pointer(x), x.numel() // width, width, threads()
        call(op, args)


def _run(op: str, x: Tensor, width: int, inv: Tensor | None, args: ctypes.Structure) -> Tensor:
    """float32, or int8 codes with `inv`."""
    out = empty(*x.shape, dtype=torch.float32 if inv is None else torch.int8)
    if inv is not None:
        inv, args.inv_stride = vector("inv", inv, width)
        args.inv, args.codes = pointer(inv), pointer(out)
    else:
        args.y = pointer(out)
    _call(op, x, args)
    return out


def _per_token(op: str, x: Tensor, width: int, args: ctypes.Structure) -> tuple[Tensor, Tensor]:
    """int8 codes and their scales."""
    if width == 0:
        raise ValueError("x: no entries to find a scale for")
    codes, scale = empty(*x.shape, dtype=torch.int8), empty(*x.shape[:-1], 1)
    args.codes, args.scale = pointer(codes), pointer(scale)
    _call(op, x, args)
    return codes, scale


def quantize(x: Tensor, inv: Tensor) -> Tensor:
    width = last_axis("x", x, FLOATS)
    return _run("quantize", x, width, inv, RowsArgs())


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    return _per_token("quantize", x, last_axis("x", x, FLOATS), RowsArgs())


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv: Tensor | None = None) -> Tensor:
    width = last_axis("x", x, FLOATS)
    if needs_grad(x, weight):
        return reference.rms_norm(x, weight, eps, inv)
    w = float_vector("weight", weight, width)
    out = _run("rms_norm", x, width, inv, RowsArgs(weight=pointer(w), eps=eps))
    return out if inv is not None else out.to(weight.dtype)


def rms_norm_per_token(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = last_axis("x", x, FLOATS)
    w = float_vector("weight", weight, width)
    return _per_token("rms_norm", x, width, RowsArgs(weight=pointer(w), eps=eps))


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int = 1,
    norm_before_gate: bool = False,
    *,
    z_scale: Tensor | None = None,
) -> Tensor:
    width = last_axis("x", x, FLOATS)
    check("z", z, FLOATS_OR_INT8, *x.shape)
    scale, stride = code_scale("z", z, z_scale, width)
    if groups < 1 or width == 0 or width % groups:
        raise ValueError(f"groups: {width} channels don't split into {groups}")
    if needs_grad(x, z, weight, z_scale):
        return reference.gated_rms_norm(x, z, weight, eps, groups, norm_before_gate, z_scale=z_scale)
    w, out = float_vector("weight", weight, width), empty(*x.shape)
    if out.numel() > 0:
        args = GatedNormArgs(weight=pointer(w), eps=eps, groups=groups, norm_before_gate=norm_before_gate)
        _gate(x, z, scale, stride, out, args)
    return out.to(weight.dtype)


def gate(x: Tensor, z: Tensor, *, z_scale: Tensor | None = None) -> Tensor:
    width = last_axis("x", x, FLOATS)
    check("z", z, FLOATS_OR_INT8, *x.shape)
    scale, stride = code_scale("z", z, z_scale, width)
    if needs_grad(x, z, z_scale):
        return reference.gate(x, z, z_scale=z_scale)
    out = empty(*x.shape)
    if out.numel() > 0:
        _gate(x, z, scale, stride, out, GatedNormArgs(groups=1))
    return out


def _gate(x: Tensor, z: Tensor, scale: Tensor | None, stride: int, out: Tensor, args: ctypes.Structure) -> None:
    width = x.shape[-1]
    x, z = tokens(x.reshape(-1, width)), tokens(z.reshape(-1, width))
    args.x, args.x_row_stride, args.z, args.z_row_stride = pointer(x), x.stride(0), pointer(z), z.stride(0)
    args.z_is_int8, args.z_scale, args.z_scale_stride = z.dtype == torch.int8, pointer(scale), stride
    args.y, args.rows, args.width, args.threads = pointer(out), x.shape[0], width, threads()
    call("gated_rms_norm", args)


def hadamard(x: Tensor, outer: Tensor | None, blocks: int = 1, inv: Tensor | None = None) -> Tensor:
    width, outer, args = _transform(x, outer, blocks)
    if needs_grad(x):
        return reference.hadamard(x, outer, blocks, inv)
    out = _run("hadamard", x, width, inv, args)
    return out if inv is not None else out.to(x.dtype)


def hadamard_per_token(x: Tensor, outer: Tensor | None, blocks: int = 1) -> tuple[Tensor, Tensor]:
    width, outer, args = _transform(x, outer, blocks)
    return _per_token("hadamard", x, width, args)


def _transform(x: Tensor, outer: Tensor | None, blocks: int) -> tuple[int, Tensor | None, ctypes.Structure]:
    """The width, and the outer matrix, to be kept alive during the call, with arguments that point there."""
    width = last_axis("x", x, FLOATS)
    order = 1
    if outer is not None:
        order = last_axis("outer", outer, FLOAT32)
        check("outer", outer, FLOAT32, order, order)
        outer = outer.contiguous()
        if order == 0:
            raise ValueError("outer: has no entries")
    if blocks < 1 or width == 0 or width % (blocks * order) or (power := width // (blocks * order)) & (power - 1):
        raise ValueError(f"x: {width} entries aren't {blocks} blocks of {order} times a power of two")
    return width, outer, RowsArgs(weight=pointer(outer), blocks=blocks, order=order)
