"""Record what a function does in kernel calls, and do it again in one call of C: nothing but the result is allocated, no
Python runs. Beside kernels, C can do copies, conversions, sums and products (`elementwise`)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.cpu.library import KINDS, ElementwiseArgs, Launch, check_status, library, threads
from quamba_kernels.recording import COPIES, Recorded, Recorder, aten

BINARY = {aten.add: 1, aten.mul: 2}
WRITTEN = ("y", "codes", "acc", "state")  # by kernels; and `scale`, by one that has no `inv`
_AXES = 4


class Recording(Recorded):
    """Calls on fixed memory, but for the tensors that move: those given, and the result, which is new in every run."""

    def __init__(self, recorder: _Recorder, result: Tensor):
        super().__init__(recorder, result)
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
    """Call `function` and return its result, with a recording of it, or with the reason why there is none."""
    recorder = _Recorder(inputs, moving)
    result = recorder.watch(function)
    return result, recorder.problem or Recording(recorder, result)


class _Recorder(Recorder):
    def __init__(self, inputs: Sequence[Tensor], moving: Sequence[Tensor]):
        super().__init__(inputs, moving)
        self.launches: list[tuple[str, ctypes.Structure]] = []

    def note(self, op: str, args: ctypes.Structure) -> None:
        """A kernel was called."""
        for field in self._written(args):
            if not self.varies(getattr(args, field)):
                self.fail(f"{op} writes where something constant stands")
        self.launches.append((op, args))

    @staticmethod
    def _written(args: ctypes.Structure) -> list[str]:
        names = [field[0] for field in args._fields_]
        fields = [name for name in WRITTEN if name in names]
        if "scale" in names and "codes" in names and not args.inv:
            fields.append("scale")
        return [name for name in fields if getattr(args, name)]

    def again(self, func: Any, args: tuple, kwargs: dict, made: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in COPIES or packet is aten.copy_:
            self._elementwise(0, args[1] if packet is aten.copy_ else args[0], None, made[0])
        elif packet in BINARY and len(args) == 2 and not kwargs and isinstance(args[1], Tensor):
            self._elementwise(BINARY[packet], args[0], args[1], made[0])
        else:
            self.fail(str(packet))

    def _elementwise(self, op: int, a: Tensor, b: Tensor | None, y: Tensor) -> None:
        self.vary(y)
        tensors = [t for t in (a, b, y) if t is not None]
        if any(t.dtype not in KINDS for t in tensors) or y.dim() > _AXES or (y.dtype == torch.int8 != a.dtype):
            self.fail(f"{op} on {[str(t.dtype) for t in tensors]}")
            return
        if y.numel() == 0:
            return
        args = ElementwiseArgs(a=a.data_ptr(), b=None if b is None else b.data_ptr(), y=y.data_ptr(), op=op)
        args.a_kind, args.b_kind, args.y_kind = (KINDS[t.dtype] if t is not None else 0 for t in (a, b, y))
        args.threads = threads()
        for name, t in (("a", a), ("b", b), ("y", y)):
            if t is not None:
                self.keep(t)
                strides = t.expand(y.shape).stride()
                for axis, stride in enumerate(strides, _AXES - y.dim()):
                    setattr(args, f"{name}_stride{axis}", stride)
        for axis in range(_AXES):
            setattr(args, f"size{axis}", 1 if axis < _AXES - y.dim() else y.shape[axis - _AXES + y.dim()])
        self.launches.append(("elementwise", args))

    def slots(self, tensor: Tensor) -> list[tuple[ctypes.Structure, str, int]]:
        """Where a tensor stands: (structure, field, bytes from its first entry)."""
        found, nbytes = [], tensor.numel() * tensor.element_size()
        for _, args in self.launches:
            for field, kind, *_ in args._fields_:
                address = getattr(args, field) if kind is ctypes.c_void_p else None
                if address and 0 <= address - tensor.data_ptr() < nbytes:
                    found.append((args, field, address - tensor.data_ptr()))
        return found
