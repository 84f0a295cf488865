"""Record what a function launches and does in torch, and do it again: on a GPU as a CUDA graph, in the interpreter step by
step. Operations of torch are done again into the memory of their first results."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quamba_kernels.recording import COPIES, Recorded, Recorder, aten, span
from quamba_kernels.triton.common import Launch
from quamba_kernels.triton.fusion import Operation, Step, fused

log = logging.getLogger("quamba.kernels")
MOST_GRAPHS = 4  # of one recording, each for other places of what moves


@dataclass(frozen=True)
class View:
    """Stands in a step for a view of one of the tensors that move, so that the recording doesn't hold their memory."""

    place: int  # among them
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # from that tensor's first entry

    def of(self, tensor: Tensor) -> Tensor:
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)


class Recording(Recorded):
    """`launches`: the steps, one kernel each."""

    def __init__(self, recorder: _Recorder, result: Tensor):
        super().__init__(recorder, result)
        moving = recorder.moving
        self.launches: list[Step] = [changed(step, viewed(moving)) for step in fused(recorder.steps, result)]
        self.graphs: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        if can_capture(result):
            for step in self.launches:  # compiles what fusion made; on copies, one at a time because states are large
                changed(step, lambda view: view.of(moving[view.place].clone()) if isinstance(view, View) else view)()
            self.graphs[places(moving)] = captured(self.on(moving), result.device)

    def run(self, moving: Sequence[Tensor]) -> Tensor:
        """Do the steps again, with `moving` at the places of those recorded; returns a new result."""
        if not can_capture(self.result):
            play(self.on(moving))
            return self.result.clone()
        now = places(moving)
        if now not in self.graphs:
            self.graphs[now] = self.capture(moving)
        self.graphs.move_to_end(now)
        while len(self.graphs) > MOST_GRAPHS:
            self.graphs.popitem(last=False)
        graph = self.graphs[now]
        play(self.on(moving)) if graph is None else graph.replay()
        return self.result.clone()

    def capture(self, moving: Sequence[Tensor]) -> Any:
        """A graph of the steps with these tensors; None if it can't be made now, and they are launched one by one."""
        try:
            return captured(self.on(moving), self.result.device)
        except RuntimeError as error:
            log.warning("no CUDA graph could be made, kernels are launched one by one: %s", error)
            return None

    def on(self, moving: Sequence[Tensor]) -> list[Step]:
        """The steps with these tensors."""
        put = lambda value: value.of(moving[value.place]) if isinstance(value, View) else value  # noqa: E731
        return [changed(step, put) for step in self.launches]


def play(steps: Iterable[Step]) -> None:
    for step in steps:
        step()


def can_capture(result: Tensor) -> bool:
    return result.is_cuda


def places(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.data_ptr() for tensor in tensors)


def captured(steps: Iterable[Step], device: torch.device) -> Any:
    """A CUDA graph of the steps, which are not done now. Their kernels have to be compiled before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):  # streams belong to a device: what is launched on another one is done, not captured
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


def changed(step: Step, change: Callable[[Any], Any]) -> Step:
    """The step with what `change` makes of each of its values."""

    def other(value: Any) -> Any:
        return type(value)(map(other, value)) if isinstance(value, list | tuple) else change(value)

    if isinstance(step, Launch):
        return replace(step, given={name: other(value) for name, value in step.given.items()})
    kwargs = {name: other(value) for name, value in step.kwargs.items()}
    return replace(step, args=other(step.args), kwargs=kwargs)


def viewed(moving: Sequence[Tensor]) -> Callable[[Any], Any]:
    """What makes a View of each view of tensors that move, and leaves all else as it is."""

    def view(value: Any) -> Any:
        if isinstance(value, Tensor) and value.numel() > 0:
            for place, tensor in enumerate(moving):
                first, last = span(tensor)
                if first <= value.data_ptr() <= last and tensor.numel() > 0:
                    if value.dtype != tensor.dtype:
                        raise RuntimeError(f"what moves is {tensor.dtype} and used as {value.dtype}")
                    offset = (value.data_ptr() - first) // value.element_size()
                    return View(place, tuple(value.shape), value.stride(), offset)
        return value

    return view


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
    except RuntimeError as error:  # of capturing, or of what can't be moved
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
