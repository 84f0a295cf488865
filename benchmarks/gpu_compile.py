"""Compiling before measuring, in several processes: Triton keeps what it compiled on disk, and one after the other the kernels
of a run take longer than all else. Models of two layers have all the kernels that their shape needs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from dataclasses import replace
from functools import partial

import gpu_kernels
import torch
from gpu_measure import Clock, first_line
from gpu_models import Model
from gpu_shapes import FORMATS, SHAPES, TINY, Cell, ScanCase, cells
from gpu_steps import prepare

import quamba_kernels as kernels

MOST_PROCESSES = 12  # each has a context of its own on the device
Size = tuple[int, int, int]


def jobs(names: list[str], quick: bool, products: list[Size], scans: list[ScanCase]) -> list[tuple]:
    """What to compile, the most important first: functions with their arguments."""
    chunks = [(name, replace(cell, tokens=cell.chunk)) for name in names for cell in cells(name, quick)]
    steps: list[tuple] = [(_step, *chunk, format) for chunk in dict.fromkeys(chunks) for format in FORMATS]
    return [*((_product, size) for size in products), *steps, *((_scan, case) for case in scans)]


def compile_all(todo: list[tuple], device: torch.device, seconds: float) -> str:
    """Do jobs for so many seconds. Returns what came of it; errors will show again where the kernels are measured."""
    started, done, first = time.monotonic(), 0, ""
    processes = min(MOST_PROCESSES, len(todo), max(1, (os.cpu_count() or 2) - 2))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:  # which ends them when it is left
        results = pool.imap_unordered(partial(_run, device), todo)
        while done < len(todo):
            try:
                problem = results.next(timeout=max(0.0, seconds - (time.monotonic() - started)))
            except multiprocessing.TimeoutError:
                break
            done, first = done + 1, first or problem
    text = f"{done} of {len(todo)} steps and kernels in {time.monotonic() - started:.0f} s"
    return text + (f"; the first error: {first}" if first else "")


def _run(device: torch.device, job: tuple) -> str:
    function, *args = job
    gpu = device.type == "cuda"
    try:
        if gpu:
            torch.cuda.set_device(device)
            gc.collect()
            torch.cuda.empty_cache()
        with torch.no_grad(), kernels.backend("auto" if gpu else "triton"):
            function(Clock(device, rounds=1, span=0.0), *args)
    except Exception as error:
        return first_line(error)
    return ""


def _step(clock: Clock, name: str, cell: Cell, format: str) -> None:
    shape = replace((SHAPES | TINY)[name], layers=2)
    model, states = Model(shape, FORMATS[format], clock.device), {}
    for variant in cell.variants:
        if variant.format.name == format:
            prepare(clock, model, variant, cell, states)


def _product(clock: Clock, size: Size) -> None:
    gpu_kernels.products(clock, {}, *size)


def _scan(clock: Clock, case: ScanCase) -> None:
    gpu_kernels.scans(clock, {}, case)
