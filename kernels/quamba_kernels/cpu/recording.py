"""Record what a function does in kernel calls, and do it again in one call of C: nothing but the result is allocated, no
Python runs.

While recording, every tensor is watched. What the kernels write, the inputs and the state vary from run to run; all else
(parameters, and what is computed from them alone) is constant, so that work on it is done once. A torch operation on
something that varies has to be a view, or one of those here that C can do; any other makes the recording fail.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quamba_kernels.cpu.library import KINDS, ElementwiseArgs, Launch, check_status, library, listening, threads

aten = torch.ops.aten
FRESH = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
COPIES = (aten._to_copy, aten.clone, aten.copy_)
BINARY = {aten.add: 1, aten.mul: 2}
WRITTEN = ("y", "codes", "acc", "state")  # by kernels; and `scale`, by one that has no `inv`
_AXES = 4


class Recording:
    """Calls on fixed memory, but for the tensors that move: those given, and the result, which is new in every run.

    `sources`: (first, last) address of the tensors that constants were computed from; others are read anew in every run.
    """

    def __init__(self, recorder: _Recorder, result: Tensor):
        self.result, self.kept, self.sources = result, recorder.kept, recorder.sources
        self.calls = [args for _, args in recorder.launches]
        addresses = [
            ctypes.cast(getattr(library(), f"quamba_{op}"), ctypes.c_void_p).value for op, _ in recorder.launches
        ]
        pairs = [Launch(op, ctypes.addressof(args)) for op, args in zip(addresses, self.calls, strict=True)]
        self.launches = (Launch * len(pairs))(*pairs)
        moving = [*recorder.moving, result]
        self.slots = [recorder.slots(tensor) for tensor in moving]
        self.bound = [tensor.data_ptr() for tensor in moving]
        self._replay = partial(library().quamba_replay, ctypes.byref(self.launches), ctypes.c_int64(len(pairs)))

    def computed_from(self, tensor: Tensor) -> bool:
        """Whether a constant comes from this tensor, so that a change of it would go unnoticed."""
        first, last = span(tensor)
        return any(first <= end and start <= last for start, end in self.sources)

    def run(self, moving: Sequence[Tensor]) -> Tensor:
        """Make the calls, with `moving` at the places of those recorded; returns a new result."""
        result = torch.empty_like(self.result)
        places = [*map(Tensor.data_ptr, moving), result.data_ptr()]
        for place, bound, slots in zip(places, self.bound, self.slots, strict=True):
            if place != bound:
                for args, field, offset in slots:
                    setattr(args, field, place + offset)
        self.bound = places
        check_status("replay", self._replay())
        return result


def record(
    function: Callable[[], Tensor], inputs: Sequence[Tensor], moving: Sequence[Tensor]
) -> tuple[Tensor, Recording | str]:
    """Call `function` and return its result, with a recording of it, or with the reason why there is none.

    inputs, moving: the tensors outside the function whose contents, or also places, change between runs.
    """
    recorder = _Recorder(inputs, moving)
    before, listening.to = listening.to, recorder
    try:
        with recorder:
            result = function()
    finally:
        listening.to = before
    recorder.check_result(result)
    return result, recorder.problem or Recording(recorder, result)


class _Recorder(TorchDispatchMode):
    def __init__(self, inputs: Sequence[Tensor], moving: Sequence[Tensor]):
        super().__init__()
        self.moving = list(moving)
        self.given = [*inputs, *moving]
        self.kept: list[Tensor] = list(self.given)
        self.varying: dict[int, int] = {}  # start of a storage -> its end
        self.sources: set[tuple[int, int]] = set()
        self.launches: list[tuple[str, ctypes.Structure]] = []
        self.problem = ""
        for tensor in self.kept:
            self._vary(tensor)

    # What library.call tells.

    def keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def note(self, op: str, args: ctypes.Structure) -> None:
        for field in self._written(args):
            if not self._varies(getattr(args, field)):
                self._fail(f"{op} writes where something constant stands")
        self.launches.append((op, args))

    @staticmethod
    def _written(args: ctypes.Structure) -> list[str]:
        names = [field[0] for field in args._fields_]
        fields = [name for name in WRITTEN if name in names]
        if "scale" in names and "codes" in names and not args.inv:
            fields.append("scale")
        return [name for name in fields if getattr(args, name)]

    # What torch does meanwhile.

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # under inference_mode composite operations come whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        made = [t for t in (out if isinstance(out, list | tuple) else [out]) if isinstance(t, Tensor)]
        self.kept += made
        packet = func.overloadpacket
        if packet in FRESH:
            for tensor in made:
                self._vary(tensor)
            return out
        read = [*_flat(args), *_flat(kwargs.values())]
        if not any(self._varies(t.data_ptr()) for t in read):
            self.sources |= {span(t) for t in read}
            return out
        if packet in COPIES:
            source = args[1] if packet is aten.copy_ else args[0]
            self._elementwise(0, source, None, made[0])
        elif packet in BINARY and len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
            self._elementwise(BINARY[packet], args[0], args[1], made[0])
        elif not made or func._schema.is_mutable or not all(self._varies(t.data_ptr()) for t in made):
            self._fail(str(packet))  # a view shares the memory of what it shows
        return out

    def _elementwise(self, op: int, a: Tensor, b: Tensor | None, y: Tensor) -> None:
        self._vary(y)
        tensors = [t for t in (a, b, y) if t is not None]
        if any(t.dtype not in KINDS for t in tensors) or y.dim() > _AXES or (y.dtype == torch.int8 != a.dtype):
            self._fail(f"{op} on {[str(t.dtype) for t in tensors]}")
            return
        if y.numel() == 0:
            return
        args = ElementwiseArgs(a=a.data_ptr(), b=None if b is None else b.data_ptr(), y=y.data_ptr(), op=op)
        args.a_kind, args.b_kind, args.y_kind = (KINDS[t.dtype] if t is not None else 0 for t in (a, b, y))
        args.threads = threads()
        for name, t in (("a", a), ("b", b), ("y", y)):
            if t is not None:
                self.kept.append(t)
                strides = t.expand(y.shape).stride()
                for axis, stride in enumerate(strides, _AXES - y.dim()):
                    setattr(args, f"{name}_stride{axis}", stride)
        for axis in range(_AXES):
            setattr(args, f"size{axis}", 1 if axis < _AXES - y.dim() else y.shape[axis - _AXES + y.dim()])
        self.launches.append(("elementwise", args))

    def _fail(self, why: str) -> None:
        self.problem = self.problem or why

    def _vary(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.varying[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()

    def _varies(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.varying.items())

    def check_result(self, result: Tensor) -> None:
        own = [tensor.untyped_storage().data_ptr() for tensor in self.given]
        if not self._varies(result.data_ptr()) or result.untyped_storage().data_ptr() in own:
            self._fail("the result isn't made by the function")
        if not result.is_contiguous():
            self._fail("the result isn't contiguous")

    def slots(self, tensor: Tensor) -> list[tuple[ctypes.Structure, str, int]]:
        """Where a tensor stands: (structure, field, bytes from its first entry)."""
        found, nbytes = [], tensor.numel() * tensor.element_size()
        for _, args in self.launches:
            for field, kind, *_ in args._fields_:
                address = getattr(args, field) if kind is ctypes.c_void_p else None
                if address and 0 <= address - tensor.data_ptr() < nbytes:
                    found.append((args, field, address - tensor.data_ptr()))
        return found


def span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last entry."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + last * t.element_size()


def _flat(values: Any) -> list[Tensor]:
    """The tensors among arguments, also those in lists."""
    return [t for v in values for t in (v if isinstance(v, list | tuple) else (v,)) if isinstance(t, Tensor)]
