"""Rows of a table."""

import torch
from torch import Tensor

from quamba_kernels import reference
from quamba_kernels.checks import FLOAT32, FLOATS, check, needs_grad
from quamba_kernels.cpu.library import KINDS, EmbeddingArgs, call, empty, pointer, threads
from quamba_kernels.reference.int4 import group_size


def embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    check("weight", weight, (*FLOATS, torch.int8, torch.uint8), -1, -1)
    if weight.is_floating_point() != (scale is None):
        raise TypeError("weight and scale: codes come with a scale, floats without one")
    if (weight.dtype == torch.uint8) != (group_scale is not None) or (group_scale is None) != (width is None):
        raise TypeError("weight, group_scale and width: packed codes come with both, any other weight with neither")
    check("ids", ids, (torch.int64, torch.int32), *[-1] * ids.dim())
    if needs_grad(weight, scale, group_scale):
        return reference.embedding(ids, weight, scale, group_scale, width)
    entries = weight.shape[0]
    columns = weight.shape[1] if width is None else width
    args = EmbeddingArgs(entries=entries, width=columns, kind=KINDS.get(weight.dtype, 0), threads=threads())
    if scale is not None:
        check("scale", scale, FLOAT32, entries)
        scale = scale.contiguous()
    if group_scale is not None:
        check("group_scale", group_scale, (torch.int8, torch.float16), entries, -1)
        args.group, args.group_scale_is_float = (
            group_size(weight, group_scale, columns),
            group_scale.is_floating_point(),
        )
        group_scale = (group_scale.float() if group_scale.is_floating_point() else group_scale).contiguous()
    out = empty(*ids.shape, columns, dtype=weight.dtype if scale is None else torch.float32)
    if out.numel() > 0:
        ids, weight = ids.long().contiguous(), weight.contiguous()
        args.ids, args.table, args.y, args.rows = pointer(ids), pointer(weight), pointer(out), ids.numel()
        args.scale, args.group_scale = pointer(scale), pointer(group_scale)
        call("embedding", args)
    return out
