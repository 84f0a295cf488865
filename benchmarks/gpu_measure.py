"""How gpu.py measures: clocks, graphs, how many kernels there are, and what the device can do at most."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

import quamba_kernels as kernels

Call = Callable[[], Any]


class Clock:
    """Times calls on a device: by its events on a GPU, by the host's clock in main memory.

    rounds: how often each call is timed, twice where all rounds would take longer than `most` seconds; span: how many
    seconds about a turn takes, short calls being repeated.
    """

    def __init__(self, device: torch.device, rounds: int = 5, span: float = 0.05, most: float = 8.0):
        self.device, self.rounds, self.span, self.most = device, rounds, span, most
        self.gpu = device.type == "cuda"

    def memory(self) -> int:
        """Bytes allocated; the peak starts anew from them."""
        if not self.gpu:
            return 0
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def time(self, run: Call, times: int = 1) -> float:
        """Seconds a call, of `times` calls one after the other."""
        if not self.gpu:
            started = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - started) / times
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def repeats(self, run: Call) -> int:
        """How many calls fill the span; they also warm up."""
        if not self.gpu:
            return 1
        first = self.time(run)
        if first > self.span:
            return 1
        return max(1, min(10_000, round(self.span / max(self.time(run, 3), 1e-7))))

    def samples(self, runs: Sequence[Call]) -> list[list[float]]:
        """Seconds of each call, one number a round; in each round every call has its turn, another one first."""
        times = [self.repeats(run) for run in runs]
        found: list[list[float]] = [[] for _ in runs]
        started = time.monotonic()
        for turn in range(self.rounds):
            if turn >= 2 and time.monotonic() - started > self.most:
                break
            for i in range(len(runs)):
                which = (i + turn) % len(runs)
                found[which].append(self.time(runs[which], times[which]))
        return found


def middle(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b, round by round."""
    return [x / y for x, y in zip(a, b, strict=True)]


@dataclass
class Step:
    """Something to time: how it runs ("graph", or why it doesn't), steps of one kernel each, bytes that it holds at most."""

    run: Call
    how: str
    launches: int | None
    allocated: int


def step(clock: Clock, function: Callable[[], Tensor], inputs: list[Tensor], states: list[Tensor], token: bool) -> Step:
    """Run once and make a graph of it. A token is recorded, as `generate` does, which makes neighbouring kernels one; a
    recording holds all that its steps write, so a prompt is captured as it is. ValueError for results that aren't finite."""
    how, before = "graph" if clock.gpu else "no graph: main memory", clock.memory()
    if token:
        result, recording = kernels.record(function, inputs, states)
        held = clock.memory() - before
        made = Step(function, f"no graph: {recording}", None, held)
        if not isinstance(recording, str):
            made = Step(lambda: recording.run(states), how, len(recording.launches), held)
    else:
        result = function()
        held = torch.cuda.max_memory_allocated(clock.device) - before if clock.gpu else 0
        made = Step(captured(function, clock.gpu), how, count(function) if clock.gpu else None, held)
    if not bool(torch.isfinite(result).all()):
        raise ValueError("the result is not finite")
    return made


def captured(function: Call, gpu: bool) -> Call:
    """Its kernels as a graph. On a GPU it is called once before."""
    if not gpu:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # compiles, and lets libraries make their workspaces
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def count(function: Call) -> int | None:
    """How many kernels, copies and fills a graph of it has; None where the driver doesn't say."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        function()
    library, name = ("libamdhip64.so", "hipGraphGetNodes") if torch.version.hip else ("libcuda.so.1", "cuGraphGetNodes")
    nodes = ctypes.c_size_t()
    try:
        get = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None
    failed = get(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(nodes))
    return None if failed else nodes.value


def repeated(run: Call, times: int) -> Call:
    """`run` so many times, as one call."""

    def again() -> None:
        for _ in range(times):
            run()

    return run if times == 1 else again


@triton.jit
def _nothing():
    pass


class Launches:
    """Seconds that a graph of so many empty kernels takes."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.known: dict[int, float] = {}

    def __call__(self, count: int | None) -> float | None:
        if not self.clock.gpu or not count:
            return None
        if count not in self.known:

            def launch() -> None:
                for _ in range(count):
                    _nothing[(1,)]()

            run = captured(launch, gpu=True)
            self.known[count] = middle([self.clock.time(run, 20) for _ in range(5)])
        return self.known[count]


def probe(clock: Clock) -> list[dict[str, Any]]:
    """Rows of what the device does at most: bytes read and written by a copy, and products of random numbers.

    The peak of a kind is the fastest of its rows.
    """
    device = clock.device
    free = torch.cuda.mem_get_info(device)[0] if clock.gpu else 1 << 26
    bytes_ = min(4 << 30, free // 8)
    source = torch.randint(0, 256, (bytes_,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    sizes = [(4096, 4096, 8192), (8192, 8192, 8192)] if clock.gpu else [(64, 64, 64)]
    calls: list[tuple[str, str, float, Call]] = [("bytes", "torch copy_", 2 * bytes_, lambda: target.copy_(source))]
    for M, N, K in sizes:
        a, b = (torch.randn(n, K, device=device).half() for n in (M, N))
        x, w = (torch.randint(-127, 128, (n, K), dtype=torch.int8, device=device) for n in (M, N))
        shape, work = f"{M} x {N} x {K}", 2.0 * M * N * K
        calls.append(("float16", f"torch matmul, {shape}", work, lambda a=a, b=b: a @ b.T))
        calls.append(("int8", f"torch._int_mm, {shape}", work, lambda x=x, w=w: torch._int_mm(x, w.T)))
        calls.append(("int8", f"quamba int8_matmul, {shape}", work, lambda x=x, w=w: kernels.int8_matmul(x, w)))
    rows = []
    for kind, by, work, call in calls:
        row: dict[str, Any] = {"kind": "probe", "what": kind, "by": by, "rate": None, "spread": None}
        try:
            call()
            rates = [work / seconds for seconds in clock.samples([call])[0]]
            row |= {"rate": middle(rates), "spread": [min(rates), max(rates)]}
        except (RuntimeError, NotImplementedError) as error:
            row["problem"] = first_line(error)
        rows.append(row)
    return rows


def peaks_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The highest rate of each kind: bytes, float16 and int8 operations a second."""
    found: dict[str, float] = {}
    for row in rows:
        if row["kind"] == "probe" and row["rate"]:
            found[row["what"]] = max(found.get(row["what"], 0.0), row["rate"])
    return found


def floor(peaks: dict[str, float], bytes_: float, operations: float, kind: str) -> tuple[float | None, str]:
    """The least seconds for so many bytes and operations of a kind, and which of the two it is."""
    times = {"bytes": bytes_ / peaks["bytes"]} if peaks.get("bytes") else {}
    if operations and peaks.get(kind):
        times["operations"] = operations / peaks[kind]
    by = max(times, key=lambda name: times[name], default="")
    return times.get(by), by


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
