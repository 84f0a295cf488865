"""What the backends' recorders share: watching what a function does to memory, so that it can be done again.

While recording, every tensor is watched. What the kernels write, the inputs and the state vary from run to run; all else
(parameters, and what is computed from them alone) is constant, so that work on it is done once. A torch operation on
something that varies has to be a view, or one that the backend can do again; any other makes the recording fail.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FRESH = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
COPIES = (aten._to_copy, aten.clone)


class _Listening(threading.local):
    to: Any = None
    """The recorder that is told of this thread's kernel calls."""


listening = _Listening()


class Recorder(TorchDispatchMode):
    """inputs, moving: the tensors outside the function whose contents, or also places, change between runs.

    `kept`: tensors whose memory the calls use. `sources`: (first, last) address of the tensors that constants were computed
    from. `problem`: why there can be no recording; empty while there can.
    """

    def __init__(self, inputs: Sequence[Tensor], moving: Sequence[Tensor]):
        super().__init__()
        self.moving = list(moving)
        self.given = [*inputs, *moving]
        self.kept: list[Tensor] = list(self.given)
        self.varying: dict[int, int] = {}  # start of a storage -> its end
        self.sources: set[tuple[int, int]] = set()
        self.problem = ""
        self.paused = False
        for tensor in self.kept:
            self.vary(tensor)

    def again(self, func: Any, args: tuple, kwargs: dict, made: list[Tensor]) -> None:
        """Note an operation that reads what varies, with its results, or `fail`."""
        raise NotImplementedError

    def watch(self, function: Callable[[], Tensor]) -> Tensor:
        """`function()`, watched."""
        before, listening.to = listening.to, self
        try:
            with self:
                result = function()
        finally:
            listening.to = before
        own = [tensor.untyped_storage().data_ptr() for tensor in self.given]
        if not self.varies(result.data_ptr()) or result.untyped_storage().data_ptr() in own:
            self.fail("the result isn't made by the function")
        if not result.is_contiguous():
            self.fail("the result isn't contiguous")
        return result

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        with self:  # under inference_mode composite operations come whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        made = tensors([out])
        self.kept += made
        if func.overloadpacket in FRESH:
            for tensor in made:
                self.vary(tensor)
            return out
        read = tensors([*args, *kwargs.values()])
        if not any(self.varies(t.data_ptr()) for t in read):
            self.sources |= {span(t) for t in read}
        elif func._schema.is_mutable or not made or not all(self.varies(t.data_ptr()) for t in made):
            self.again(func, args, kwargs, made)
        # else a view, which shares the memory of what it shows
        return out

    def keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def fail(self, why: str) -> None:
        self.problem = self.problem or why

    def vary(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.varying[storage.data_ptr()] = storage.data_ptr() + storage.nbytes()

    def varies(self, address: int) -> bool:
        return any(start <= address < end for start, end in self.varying.items())


class Recorded:
    """A recording: the result's memory, what is kept alive for it, and where its constants came from. What moves is not kept:
    it may be large, and other tensors take its place."""

    def __init__(self, recorder: Recorder, result: Tensor):
        self.result, self.sources = result, recorder.sources
        moving = {storage(t) for t in recorder.moving}
        self.kept = [t for t in recorder.kept if storage(t) not in moving]

    def computed_from(self, tensor: Tensor) -> bool:
        """Whether a constant comes from this tensor, so that a change of it would go unnoticed."""
        first, last = span(tensor)
        return any(first <= end and start <= last for start, end in self.sources)


def storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def span(t: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last entry."""
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    return t.data_ptr(), t.data_ptr() + last * t.element_size()


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among arguments, also those in lists."""
    return [t for v in values for t in (v if isinstance(v, list | tuple) else (v,)) if isinstance(t, Tensor)]
