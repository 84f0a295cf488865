"""Rows of a float, int8 or packed int4 table; only those asked for are expanded."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.int4 import real_int4


def embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    group_scale: Tensor | None = None,
    width: int | None = None,
) -> Tensor:
    if weight.is_floating_point() != (scale is None):
        raise TypeError("weight and scale: codes come with a scale, floats without one")
    if (weight.dtype == torch.uint8) != (group_scale is not None) or (group_scale is None) != (width is None):
        raise TypeError("weight, group_scale and width: packed codes come with both, any other weight with neither")
    rows = F.embedding(ids, weight)
    if scale is None:
        return rows
    if group_scale is not None and width is not None:
        groups = group_scale[ids].reshape(-1, group_scale.shape[1])
        rows = real_int4(rows.reshape(-1, weight.shape[1]), groups, width).view(*ids.shape, width)
    return rows.float() * scale[ids].unsqueeze(-1)
