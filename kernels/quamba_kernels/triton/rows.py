"""Ops on rows: quantization, norms, gates. A program takes whole rows where it needs their sums, else a tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import (
    FLOATS,
    FLOATS_OR_INT8,
    check,
    code_scale,
    float_vector,
    last_axis,
    needs_grad,
    vector,
)
from quamba_kernels.triton.common import (
    EXACT,
    as_rows,
    cdiv,
    launch,
    power_of_two,
    silu,
    store_rows,
    tile_rows,
)

MAX_WIDTH = 1 << 15  # entries of a row, or of a norm's group, that a program can hold
TILE = 4096  # entries that a program takes on when it is free to choose


@triton.jit
def _quantize(x, inv, out, rows, width, x_stride, INV_STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """Codes of a tile [R, C] by inv."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    y = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    store_rows(y, row, column, inside, rows, width, out, None, inv, INV_STRIDE)


@triton.jit
def norm_rows(
    x,
    weight,
    inv,
    out,
    scale,
    first,
    rows,
    width,
    x_stride,
    eps,
    INV_STRIDE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """R whole rows from `first` on, in C >= width columns: normalised when there is a weight; written as `store_rows` does."""
    row = first + tl.arange(0, R)
    column = tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    y = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0, cache_modifier=".cg")
    y = y.to(tl.float32)
    if weight is not None:
        w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / width + eps)[:, None] * w[None, :]
    store_rows(y, row, column, inside, rows, width, out, scale, inv, INV_STRIDE)


@triton.jit
def _norm(
    x, weight, inv, out, scale, rows, width, x_stride, eps, INV_STRIDE: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    first = tl.program_id(0).to(tl.int64) * R
    norm_rows(x, weight, inv, out, scale, first, rows, width, x_stride, eps, INV_STRIDE, R, C)


@triton.jit
def gate_units(
    x,
    z,
    z_scale,
    weight,
    out,
    first,
    start,
    units,
    width,
    groups,
    x_stride,
    z_stride,
    eps,
    SCALE_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """R units from `first` on, each the `width` channels of one group of one row, in C columns from `start` on. NORM: "none",
    "before" or "after" the gate; only "none" may see less than a whole unit."""
    unit = first + tl.arange(0, R)
    column = start + tl.arange(0, C)
    inside = (unit < units)[:, None] & (column < width)[None, :]
    row = unit // groups
    channel = (unit % groups * width)[:, None] + column[None, :]
    y = tl.load(x + row[:, None] * x_stride + channel, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    g = tl.load(z + row[:, None] * z_stride + channel, mask=inside, other=0).to(tl.float32)
    if z_scale is not None:
        g = g * tl.load(z_scale + channel * SCALE_STRIDE, mask=inside, other=0.0)
    g = silu(g)
    if NORM != "before":
        y = y * g
    if NORM != "none":
        y = y * tl.rsqrt(tl.sum(y * y, axis=1) / width + eps)[:, None]
        y = y * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    if NORM == "before":
        y = y * g
    tl.store(out + unit[:, None] * width + column[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate(
    x,
    z,
    z_scale,
    weight,
    out,
    units,
    width,
    groups,
    x_stride,
    z_stride,
    eps,
    SCALE_STRIDE: tl.constexpr,
    NORM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    first, start = tl.program_id(0).to(tl.int64) * R, tl.program_id(1) * C
    gate_units(
        x,
        z,
        z_scale,
        weight,
        out,
        first,
        start,
        units,
        width,
        groups,
        x_stride,
        z_stride,
        eps,
        SCALE_STRIDE,
        NORM,
        R,
        C,
    )


def quantize(x: Tensor, inv: Tensor) -> Tensor:
    width = last_axis("x", x, FLOATS, x.device)
    inv, stride = vector("inv", inv, width, x.device)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if out.numel() > 0:
        flat = as_rows(x)
        C = min(power_of_two(width), 1024)
        R = TILE // C
        grid = (cdiv(flat.shape[0], R), cdiv(width, C))
        launch(_quantize, grid, flat, inv, out, flat.shape[0], width, flat.stride(0), stride, R, C, **EXACT)
    return out


def _whole_rows(
    x: Tensor, weight: Tensor | None, inv: Tensor | None, inv_stride: int, out: Tensor, scale: Tensor | None, eps: float
) -> None:
    if out.numel() > 0:
        width, flat = x.shape[-1], as_rows(x)
        C = power_of_two(width)
        R, num_warps = tile_rows(flat.shape[0], C, TILE)
        args = (weight, inv, out, scale, flat.shape[0], width, flat.stride(0), eps, inv_stride, R, C)
        launch(_norm, (cdiv(flat.shape[0], R),), flat, *args, num_warps=num_warps, **EXACT)


def _per_token(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if x.shape[-1] == 0:
        raise ValueError("x: no entries to find a scale for")
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _whole_rows(x, weight, None, 0, codes, scale, eps)
    return codes, scale


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    if last_axis("x", x, FLOATS, x.device) > MAX_WIDTH:
        return reference.quantize_per_token(x)
    return _per_token(x, None, 0.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float, inv: Tensor | None = None) -> Tensor:
    width = last_axis("x", x, FLOATS, x.device)
    check("weight", weight, FLOATS, width, device=x.device)
    inv, stride = (None, 0) if inv is None else vector("inv", inv, width, x.device)
    if width > MAX_WIDTH or needs_grad(x, weight):
        return reference.rms_norm(x, weight, eps, inv)
    out = torch.empty(x.shape, dtype=weight.dtype if inv is None else torch.int8, device=x.device)
    _whole_rows(x, weight.contiguous(), inv, stride, out, None, eps)
    return out


def rms_norm_per_token(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = last_axis("x", x, FLOATS, x.device)
    check("weight", weight, FLOATS, width, device=x.device)
    if width > MAX_WIDTH:
        return reference.rms_norm_per_token(x, weight, eps)
    return _per_token(x, weight.contiguous(), eps)


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
    width = last_axis("x", x, FLOATS, x.device)
    check("z", z, FLOATS_OR_INT8, *x.shape, device=x.device)
    scale, stride = code_scale("z", z, z_scale, width, x.device)
    if groups < 1 or width == 0 or width % groups:
        raise ValueError(f"groups: {width} channels don't split into {groups}")
    w = float_vector("weight", weight, width, x.device)
    if width // groups > MAX_WIDTH or needs_grad(x, z, weight, z_scale):
        return reference.gated_rms_norm(x, z, weight, eps, groups, norm_before_gate, z_scale=z_scale)
    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    if out.numel() > 0:
        C = power_of_two(width // groups)
        _launch_gate(x, z, scale, stride, w, out, groups, eps, "before" if norm_before_gate else "after", C)
    return out


def gate(x: Tensor, z: Tensor, *, z_scale: Tensor | None = None) -> Tensor:
    width = last_axis("x", x, FLOATS, x.device)
    check("z", z, FLOATS_OR_INT8, *x.shape, device=x.device)
    scale, stride = code_scale("z", z, z_scale, width, x.device)
    if needs_grad(x, z, z_scale):
        return reference.gate(x, z, z_scale=z_scale)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if out.numel() > 0:
        _launch_gate(x, z, scale, stride, None, out, 1, 0.0, "none", min(power_of_two(width), 1024))
    return out


def _launch_gate(
    x: Tensor,
    z: Tensor,
    scale: Tensor | None,
    stride: int,
    weight: Tensor | None,
    out: Tensor,
    groups: int,
    eps: float,
    norm: str,
    C: int,
) -> None:
    flat, z, width = as_rows(x), as_rows(z), x.shape[-1] // groups
    units = flat.shape[0] * groups
    R, num_warps = tile_rows(flat.shape[0], C, TILE)
    sizes = (units, width, groups, flat.stride(0), z.stride(0), eps)
    grid = (cdiv(units, R), cdiv(width, C))
    launch(_gate, grid, flat, z, scale, weight, out, *sizes, stride, norm, R, C, num_warps=num_warps, **EXACT)
