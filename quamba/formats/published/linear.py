"""The published Quamba's linear layers, of every class, as ours."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.published import packed
from quamba.formats.published.source import FLOAT, Alias, Source
from quamba.plan import WeightSpec

INT8, INT8_SPLIT = WeightSpec(8, "tensor"), WeightSpec(8, "split")
INT4 = WeightSpec(4, group=packed.GROUP, group_scale="float")
INTEGER = ("W8A8", "W4A8")  # the precisions whose input is integer
_PADDING = {"W8A8": 16, "W4A8": 64, "W4A16": 256}  # outputs are padded to a multiple of it


def precision(source: Source, theirs: str) -> str:
    """W8A8, W4A8, W4A16 or float, from the layer's own tensors."""
    weight = source.entry(f"{theirs}.weight")
    if weight.dtype == torch.int8 and len(weight.shape) == 2:
        source.entry(f"{theirs}.b")
        return "W8A8"
    if weight.dtype == torch.int32 and len(weight.shape) == 2:
        if any(source.has(f"{theirs}.{name}") for name in ("s_channel", "s_group", "input_scale")):
            return "W4A8"
        if source.has(f"{theirs}.scale"):
            return "W4A16"
        raise CheckpointError(
            f"{theirs} has packed int4 codes, and neither s_group and s_channel, as W4A8, nor scale, as W4A16"
        )
    if weight.dtype.is_floating_point and len(weight.shape) == 2:
        return "float"
    raise CheckpointError(f"{theirs}.weight is of no published class: {weight.dtype} of shape {list(weight.shape)}")


def inputs_of(source: Source, theirs: str) -> int:
    kind, shape = precision(source, theirs), source.entry(f"{theirs}.weight").shape
    return shape[1] if kind == "float" else shape[0] * (1 if kind == "W8A8" else 16)


def input_alias(source: Source, theirs: str, out: float = 1.0) -> Alias:
    """Where an integer layer keeps its input's scale. out: its output's, if that is one integer scale."""
    if precision(source, theirs) == "W4A8":
        return f"{theirs}.input_scale", 1.0
    split = source.has(f"{theirs}.b") and source.entry(f"{theirs}.b").shape[-1] != 1
    return f"{theirs}.a", 1.0 if split else out  # `a` is the input's over the output's, unless `b` has the output's


def read_linear(
    source: Source, ours: str, theirs: str, inputs: int, outputs: int, out: Tensor | None = None
) -> WeightSpec:
    """Add one layer to the view. out `[]` or `[outputs]`: static scales of its integer output, which the file divides its
    weight scales by."""
    kind = precision(source, theirs)
    scale = torch.ones(()) if out is None else out
    if kind == "float":
        source.copy(f"{ours}.weight", f"{theirs}.weight", outputs, inputs)
        return WeightSpec()
    padded = -(-outputs // _PADDING[kind]) * _PADDING[kind]
    source.known(f"{theirs}.workspace", f"{theirs}.alpha")
    if kind == "W8A8":
        return _int8(source, ours, theirs, inputs, outputs, padded, scale)
    if inputs % packed.GROUP:
        raise CheckpointError(f"{theirs} has {inputs} inputs, which are no groups of {packed.GROUP}")
    groups, words = f"{theirs}.{'s_group' if kind == 'W4A8' else 'scale'}", f"{theirs}.weight"
    source.expect(words, torch.int32, inputs // 16, 2 * padded)
    source.expect(groups, FLOAT, inputs // packed.GROUP, padded)
    if kind == "W4A16":
        source.constant(f"{ours}.weight_scale", torch.ones(outputs))
    else:
        channels = packed.channel_scales(source.values(f"{theirs}.s_channel", 1, padded), outputs)
        source.constant(f"{ours}.weight_scale", source.rows(f"{theirs}.s_channel", channels) * scale)
        if source.exact:
            codes = lambda w, s: packed.int8_codes(w, s, outputs)  # noqa: E731
            source.make(f"{ours}.weight", (outputs, inputs), torch.int8, codes, words, groups)
            return WeightSpec(8)
    repack = lambda w: packed.repack(w, kind, outputs)  # noqa: E731
    unpermute = lambda s: packed.group_scales(s, outputs)  # noqa: E731
    source.make(f"{ours}.weight_packed", (outputs, inputs // 2), torch.uint8, repack, words)
    source.make(f"{ours}.weight_group_scale", (outputs, inputs // packed.GROUP), torch.float16, unpermute, groups)
    return INT4


def _int8(source: Source, ours: str, theirs: str, inputs: int, outputs: int, padded: int, out: Tensor) -> WeightSpec:
    """A transposed view of the codes, and `b`: their scale, or for each output its scale over the output's."""
    source.expect(f"{theirs}.weight", torch.int8, inputs, padded)
    turned = lambda weight: weight.reshape(inputs, padded)[:, :outputs].T.contiguous()  # noqa: E731
    source.make(f"{ours}.weight", (outputs, inputs), torch.int8, turned, f"{theirs}.weight")
    b = f"{theirs}.b"
    if source.entry(b).shape[-1] != 1:
        scales = source.rows(b, source.values(b, 1, padded)[:outputs])
        source.constant(f"{ours}.weight_scale", scales * out)
        return INT8_SPLIT
    scale = source.one(b)
    source.constant(f"{ours}.weight_scale", torch.tensor(scale))
    if source.has(f"{theirs}.alpha") and source.has(f"{theirs}.a"):
        source.scale(f"{theirs}.alpha", (f"{theirs}.a", scale))
    return INT8
