"""Products with weights: a tile [BM, BN] of the result, summed over tiles of BK columns of the weight.

One kernel serves int8, int4 and float weights, codes and floats. A column of the weight is an entry, or a byte with two int4
codes, each expanded to int8 in registers and multiplied with its own column of x. In a recorded token it may also add the
residual, and norm the sum for the next block (see `fusion`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels.checks import vector
from quamba_kernels.triton import interpreting
from quamba_kernels.triton.common import EXACT, as_rows, cdiv, last_to_arrive, launch, processors, to_codes
from quamba_kernels.triton.rows import norm_rows
from quamba_kernels.triton.tiles import choose

TYPES = {torch.int8: tl.int8, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def low(both):
    """The int4 code in the low half of int8 bytes; `both >> 4` is the other."""
    return (both << 4).to(tl.int8) >> 4


@triton.jit
def times_group(q, g, T: tl.constexpr):
    """int4 codes times their group scales as T: exact, or for float scales and int8 rounded half to even and saturated."""
    if g.dtype == tl.int8:
        v = (q * g).to(tl.int8).to(T)
    elif T == tl.int8:  # noqa: SIM300
        v = to_codes(q.to(tl.float32) * g.to(tl.float32), 1.0)
    else:
        v = (q.to(tl.float32) * g.to(tl.float32)).to(T)
    return v


@triton.jit
def finish(
    acc,
    m,
    n,
    rows,
    outputs,
    coded,
    x_scale,
    weight_scale,
    bias,
    inv,
    out,
    rest,
    X_SCALE_STRIDE: tl.constexpr,
    INV_STRIDE: tl.constexpr,
    residual=None,
    total=None,
    residual_stride=0,
):
    """Write the sums of a tile [m, n], scaled and with the bias where there are such: as out's floats or integers, or by inv as
    codes, but for the columns from `coded` on, which go to rest as floats. With total, residual + out goes there."""
    m_inside, n_inside = m < rows, n < outputs
    inside = m_inside[:, None] & n_inside[None, :]
    y = acc
    if weight_scale is not None:
        y = y.to(tl.float32) * tl.load(weight_scale + n, mask=n_inside, other=0.0)[None, :]
    if x_scale is not None:
        y = y * tl.load(x_scale + m * X_SCALE_STRIDE, mask=m_inside, other=0.0)[:, None]
    if bias is not None:
        y = y + tl.load(bias + n, mask=n_inside, other=0.0)[None, :]
    if rest is not None:
        at = m[:, None] * (outputs - coded) + (n - coded)[None, :]
        tl.store(rest + at, y, mask=inside & (n >= coded)[None, :])
    if inv is not None:
        n_coded = n < coded
        v = to_codes(y, tl.load(inv + n * INV_STRIDE, mask=n_coded, other=0.0)[None, :])
        tl.store(out + m[:, None] * coded + n[None, :], v, mask=m_inside[:, None] & n_coded[None, :])
    else:
        v = y.to(out.dtype.element_ty)
        tl.store(out + m[:, None] * outputs + n[None, :], v, mask=inside)
        if total is not None:
            r = tl.load(residual + m[:, None] * residual_stride + n[None, :], mask=inside, other=0.0)
            t = r.to(tl.float32) + v.to(total.dtype.element_ty).to(tl.float32)
            tl.store(total + m[:, None] * outputs + n[None, :], t.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _linear(
    x,
    weight,
    group_scale,
    x_scale,
    weight_scale,
    bias,
    inv,
    out,
    rest,
    parts,
    arrived,
    rows,
    outputs,
    coded,
    inputs,
    columns,
    x_stride,
    w_stride,
    groups,
    row_tiles,
    per_split,
    X_SCALE_STRIDE: tl.constexpr,
    INV_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    T: tl.constexpr,
    SUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    residual=None,
    total=None,
    residual_stride=0,
    norm_weight=None,
    norm_inv=None,
    normed=None,
    norm_scale=None,
    norm_arrived=None,
    eps=0.0,
    NORM_INV_STRIDE: tl.constexpr = 0,
    NORM_COLUMNS: tl.constexpr = 0,
):
    """x [rows, inputs] times weight [outputs, columns].T. GROUP 0: a column is an entry; else the int4 group size. T: what both
    sides become for the product; SUM: int32 or float32. With parts [splits, rows, outputs] each program sums per_split
    columns, and the last one of a tile to arrive, counted in arrived [tiles], adds the parts in their order. Neighbouring
    programs share rows of the weight. With norm_weight and one tile of rows, the last program of all norms their totals."""
    tile = tl.program_id(0)
    m = (tile % row_tiles).to(tl.int64) * BM + tl.arange(0, BM)
    n = (tile // row_tiles).to(tl.int64) * BN + tl.arange(0, BN)
    m_inside, n_inside = (m < rows)[:, None], (n < outputs)[None, :]
    xs, ws = x + m[:, None] * x_stride, weight + n[None, :] * w_stride
    first = tl.program_id(1) * per_split
    last = tl.minimum(first + per_split, columns)
    acc = tl.zeros([BM, BN], SUM)
    if GROUP == 0:
        for start in range(first, last, BK):
            k = start + tl.arange(0, BK)
            a = tl.load(xs + k[None, :], mask=m_inside & (k < last)[None, :], other=0)
            w = tl.load(ws + k[:, None], mask=n_inside & (k < last)[:, None], other=0)
            acc = tl.dot(a.to(T), w.to(T), acc, input_precision="ieee", out_dtype=SUM)
    else:
        HALF: tl.constexpr = GROUP // 2
        for start in range(first, last, BK):
            byte = start + tl.arange(0, BK)
            k = byte // HALF * GROUP + byte % HALF  # of the low code; the high one's is k + HALF
            inside = n_inside & (byte < last)[:, None]
            both = tl.load(ws + byte[:, None], mask=inside, other=0)
            g = tl.load(group_scale + n[None, :] * groups + (byte // HALF)[:, None], mask=inside, other=0)
            a = tl.load(xs + k[None, :], mask=m_inside & (k < inputs)[None, :], other=0).to(T)
            acc = tl.dot(a, times_group(low(both), g, T), acc, input_precision="ieee", out_dtype=SUM)
            a = tl.load(xs + k[None, :] + HALF, mask=m_inside & (k + HALF < inputs)[None, :], other=0).to(T)
            acc = tl.dot(a, times_group(both >> 4, g, T), acc, input_precision="ieee", out_dtype=SUM)
    done = True
    if parts is not None:
        inside, at = m_inside & n_inside, m[:, None] * outputs + n[None, :]
        part = tl.cast(rows, tl.int64) * outputs
        tl.store(parts + tl.program_id(1) * part + at, acc, mask=inside)
        done = last_to_arrive(arrived + tile, tl.num_programs(1))
        if done:
            acc = tl.zeros([BM, BN], SUM)
            for split in range(tl.num_programs(1)):
                acc += tl.load(parts + split * part + at, mask=inside, other=0, cache_modifier=".cg")
    if done:
        finish(
            acc,
            m,
            n,
            rows,
            outputs,
            coded,
            x_scale,
            weight_scale,
            bias,
            inv,
            out,
            rest,
            X_SCALE_STRIDE,
            INV_STRIDE,
            residual,
            total,
            residual_stride,
        )
        if norm_weight is not None:  # noqa: SIM102 (known when compiling)
            if last_to_arrive(norm_arrived, tl.num_programs(0)):
                for row in range(rows):
                    norm_rows(
                        total,
                        norm_weight,
                        norm_inv,
                        normed,
                        norm_scale,
                        tl.cast(row, tl.int64),
                        rows,
                        outputs,
                        outputs,
                        eps,
                        NORM_INV_STRIDE,
                        1,
                        NORM_COLUMNS,
                    )


def splits(tiles: int, columns: int, BK: int, device: torch.device) -> int:
    """How many programs share the sums of a tile: enough for two programs a processor, while each has four blocks to add."""
    return max(1, min(2 * processors(device) // tiles, columns // (4 * BK)))


def work(rows: int, outputs: int, columns: int, dtype: torch.dtype, group: int, device: torch.device) -> tuple:
    """How `_linear` shares out a product: its grid, what it is given for that by name, and the launch options."""
    tile = choose(rows, dtype.itemsize, group > 0, device)
    row_tiles = cdiv(rows, tile.BM)
    tiles = row_tiles * cdiv(outputs, tile.BN)
    per_split = cdiv(cdiv(columns, splits(tiles, columns, tile.BK, device)), tile.BK) * tile.BK
    count = cdiv(columns, per_split)
    parts = arrived = None
    if count > 1:
        total = torch.int32 if dtype == torch.int8 else torch.float32
        parts = torch.empty(count, rows, outputs, dtype=total, device=device)
        arrived = torch.zeros(tiles, dtype=torch.int32, device=device)
    given = {"parts": parts, "arrived": arrived, "row_tiles": row_tiles, "per_split": per_split}
    given |= {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    return (tiles, count), given, {"num_warps": tile.warps, "num_stages": tile.stages}


def product(
    x: Tensor,
    weight: Tensor,
    *,
    dtype: torch.dtype,
    group: int = 0,
    group_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product in `dtype` and its epilogue: in `out_dtype`, or codes with `inv`."""
    outputs, inputs = weight.shape[0], x.shape[-1]
    inv, inv_stride = (None, 0) if inv is None else vector("inv", inv, outputs, x.device)
    out = torch.empty(*x.shape[:-1], outputs, dtype=out_dtype if inv is None else torch.int8, device=x.device)
    if out.numel() == 0:
        return out
    x = as_rows(x)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    group_scale, x_scale, weight_scale, bias = (
        None if t is None else t.contiguous()
        for t in (group_scale, x_scale, weight_scale, None if bias is None else bias.float())
    )
    if dtype == torch.bfloat16 and interpreting():
        dtype = torch.float32  # the interpreter multiplies the bits of bfloat16 as if they were integers
    rows, columns = x.shape[0], weight.shape[1]
    grid, given, options = work(rows, outputs, columns, dtype, group, x.device)
    launch(
        _linear,
        grid,
        x,
        weight=weight,
        group_scale=group_scale,
        x_scale=x_scale,
        weight_scale=weight_scale,
        bias=bias,
        inv=inv,
        out=out,
        rest=None,
        rows=rows,
        outputs=outputs,
        coded=outputs,
        inputs=inputs,
        columns=columns,
        x_stride=x.stride(0),
        w_stride=weight.stride(0),
        groups=0 if group_scale is None else group_scale.shape[1],
        X_SCALE_STRIDE=int(x_scale is not None and x_scale.numel() != 1),
        INV_STRIDE=inv_stride,
        GROUP=group,
        T=TYPES[dtype],
        SUM=tl.int32 if dtype == torch.int8 else tl.float32,
        **given,
        **options,
        **EXACT,
    )
    return out
