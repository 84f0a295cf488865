"""Rows of a table."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import FLOAT32, FLOATS, check, needs_grad
from quamba_kernels.reference.int4 import group_size
from quamba_kernels.triton.common import EXACT, cdiv, launch, power_of_two

TILE = 1024


@triton.jit
def _embedding(
    ids,
    table,
    scale,
    group_scale,
    out,
    count,
    entries,
    width,
    table_stride,
    groups,
    GROUP: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Columns C of R rows; table int8, or with GROUP > 0 bytes of two int4 codes. A row of an id that is not in the table is
    NaN."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    id = tl.load(ids + row, mask=row < count, other=-1).to(tl.int64)
    known = (id >= 0) & (id < entries)
    inside = known[:, None] & (column < width)[None, :]
    if GROUP == 0:
        y = tl.load(table + id[:, None] * table_stride + column[None, :], mask=inside, other=0).to(tl.float32)
    else:
        HALF: tl.constexpr = GROUP // 2
        group, place = column // GROUP, column % GROUP
        both = tl.load(
            table + id[:, None] * table_stride + (group * HALF + place % HALF)[None, :], mask=inside, other=0
        )
        q = tl.where((place < HALF)[None, :], (both << 4).to(tl.int8) >> 4, both >> 4)
        g = tl.load(group_scale + id[:, None] * groups + group[None, :], mask=inside, other=0)
        y = g.to(tl.float32) * q.to(tl.float32)
    y = y * tl.load(scale + id, mask=known, other=float("nan"))[:, None]
    tl.store(out + row[:, None] * width + column[None, :], y, mask=(row < count)[:, None] & (column < width)[None, :])


def embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    """Of float tables torch's own; an id outside of a table of codes gives a row of NaN."""
    device = ids.device
    check("weight", weight, (*FLOATS, torch.int8, torch.uint8), -1, -1, device=device)
    if weight.is_floating_point() != (scale is None):
        raise TypeError("weight and scale: codes come with a scale, floats without one")
    if (weight.dtype == torch.uint8) != (group_scale is not None) or (group_scale is None) != (width is None):
        raise TypeError("weight, group_scale and width: packed codes come with both, any other weight with neither")
    check("ids", ids, (torch.int64, torch.int32), *[-1] * ids.dim(), device=device)
    if scale is None or needs_grad(scale, group_scale):
        return reference.embedding(ids, weight, scale, group_scale, width)
    entries = weight.shape[0]
    columns = weight.shape[1] if width is None else width
    check("scale", scale, FLOAT32, entries, device=device)
    group = 0
    if group_scale is not None:
        check("group_scale", group_scale, (torch.int8, torch.float16), entries, -1, device=device)
        group, group_scale = group_size(weight, group_scale, columns), group_scale.contiguous()
    out = torch.empty(*ids.shape, columns, dtype=torch.float32, device=device)
    if out.numel() > 0:
        table = (weight if weight.stride(1) == 1 else weight.contiguous()).view(torch.int8)
        groups = 0 if group_scale is None else group_scale.shape[1]
        C = min(power_of_two(columns), TILE)
        R, count = max(1, TILE // C), ids.numel()
        sizes = (count, entries, columns, table.stride(0), groups)
        grid = (cdiv(count, R), cdiv(columns, C))
        launch(
            _embedding,
            grid,
            ids.contiguous(),
            table,
            scale.contiguous(),
            group_scale,
            out,
            *sizes,
            group,
            R,
            C,
            **EXACT,
        )
    return out
