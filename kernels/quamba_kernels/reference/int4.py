"""int4 weights: a scale for each row, another for each of its groups of inputs, two codes in a byte."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.linear import w8a8_linear
from quamba_kernels.reference.rounding import finish

GROUPS = (32, 64, 128)


def check_group(group: int) -> None:
    if group not in GROUPS:
        raise ValueError(f"group: {group} is not one of {', '.join(map(str, GROUPS))}")


def group_size(packed: Tensor, group_scale: Tensor, inputs: int) -> int:
    """The group size that the shapes of a packed weight and its group scales imply; ValueError when they don't fit."""
    groups = group_scale.shape[-1]
    group = 2 * packed.shape[-1] // max(groups, 1)
    if group not in GROUPS or groups * group != 2 * packed.shape[-1] or groups != -(-inputs // group):
        raise ValueError(
            f"group_scale: {groups} groups don't fit {packed.shape[-1]} bytes a row and {inputs} inputs: "
            f"a group has {', '.join(map(str, GROUPS))} codes, the last may be padded"
        )
    return group


def pack_int4(codes: Tensor, group: int) -> Tensor:
    check_group(group)
    if codes.dtype != torch.int8:
        raise TypeError(f"codes: expected int8, got {codes.dtype}")
    if codes.numel() > 0 and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"codes: int4 holds -8 to 7, these go from {int(codes.min())} to {int(codes.max())}")
    inputs = codes.shape[1]
    padded = F.pad(codes, (0, -inputs % group)).unflatten(1, (-(-inputs // group), 2, group // 2))
    return ((padded[:, :, 0] & 15) | (padded[:, :, 1] << 4)).flatten(1).view(torch.uint8)


def unpack_int4(packed: Tensor, inputs: int, group: int) -> Tensor:
    check_group(group)
    if packed.shape[1] != -(-inputs // group) * group // 2:
        raise ValueError(f"packed: {packed.shape[1]} bytes a row don't hold {inputs} inputs in groups of {group}")
    return _codes(packed, group).flatten(1)[:, :inputs].contiguous()


def expand_int4(packed: Tensor, group_scale: Tensor, inputs: int) -> Tensor:
    codes = _codes(packed, group_size(packed, group_scale, inputs))
    if group_scale.is_floating_point():
        codes = (codes.float() * group_scale.float().unsqueeze(-1)).round_().clamp_(-128, 127).to(torch.int8)
    else:
        codes = codes * group_scale.unsqueeze(-1)
    return codes.flatten(1)[:, :inputs].contiguous()


def w4a8_linear(
    x: Tensor,
    x_scale: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    return w8a8_linear(x, x_scale, expand_int4(packed, group_scale, x.shape[-1]), weight_scale, bias, inv)


def w4_linear(
    x: Tensor,
    packed: Tensor,
    group_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    y = (x.float() @ real_int4(packed, group_scale, x.shape[-1]).T) * weight_scale
    return finish(y if bias is None else y + bias, inv)


def real_int4(packed: Tensor, group_scale: Tensor, inputs: int) -> Tensor:
    """`q * g` as float32 `[N, K]`, exact."""
    codes = _codes(packed, group_size(packed, group_scale, inputs)).float()
    return codes.mul_(group_scale.float().unsqueeze(-1)).flatten(1)[:, :inputs]


def _codes(packed: Tensor, group: int) -> Tensor:
    """`[N, groups, group]` int8, with the padding."""
    both = packed.view(torch.int8).unflatten(1, (2 * packed.shape[1] // group, group // 2))
    return torch.cat([(both << 4) >> 4, both >> 4], dim=-1)
