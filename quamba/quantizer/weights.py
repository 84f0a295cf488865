"""Float weights to integers, each to its nearest code.

int8: codes in [-127, 127] times a scale of the row, of the part of the output that it lies in, or of the whole matrix.
int4: codes in [-8, 7] times a row scale times a group factor; a group is a run of `spec.group` inputs of one row.

Scales come from the largest magnitude ("absmax") or by "search": the candidate with the least squared error, which
`importance`, the mean square of each input, may weigh. Factors may be negative, so that -8 can serve either end of a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import quamba_kernels as kernels
from quamba.plan import MULTIPLIER, WeightSpec

RANGES = {8: (-127, 127), 4: (-8, 7)}
"""Smallest and largest code by bits."""

REACH = 7.5
"""A group's largest magnitude in steps, by absmax: nothing errs by more than half a step, whatever its sign."""

GROUP_REACH = tuple(step / 4 for step in range(26, 49))
"""Candidates for it where group scales are float; more suits large groups, whose largest magnitude stands out."""

ROW_REACH = (REACH * MULTIPLIER, 120.0, 128.0, 136.0)
"""Candidates for a row's largest magnitude in row scales, where group factors are integers; the first is absmax's."""

RATIOS = tuple(1 - step / 20 for step in range(11))
"""Candidates for the largest magnitude that int8 codes reach, as a share of the largest there is."""

CHUNK = 1 << 19
"""Weights searched at once: a few MiB, which stay in the cache."""


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    spec: WeightSpec,
    *,
    splits: Sequence[int] | None = None,
    clip: str = "search",
    importance: Tensor | None = None,
) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, float `[out, ...]`, under the suffixes that artifacts use.

    bits 8: `weight` int8 of the same shape; `weight_scale` float32 `[out]`, or 0-d with axis tensor.
    bits 4: `weight_packed` uint8; `weight_scale` float32 `[out]`; `weight_group_scale` int8 or float16 `[out, groups]`.

    splits: rows of each part, for axis split. clip: "search" or "absmax". importance: nonnegative `[in]`.
    Zeros stay zeros, with finite scales. Raises ValueError for arguments that don't fit each other.
    """
    if spec.is_float:
        raise ValueError("spec: 16 bits are no integers")
    rows = weight.flatten(1)
    if spec.bits == 8:
        scale = int8_scale(rows, spec, splits, clip, importance)
        codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        for part in chunks(rows):
            codes[part] = round_codes(rows[part].float(), scale[part, None], 8).to(torch.int8)
        return store_int8(codes.view(weight.shape), scale, spec)
    row_scale, factor = int4_scales(rows, spec, clip, importance)
    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    for part in chunks(rows):
        step = (row_scale[part, None] * factor[part]).repeat_interleave(spec.group, 1)[:, : rows.shape[1]]
        codes[part] = round_codes(rows[part].float(), step, 4).to(torch.int8)
    return store_int4(codes, row_scale, factor, spec)


def dequantize_weight(tensors: dict[str, Tensor], spec: WeightSpec, inputs: int) -> Tensor:
    """The real weight, float32 `[out, in]`, that `quantize_weight`'s tensors stand for."""
    scale = tensors["weight_scale"].reshape(-1, 1)
    if spec.bits == 8:
        return tensors["weight"].float().flatten(1) * scale
    codes = kernels.unpack_int4(tensors["weight_packed"], inputs, spec.group).float()
    return codes.mul_(tensors["weight_group_scale"].float().repeat_interleave(spec.group, 1)[:, :inputs]) * scale


def round_codes(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes, still float: the multiple of `step` nearest to each weight, half to even, saturating."""
    return (weight / step).round_().clamp_(*RANGES[bits])


def squared_error(weight: Tensor, step: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """What rounding with `step` `[...]` loses in each run `[..., run]` of weights: the sum of squares, weighed by
    `importance`, which broadcasts against `weight`."""
    step = step.unsqueeze(-1)
    codes = round_codes(weight, step, bits)
    error = torch.addcmul(weight, codes, step, value=-1, out=codes).square_()
    return (error if importance is None else error.mul_(importance)).sum(-1)


def chunks(rows: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about CHUNK weights each."""
    height = max(1, CHUNK // max(rows.shape[1], 1))
    return (slice(start, start + height) for start in range(0, rows.shape[0], height))


def nonzero(scale: Tensor) -> Tensor:
    """Scales one can divide by: 1 for 0, and none so small that its inverse overflows."""
    return torch.where(scale > 0, scale, 1.0).clamp_(min=torch.finfo(torch.float32).tiny)


def int8_scale(
    rows: Tensor, spec: WeightSpec, splits: Sequence[int] | None, clip: str, importance: Tensor | None
) -> Tensor:
    """float32 `[out]`, equal in the rows that share a scale by `spec.axis`."""
    part = _parts(rows, spec, splits)
    absmax = torch.cat([rows[c].abs().amax(1).float() for c in chunks(rows)])
    absmax = torch.zeros_like(absmax).scatter_reduce_(0, part, absmax, "amax")[part]
    if not _searches(clip):
        return nonzero(absmax / 127)
    candidates = torch.stack([nonzero(absmax * ratio / 127) for ratio in RATIOS], dim=1)
    weigh = None if importance is None else weighing(importance, rows, rows.shape[1])
    error = torch.cat(
        [
            torch.stack([squared_error(rows[c].float(), step, 8, weigh) for step in candidates[c].unbind(1)], dim=1)
            for c in chunks(rows)
        ]
    )
    total = torch.zeros_like(error, dtype=torch.float64).index_add_(0, part, error.double())
    best = total.argmin(dim=1)[part]  # the first, so the largest scale, of equals
    return candidates.gather(1, best[:, None])[:, 0]


def int4_scales(rows: Tensor, spec: WeightSpec, clip: str, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Row scales float32 `[out]` (1 where group scales are float) and group factors float32 `[out, groups]`; a group's step
    is their product."""
    searched = _searches(clip)
    weigh = None if importance is None else weighing(importance, rows, spec.group)
    found = []
    for part in chunks(rows):
        groups = grouped(rows[part].float(), spec.group)
        absmax = groups.abs().amax((1, 2))
        if spec.group_scale == "float":
            candidates = [torch.ones_like(absmax)]
        else:
            candidates = [nonzero(absmax / reach) for reach in (ROW_REACH if searched else ROW_REACH[:1])]
        best, factor, least = candidates[0], *group_factors(groups, candidates[0], spec, clip, weigh)
        for other in candidates[1:]:
            its_factor, error = group_factors(groups, other, spec, clip, weigh)
            better = error.sum(1) < least.sum(1)
            best = torch.where(better, other, best)
            factor = torch.where(better[:, None], its_factor, factor)
            least = torch.where(better[:, None], error, least)
        found.append((best, factor))
    return torch.cat([scale for scale, _ in found]), torch.cat([factor for _, factor in found])


def group_factors(
    groups: Tensor, row_scale: Tensor, spec: WeightSpec, clip: str, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Factor and squared error of each group, float32 `[out, groups]`, of weights `[out, groups, group]` whose rows have
    `row_scale` `[out]`; importance `[groups, group]`. Where a group is zero, or its errors are, it has absmax's factor."""
    absmax = groups.abs().amax(-1)
    if spec.group_scale == "float":
        best = nonzero(absmax / REACH)
        others: Iterable[Tensor] = (sign * nonzero(absmax / reach) for reach in GROUP_REACH for sign in (1, -1))
    else:
        best = (absmax / (REACH * row_scale[:, None])).ceil_().clamp_(1, MULTIPLIER)
        integers = torch.arange(1.0, MULTIPLIER + 1, device=groups.device)
        others = torch.cat([integers, -integers]).unbind()
    least = squared_error(groups, row_scale[:, None] * best, 4, importance)
    for factor in others if _searches(clip) else ():
        error = squared_error(groups, (row_scale[:, None] * factor).expand_as(absmax), 4, importance)
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    return best, least


def grouped(rows: Tensor, group: int) -> Tensor:
    """`[..., in]` as `[..., groups, group]`, the last group padded with zeros."""
    return F.pad(rows, (0, -rows.shape[-1] % group)).unflatten(-1, (-1, group))


def weighing(importance: Tensor, rows: Tensor, group: int) -> Tensor:
    """Nonnegative importance `[in]` as float32 `[groups, group]` on the device of `rows` `[out, in]`, 1 at its largest."""
    if importance.shape != rows.shape[1:]:
        raise ValueError(f"importance: {list(importance.shape)} doesn't fit {rows.shape[1]} inputs")
    largest = importance.amax()
    return grouped((importance / torch.where(largest > 0, largest, 1.0)).to(rows.device, torch.float32), group)


def store_int8(codes: Tensor, scale: Tensor, spec: WeightSpec) -> dict[str, Tensor]:
    """codes int8 `[out, ...]`, scale float32 `[out]`."""
    return {"weight": codes, "weight_scale": scale[0].clone() if spec.axis == "tensor" else scale}


def store_int4(codes: Tensor, row_scale: Tensor, factor: Tensor, spec: WeightSpec) -> dict[str, Tensor]:
    """codes int8 `[out, in]`; row_scale `[out]` and factor `[out, groups]` as in `int4_scales`.

    Float factors are stored in two levels, so that `rint(code * weight_group_scale)` is an int8 weight with
    `weight_scale` (QQQ, arXiv 2406.09904): the largest magnitude of a row is 127 row scales.
    """
    group_scale = factor.to(torch.int8)
    if spec.group_scale == "float":
        largest = grouped(codes, spec.group).abs().amax(-1) * factor.abs()
        row_scale = nonzero(largest.amax(1) / 127)
        # Where all codes are zero, any scale will do.
        group_scale = torch.where(largest > 0, factor / row_scale[:, None], 1.0).to(torch.float16)
    packed = kernels.pack_int4(codes, spec.group)
    return {"weight_packed": packed, "weight_scale": row_scale, "weight_group_scale": group_scale}


def _searches(clip: str) -> bool:
    if clip not in ("search", "absmax"):
        raise ValueError(f"clip: {clip!r} is neither search nor absmax")
    return clip == "search"


def _parts(rows: Tensor, spec: WeightSpec, splits: Sequence[int] | None) -> Tensor:
    """int64 `[out]`: rows with the same number share a scale."""
    outputs, device = rows.shape[0], rows.device
    if spec.axis == "channel":
        return torch.arange(outputs, device=device)
    if spec.axis == "tensor":
        return torch.zeros(outputs, dtype=torch.int64, device=device)
    if splits is None or sum(splits) != outputs:
        raise ValueError(f"splits: {splits} doesn't divide {outputs} outputs")
    return torch.arange(len(splits), device=device).repeat_interleave(torch.tensor(splits, device=device))
