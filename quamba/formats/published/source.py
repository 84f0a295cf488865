"""One published file on one side, our view of it on the other: every tensor's shape is checked, scales that the file keeps
twice must agree, and what nothing accounts for is not passed over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.repairs import Repairs
from quamba.formats.tensors import Tensors, View
from quamba.plan import SiteSpec

STATIC, TOKEN = SiteSpec(8, "static"), SiteSpec(8, "token")
FLOAT = None  # as a dtype: any float one
LARGEST_SCALE = 1e6
_SMALL = 2**16  # entries of the tensors that are read at once, ahead of all others
_AGREE = 1e-3
Alias = tuple[str, float]  # a tensor of one entry, and what to multiply it by


class Source:
    """`has`, `entry` and `values` look at the file; `copy`, `make` and `constant` add to the view."""

    def __init__(self, files: Tensors, view: View, repairs: Repairs, exact: bool):
        self.files, self.view, self.repairs, self.exact = files, view, repairs, exact
        self.used: set[str] = set()
        small = [name for name, entry in files.entries.items() if math.prod(entry.shape) <= _SMALL]
        self._small = files.read(small)

    def has(self, name: str) -> bool:
        return name in self.files.entries

    def entry(self, name: str) -> Any:
        if name not in self.files.entries:
            raise CheckpointError(f"1 tensor is missing: {name}")
        self.used.add(name)
        return self.files.entries[name]

    def expect(self, name: str, dtype: torch.dtype | None, *shape: int) -> None:
        """CheckpointError unless the tensor is there in this dtype and shape (or one that only adds axes of 1)."""
        entry = self.entry(name)
        if not (entry.dtype.is_floating_point if dtype is FLOAT else entry.dtype == dtype):
            wanted = "a float type" if dtype is FLOAT else str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is stored as {str(entry.dtype).removeprefix('torch.')}; expected {wanted}")
        if [n for n in entry.shape if n != 1] != [n for n in shape if n != 1]:
            raise CheckpointError(f"{name} has shape {list(entry.shape)}; expected {list(shape)}")

    def values(self, name: str, *shape: int) -> Tensor:
        """A small float tensor, flat, float32."""
        self.expect(name, FLOAT, *shape)
        tensor = self._small[name] if name in self._small else self.files.read([name])[name]
        return tensor.float().flatten()

    def scale(self, *aliases: str | Alias) -> float:
        """One static scale that the file keeps in several places, which must agree; those missing are told."""
        named = [alias if isinstance(alias, tuple) else (alias, 1.0) for alias in aliases]
        found = {name: self.one(name) * factor for name, factor in named if self.has(name)}
        if not found:
            names = " or ".join(name for name, _ in named)
            raise CheckpointError(f"a static scale is missing, and nothing else in the file has it: {names}")
        (first, value), *others = found.items()
        for name, other in others:
            if not abs(other - value) <= _AGREE * abs(value):  # NaN agrees with nothing
                raise CheckpointError(f"two scales that must agree differ: {first} = {value:g}, by {name} {other:g}")
        for name, _ in named:
            if name not in found:
                self.repairs.add(
                    f"{_suffix(name)} is missing; {_suffix(first)} says the same", "they are one scale", name
                )
        return value

    def one(self, name: str) -> float:
        """A single scale."""
        return float(self.positive(name, self.values(name)))

    def positive(self, name: str, scales: Tensor) -> Tensor:
        """The flat scales, if none is zero, negative, or absurd."""
        wrong = scales[~((scales > 0) & (scales < LARGEST_SCALE))]
        if len(wrong):
            raise CheckpointError(f"{name} = {float(wrong[0]):g} can't be a scale")
        return scales

    def rows(self, name: str, scales: Tensor) -> Tensor:
        """Scales of a weight's rows: a row of zeros may have the scale 0."""
        if not bool(((scales >= 0) & (scales < LARGEST_SCALE)).all() and (scales > 0).any()):
            raise CheckpointError(f"{name} holds values that can't be scales: {float(scales.min()):g} and more")
        return scales

    def either(self, name: str, twin: str) -> str:
        """Which of two places holds a tensor; if both do they must agree, if one does the other's loss is told."""
        both = [place for place in (name, twin) if self.has(place)]
        if len(both) == 2:
            a, b = (self.files.read([place])[place].flatten().double() for place in both)
            if (
                self.entry(name).dtype != self.entry(twin).dtype
                or a.shape != b.shape
                or not torch.allclose(a, b, rtol=_AGREE, atol=0)
            ):
                raise CheckpointError(f"two tensors that must agree differ: {name} and {twin}")
        elif both:
            lost = twin if both[0] == name else name
            self.repairs.add(f"{_suffix(lost)} is missing; {_suffix(both[0])} is its twin", "they hold the same", lost)
        self.used |= set(both)
        return both[0] if both else name

    def copy(self, ours: str, theirs: str, *shape: int) -> None:
        self.expect(theirs, FLOAT, *shape)
        self.make(ours, shape, self.entry(theirs).dtype, lambda x: x, theirs)

    def make(
        self, ours: str, shape: tuple[int, ...], dtype: torch.dtype, function: Callable[..., Tensor], *theirs: str
    ) -> None:
        """The sources' shapes have been checked: `expect`."""
        for name in theirs:
            self.entry(name)
        self.view.make(ours, shape, dtype, function, *theirs)

    def constant(self, ours: str, value: Tensor) -> None:
        self.make(ours, tuple(value.shape), value.dtype, lambda: value)

    def known(self, *names: str) -> None:
        """Parts of the format that nothing here needs."""
        self.used |= {name for name in names if self.has(name)}

    def check_strangers(self) -> None:
        """Refuse tensors in blocks that nothing accounts for; name others."""
        strangers = sorted(self.files.entries.keys() - self.used)
        inside = [name for name in strangers if name.startswith("backbone.layers.")]
        if inside:
            more = f" and {len(inside) - 1} more" if inside[1:] else ""
            raise CheckpointError(f"tensors that the published format doesn't have: {inside[0]}{more}")
        for name in strangers:
            self.repairs.add("tensors that the published format doesn't have are ignored", "no block reads them", name)


def _suffix(name: str) -> str:
    return name.split(".mixer.")[-1].split(".layers.")[-1].lstrip("0123456789.")
