"""The Hadamard transform of rows: the outer matrix entry by entry, the power of two by butterflies."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import FLOAT32, FLOATS, check, last_axis, needs_grad, vector
from quamba_kernels.triton.common import FUSED, as_rows, cdiv, launch, power_of_two, store_rows, tile_rows
from quamba_kernels.triton.tiles import shared_memory

MAX_ENTRIES = (
    1 << 15
)  # of a row, its axes rounded up to powers of two, that a program can hold, and its shared memory has to
TILE = 4096


@triton.jit
def hadamard_rows(
    x,
    outer,
    inv,
    out,
    scale,
    first,
    rows,
    width,
    x_stride,
    factor,
    blocks,
    order,
    INV_STRIDE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    LOG2_P: tl.constexpr,
):
    """R rows from `first` on, of B >= blocks blocks, each M >= order runs of P entries; `(outer ⊗ H_P) * factor` on every
    block; written as `store_rows` does."""
    U: tl.constexpr = R * B
    unit = tl.arange(0, U)
    row = first + unit // B
    inside = (row < rows) & (unit % B < blocks)
    start = row * x_stride + unit % B * (order * P)
    p = tl.arange(0, P)

    # 1. outer ⊗ I: y[m] = sum over j of outer[m, j] * x[j], for runs of P entries.
    if outer is None:
        y = tl.load(x + start[:, None] + p[None, :], mask=inside[:, None], other=0.0, cache_modifier=".cg").to(
            tl.float32
        )
    else:
        m = tl.arange(0, M)
        y3 = tl.zeros([U, M, P], tl.float32)
        for j in range(order):
            part = tl.load(
                x + start[:, None] + j * P + p[None, :], mask=inside[:, None], other=0.0, cache_modifier=".cg"
            ).to(tl.float32)
            column = tl.load(outer + m * order + j, mask=m < order, other=0.0)
            y3 += column[None, :, None] * part[:, None, :]
        y = tl.reshape(y3, [U * M, P])

    # 2. I ⊗ H_P: a butterfly on the lowest bit of the index, which then becomes the highest; after log2(P) turns every bit
    # has had its butterfly and is back in its place.
    for _ in tl.static_range(LOG2_P):
        a, b = tl.split(tl.reshape(y, [U * M, P // 2, 2]))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [U * M, P])

    # 3. Scale and write. `tl.arange` takes powers of two only, hence the gaps in the columns.
    entry = tl.arange(0, B * M * P)
    block, run = entry // (M * P), entry // P % M
    column = (block * order + run) * P + entry % P
    row = first + tl.arange(0, R)
    valid = (row < rows)[:, None] & ((block < blocks) & (run < order))[None, :]
    y = tl.reshape(y, [R, B * M * P]) * factor
    store_rows(y, row, column, valid, rows, width, out, scale, inv, INV_STRIDE)


@triton.jit
def _hadamard(
    x,
    outer,
    inv,
    out,
    scale,
    rows,
    width,
    x_stride,
    factor,
    blocks,
    order,
    INV_STRIDE: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    P: tl.constexpr,
    LOG2_P: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * R
    hadamard_rows(
        x, outer, inv, out, scale, first, rows, width, x_stride, factor, blocks, order, INV_STRIDE, R, B, M, P, LOG2_P
    )


def hadamard(x: Tensor, outer: Tensor | None, blocks: int = 1, inv: Tensor | None = None) -> Tensor:
    width, order = _sizes(x, outer, blocks)
    inv, stride = (None, 0) if inv is None else vector("inv", inv, width, x.device)
    if needs_grad(x) or not _fits(width, order, blocks, x.device):
        return reference.hadamard(x, outer, blocks, inv)
    out = torch.empty(x.shape, dtype=x.dtype if inv is None else torch.int8, device=x.device)
    _run(x, outer, order, blocks, inv, stride, out, None)
    return out


def hadamard_per_token(x: Tensor, outer: Tensor | None, blocks: int = 1) -> tuple[Tensor, Tensor]:
    width, order = _sizes(x, outer, blocks)
    if not _fits(width, order, blocks, x.device):
        return reference.hadamard_per_token(x, outer, blocks)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    _run(x, outer, order, blocks, None, 0, codes, scale)
    return codes, scale


def _sizes(x: Tensor, outer: Tensor | None, blocks: int) -> tuple[int, int]:
    """Width and the outer matrix's order, checked."""
    width, order = last_axis("x", x, FLOATS, x.device), 1
    if outer is not None:
        check("outer", outer, FLOAT32, outer.shape[0], outer.shape[0], device=x.device)
        order = outer.shape[0]
    if blocks < 1 or width == 0 or width % (blocks * order) or (power := width // (blocks * order)) & (power - 1):
        raise ValueError(f"x: {width} entries aren't {blocks} blocks of {order} times a power of two")
    return width, order


def _fits(width: int, order: int, blocks: int, device: torch.device) -> bool:
    entries = power_of_two(blocks) * power_of_two(order) * (width // (blocks * order))
    return entries <= min(MAX_ENTRIES, shared_memory(device) // 4)


def _run(
    x: Tensor,
    outer: Tensor | None,
    order: int,
    blocks: int,
    inv: Tensor | None,
    inv_stride: int,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    if out.numel() == 0:
        return
    width, flat = x.shape[-1], as_rows(x)
    power = width // (blocks * order)
    B, M = power_of_two(blocks), power_of_two(order)
    rows, factor = flat.shape[0], (order * power) ** -0.5
    R, num_warps = tile_rows(rows, B * M * power, TILE)
    outer = None if outer is None else outer.contiguous()
    sizes = (rows, width, flat.stride(0), factor, blocks, order)
    shape = (inv_stride, R, B, M, power, power.bit_length() - 1)
    launch(
        _hadamard,
        (cdiv(rows, R),),
        flat,
        outer,
        inv,
        out,
        scale,
        *sizes,
        *shape,
        num_warps=num_warps,
        **FUSED,
    )
