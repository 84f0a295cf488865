"""One published file on one side, our view of it on the other: scales that must agree, and linears of every class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.published import packed
from quamba.formats.repairs import Repairs
from quamba.formats.tensors import Tensors, View
from quamba.plan import SiteSpec, WeightSpec

STATIC, TOKEN = SiteSpec(8, "static"), SiteSpec(8, "token")
INT8, INT8_SPLIT = WeightSpec(8, "tensor"), WeightSpec(8, "split")
INT4 = WeightSpec(4, group=packed.GROUP, group_scale="float")


class Source:
    """The published file on one side, our view of it on the other."""

    def __init__(self, files: Tensors, view: View, repairs: Repairs, exact: bool):
        self.files, self.view, self.repairs, self.exact = files, view, repairs, exact
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return name in self.files.entries

    def entry(self, name: str) -> Any:
        if name not in self.files.entries:
            raise CheckpointError(f"tensors are missing: {name}")
        self.used.add(name)
        return self.files.entries[name]

    def values(self, name: str) -> Tensor:
        """A small tensor, flat, float32."""
        self.entry(name)
        return self.files.read([name])[name].float().flatten()

    def scale(self, *names: str) -> float:
        """One static scale that the file keeps under several names, which must agree."""
        found = {name: float(self.values(name)) for name in names if self.has(name)}
        if not found:
            raise CheckpointError(
                f"a static scale is missing, and nothing else in the file has it: {' or '.join(names)}"
            )
        first, *others = found.items()
        for name, value in others:
            if abs(value - first[1]) > 1e-3 * abs(first[1]):
                raise CheckpointError(
                    f"two scales that must agree differ: {first[0]} = {first[1]:g}, {name} = {value:g}"
                )
        if first[0] != names[0]:
            self.repairs.add(
                f"{_suffix(names[0])} is missing; {_suffix(first[0])} is the same number",
                "they are one scale",
                names[0],
            )
        if not 0 < first[1] < 1e6:
            raise CheckpointError(f"{first[0]} = {first[1]:g} can't be a scale")
        return first[1]

    def same(self, name: str, twin: str) -> None:
        """A tensor that the file may keep twice; the twin must agree."""
        if self.has(twin):
            a, b = self.values(name), self.values(twin)
            if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-3, atol=0):
                raise CheckpointError(f"two tensors that must agree differ: {name} and {twin}")

    def copy(self, ours: str, theirs: str) -> None:
        self.entry(theirs)
        self.view.add(ours, theirs)

    def make(
        self, ours: str, shape: tuple[int, ...], dtype: torch.dtype, function: Callable[..., Tensor], *theirs: str
    ):
        for name in theirs:
            self.entry(name)
        self.view.make(ours, shape, dtype, function, *theirs)

    def constant(self, ours: str, value: Tensor) -> None:
        self.make(ours, tuple(value.shape), value.dtype, lambda: value)

    def warn_of_strangers(self) -> None:
        """Kernel scratch and redundant products of scales are part of the format; anything else is named."""
        for name in self.files.entries.keys() - self.used:
            if not name.endswith((".workspace", ".alpha", ".a", ".b", ".input_scale", ".output_scale")):
                self.repairs.add(
                    "tensors that the published format doesn't have are ignored", "no block could read them", name
                )

    def linear(self, ours: str, theirs: str, outputs: int, out: Tensor | None = None) -> WeightSpec:
        """A linear of any class as ours. out `[]` or `[outputs]`: static scales of its integer output, which the file
        divides its weight scales by."""
        weight = self.entry(f"{theirs}.weight")
        scale = torch.ones(()) if out is None else out
        if self.has(f"{theirs}.s_channel"):
            return self._two_levels(ours, theirs, outputs, scale)
        if weight.dtype == torch.int32:
            self._int4(ours, theirs, "W4A16", f"{theirs}.scale", outputs)
            self.constant(f"{ours}.weight_scale", torch.ones(outputs))
            return INT4
        if weight.dtype == torch.int8:
            self.make(f"{ours}.weight", (outputs, weight.shape[0]), torch.int8, _turned(outputs), f"{theirs}.weight")
            split = self.entry(f"{theirs}.b").shape[-1] != 1
            shape, factor = ((outputs,), scale) if split else ((), torch.ones(()))
            self.make(f"{ours}.weight_scale", shape, torch.float32, _rescaled(shape, factor), f"{theirs}.b")
            return INT8_SPLIT if split else INT8
        self.copy(f"{ours}.weight", f"{theirs}.weight")
        return WeightSpec()

    def _int4(self, ours: str, theirs: str, precision: str, scales: str, outputs: int) -> None:
        words, groups = self.entry(f"{theirs}.weight").shape, self.entry(scales).shape
        inputs = words[0] * 16
        if inputs % packed.GROUP or words[1] % 128 or groups != (inputs // packed.GROUP, words[1] // 2):
            raise CheckpointError(
                f"{theirs}.weight and {scales} have the impossible shapes {list(words)} and {list(groups)}"
            )
        repack = lambda w: packed.repack(w, precision, outputs)  # noqa: E731
        self.make(f"{ours}.weight_packed", (outputs, inputs // 2), torch.uint8, repack, f"{theirs}.weight")
        unpermute = lambda s: packed.group_scales(s, outputs)  # noqa: E731
        self.make(f"{ours}.weight_group_scale", (outputs, inputs // packed.GROUP), torch.float16, unpermute, scales)

    def _two_levels(self, ours: str, theirs: str, outputs: int, out: Tensor) -> WeightSpec:
        names = f"{theirs}.weight", f"{theirs}.s_group"
        if self.exact:
            shape = (outputs, self.entry(names[0]).shape[0] * 16)
            self.make(f"{ours}.weight", shape, torch.int8, lambda w, s: packed.int8_codes(w, s, outputs), *names)
        else:
            self._int4(ours, theirs, "W4A8", names[1], outputs)
        channels = lambda s: packed.channel_scales(s, outputs) * out  # noqa: E731
        self.make(f"{ours}.weight_scale", (outputs,), torch.float32, channels, f"{theirs}.s_channel")
        return WeightSpec(8) if self.exact else INT4

    def vector(self, ours: str, theirs: str, scale: str) -> WeightSpec:
        """A small parameter: int8 with its scale, or float."""
        self.copy(ours, theirs)
        if self.entry(theirs).dtype.is_floating_point:
            return WeightSpec()
        self.make(f"{ours}_scale", (), torch.float32, lambda s: s, scale)
        return INT8


def _turned(outputs: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight[:, :outputs].T.contiguous()


def _rescaled(shape: tuple[int, ...], factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda b: b.flatten()[: shape[0] if shape else 1] * factor


def _suffix(name: str) -> str:
    return name.split(".mixer.")[-1]


def input_scale(source: Source, theirs: str, ours: str, projection: str) -> SiteSpec:
    """The scale of a norm's integer output; a file without it means one per token."""
    if not source.has(theirs):
        source.repairs.add(
            "a norm in front of an integer projection has no static scale: every token gets its own",
            "scales found from the values themselves never clip",
            theirs,
        )
        return TOKEN
    twins = [f"{projection}.input_scale"]
    # `a` is the input's scale alone where the outputs' scales stand in `b`, or where there are none
    if projection == "lm_head" or (source.has(f"{projection}.b") and source.entry(f"{projection}.b").shape[-1] != 1):
        twins.append(f"{projection}.a")
    source.constant(ours, torch.tensor(source.scale(theirs, *twins)))
    return STATIC
