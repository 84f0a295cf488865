"""Record what a function launches and does in torch, and do it again: on a GPU as a CUDA graph, in the interpreter step by
step. Operations of torch are done again into the memory of their first results."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.recording import COPIES, Recorded, Recorder, aten
from quamba_kernels.triton.common import Launch
from quamba_kernels.triton.fusion import Operation, Step, fused

MOST_GRAPHS = 4  # of one recording, each for other places of what moves


class Recording(Recorded):
    """`launches`: the steps, one kernel each."""

    def __init__(self, recorder: _Recorder, result: Tensor):
        super().__init__(recorder, result)
        self.moving = list(recorder.moving)
        self.launches: list[Step] = fused(recorder.steps, result)
        self.bound = places(self.moving)
        self.graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        if can_capture(result):
            copies = [tensor.clone() for tensor in self.moving]
            play([moved(step, self.moving, copies) for step in self.launches])  # compiles what fusion made
            self.graphs[self.bound] = captured(self.launches)

    def run(self, moving: Sequence[Tensor]) -> Tensor:
        """Do the steps again, with `moving` at the places of those recorded; returns a new result."""
        now = places(moving)
        if now != self.bound and now not in self.graphs:
            self.launches = [moved(step, self.moving, moving) for step in self.launches]
            self.moving, self.bound = list(moving), now
        if not can_capture(self.result):
            play(self.launches)
            return self.result.clone()
        if now not in self.graphs:
            self.graphs[now] = captured(self.launches)
        self.graphs.move_to_end(now)
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        self.graphs[now].replay()
        return self.result.clone()


def play(steps: Iterable[Step]) -> None:
    for step in steps:
        step()


def can_capture(result: Tensor) -> bool:
    return result.is_cuda


def places(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def captured(steps: Iterable[Step]) -> Any:
    """A CUDA graph of the steps, which are not done now. Their kernels have to be compiled before."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            play(steps)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def moved(step: Step, old: Sequence[Tensor], new: Sequence[Tensor]) -> Step:
    """The step with its views of `old` tensors exchanged for the same views of `new` ones."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for a, b in zip(old, new, strict=True):
            if value.untyped_storage().data_ptr() == a.untyped_storage().data_ptr():
                offset = b.storage_offset() + value.storage_offset() - a.storage_offset()
                return b.as_strided(value.shape, value.stride(), offset)
        return value

    if isinstance(step, Launch):
        return replace(step, given={name: other(value) for name, value in step.given.items()})
    kwargs = {name: other(value) for name, value in step.kwargs.items()}
    return replace(step, args=tuple(map(other, step.args)), kwargs=kwargs)


def record(
    function: Callable[[], Tensor], inputs: Sequence[Tensor], moving: Sequence[Tensor]
) -> tuple[Tensor, Recording | str]:
    """Call `function` and return its result, with a recording of it, or with the reason why there is none."""
    recorder = _Recorder(inputs, moving)
    memory = recorder.watch(function)
    if recorder.problem:
        return memory, recorder.problem
    result = memory.clone()  # what is recorded writes to the memory of the first result
    try:
        return result, Recording(recorder, memory)
    except RuntimeError as error:  # of capturing
        return result, f"no CUDA graph could be made of it ({error})"


class _Recorder(Recorder):
    def __init__(self, inputs: Sequence[Tensor], moving: Sequence[Tensor]):
        super().__init__(inputs, moving)
        self.steps: list[Step] = []

    def note(self, step: Launch) -> None:
        """A kernel was launched."""
        self.steps.append(step)

    def again(self, func: Any, args: tuple, kwargs: dict, made: list[Tensor]) -> None:
        packet = func.overloadpacket
        if func._schema.is_mutable:
            self.steps.append(Operation(func, args, kwargs))
        elif packet in COPIES:
            self.steps.append(Operation(aten.copy_.default, (made[0], args[0]), {}))
        elif len(made) == 1 and (out := into(func)) is not None:
            self.steps.append(Operation(out, args, kwargs | {"out": made[0]}))
        else:
            self.fail(str(packet))
        for tensor in made:
            self.vary(tensor)


def into(func: Any) -> Any | None:
    """The overload of an operation that writes to memory it is given."""
    name, packet = func._overloadname, func.overloadpacket
    names = ["out"] if name in ("default", "Tensor") else [f"{name}_out"]
    return next((getattr(packet, name) for name in names if name in packet.overloads()), None)
