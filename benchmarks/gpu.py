"""Speed of one token and of prompts on a GPU, beside float16, mamba-ssm's kernels and torch's, against what the device can do.

    python benchmarks/gpu.py [--quick] [--models NAMES] [--seconds N] [--device cuda] [--json FILE] [--markdown FILE]

Needs torch, triton and this checkout; nothing is installed, downloaded or read. Weights are random, made on the device. In each
round every format has a turn; ratios are taken inside a round. What there was no time or memory for is listed.

--json: a list of rows. kind step: {model, format, state, phase, batch, tokens, tokens_per_s, spread, ratio, ratio_spread, ms,
bytes, operations, tb_per_s, top_per_s, floor_ms, floor_by, percent, launches, launch_ms, memory, how, ...}; product and scan:
single kernels {by, ms, spread, ratio, ...}; probe: {what, by, rate}; missing: {what, why}. Times in ms, memory in bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
from gpu_shapes import (
    BASE,
    FORMATS,
    PRODUCTS,
    SCANS,
    SHAPES,
    TINY,
    TINY_PRODUCTS,
    TINY_SCANS,
    Cell,
    Variant,
    cells,
)

try:
    import triton
except ImportError as error:
    sys.exit(f"gpu.py measures Triton kernels, and triton can't be imported: {error}")

import gpu_compile
import gpu_kernels
import gpu_measure
from gpu_measure import Clock, Launches, Step, first_line
from gpu_models import Model
from gpu_report import report
from gpu_steps import prepare, speeds

import quamba_kernels as kernels
from quamba_kernels import triton as quamba_triton

ALL = SHAPES | TINY
Row = dict[str, Any]
COMPILING = 0.35  # of the time, at most


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="the 8b shape, batch 1 and 64, a prompt of 2048: two minutes"
    )
    parser.add_argument("--models", type=lambda text: text.split(","), help=", ".join(SHAPES))
    parser.add_argument(
        "--seconds", type=float, default=540, help="what isn't begun by then is left out (default: 540)"
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu under TRITON_INTERPRET=1")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    chosen = options.models or (["mamba2-8b"] if options.quick else list(SHAPES))
    options.models = [name for each in chosen for name in (TINY if each == "tiny" else [each])]
    if unknown := [name for name in options.models if name not in ALL]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm device that torch can use")
    if options.device == "cpu" and not quamba_triton.interpreting():
        parser.error("in main memory Triton's kernels run in its interpreter only: set TRITON_INTERPRET=1")
    return options


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.started = options, time.monotonic()
        self.device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
        tiny = all(name in TINY for name in options.models)
        self.clock = Clock(self.device, rounds=1 if tiny else 3 if options.quick else 5)
        self.launches = Launches(self.clock)
        self.rows: list[Row] = []
        self.compiled = ""
        self.deadline = self.end = self.started + options.seconds
        self.products, self.scans = (TINY_PRODUCTS, TINY_SCANS) if tiny else (PRODUCTS, SCANS)

    def run(self) -> None:
        if self.clock.gpu:
            torch.cuda.set_device(self.device)
            say("compiling")
            todo = gpu_compile.jobs(self.options.models, self.options.quick, self.products, self.scans)
            self.compiled = gpu_compile.compile_all(todo, self.device, COMPILING * self.options.seconds)
            say(self.compiled)
        say("probing")
        self.rows += gpu_measure.probe(self.clock)
        self.peaks = gpu_measure.peaks_of(self.rows)
        names = self.options.models
        tasks: list[tuple[float, Callable[[], None]]] = [(0.7, self.single_products)]
        tasks += [(ALL[name].share, lambda name=name: self.model(name)) for name in names[:2]]
        tasks += [(1.0, self.single_scans)]
        tasks += [(ALL[name].share, lambda name=name: self.model(name)) for name in names[2:]]
        for i, (share, task) in enumerate(tasks):
            left = self.end - time.monotonic()
            self.deadline = time.monotonic() + left * share / sum(share for share, _ in tasks[i:])
            task()
            self.write()

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def missing(self, what: str, why: str) -> None:
        self.rows.append({"kind": "missing", "what": what, "why": why})
        say(f"MISSING {what}: {why}")

    def attempt(self, what: str, function: Callable[[], Any], late: bool = False) -> Any:
        """Its result; None where it can't be measured, which is listed with the reason, and the rest goes on. Late: whatever
        the time."""
        try:
            if late or not self.late():
                return function()
            self.missing(what, "no time left")
        except torch.OutOfMemoryError:
            self.missing(what, "doesn't fit into the device's memory")
        except Exception as error:
            self.missing(what, first_line(error))
        return None

    def release(self) -> None:
        gc.collect()
        if self.clock.gpu:
            torch.cuda.empty_cache()

    def single_products(self) -> None:
        for M, N, K in self.products:
            say(f"products of {M} x {N} x {K}")
            what = f"product {M} x {N} x {K}"
            call = lambda size=(M, N, K): gpu_kernels.products(self.clock, self.peaks, *size)  # noqa: E731
            self.rows += self.attempt(what, call) or []
            self.release()

    def single_scans(self) -> None:
        for case in self.scans:
            say(str(case))
            self.rows += (
                self.attempt(str(case), lambda case=case: gpu_kernels.scans(self.clock, self.peaks, case)) or []
            )
            self.release()

    def model(self, name: str) -> None:
        """All cells of a model; the formats whose weights fit are on the device at the same time."""
        shape, models = ALL[name], {}
        say(f"{name}: making weights")
        for format in FORMATS.values():
            make = lambda format=format: Model(shape, format, self.device)  # noqa: E731
            if model := self.attempt(f"{name}, {format.name}", make):
                models[format.name] = model
            else:
                self.release()
        for cell in cells(name, self.options.quick):
            if self.late():
                self.missing(f"{name}, {cell}", "no time left")
                continue
            say(f"{name}: {cell}")
            self.cell(name, cell, models)
            self.release()
        models.clear()
        self.release()

    def cell(self, name: str, cell: Cell, models: dict[str, Model]) -> None:
        states: dict[str, Any] = {}  # of every dtype, shared by the formats
        ready: list[tuple[Variant, Step, Row]] = []
        for variant in cell.variants:
            if variant.format.name in models:
                make = lambda v=variant: prepare(self.clock, models[v.format.name], v, cell, states)  # noqa: E731
                if found := self.attempt(f"{name}, {cell}, {variant}", make):
                    ready.append((variant, *found))
                else:
                    self.release()
        chunks = cell.tokens // cell.chunk
        runs = [gpu_measure.repeated(step.run, chunks) for _, step, _ in ready]
        samples = self.attempt(f"{name}, {cell}", lambda: self.clock.samples(runs), late=True) if ready else None
        if samples is None:
            return
        times = {variant: found for (variant, _, _), found in zip(ready, samples, strict=True)}
        for variant, step, row in ready:
            launches = None if step.launches is None else step.launches * chunks
            row = {"kind": "step", "model": name, **row, "how": step.how, "launches": launches}
            seconds = self.launches(launches)
            row["launch_ms"] = None if seconds is None else 1e3 * seconds
            self.rows.append(row | speeds(self.peaks, row, times[variant], times.get(BASE)))

    def write(self) -> str:
        """The files so far, and the page."""
        found = facts(self.device) | {"compiled before": self.compiled or "nothing"}
        page = report(found | {"seconds taken": f"{time.monotonic() - self.started:.0f}"}, self.rows)
        if self.options.json:
            self.options.json.write_text(json.dumps(self.rows, indent=1) + "\n", encoding="utf-8")
        if self.options.markdown:
            self.options.markdown.write_text(page, encoding="utf-8")
        return page


def facts(device: torch.device) -> dict[str, str]:
    found = {"date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["driver"] = driver()
    else:
        found["gpu"] = "NONE: a run in main memory, which says nothing about a GPU"
    toolkit = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__} ({toolkit}), triton {triton.__version__}"
    return found | {"versions": versions, "kernels": kernels.describe(device)}


def driver() -> str:
    if not (tool := shutil.which("nvidia-smi")):
        return "unknown: there is no nvidia-smi"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def main() -> None:
    options = arguments()
    forced = kernels.backend("auto" if options.device != "cpu" else "triton")
    with forced, torch.no_grad():
        bench = Bench(options)
        try:
            bench.run()
        finally:
            print(bench.write())
    if not any(row["kind"] == "step" for row in bench.rows):
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
