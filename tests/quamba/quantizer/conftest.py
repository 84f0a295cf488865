"""What the tests of whole runs share."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

import quamba
from quamba.quantizer.block import BlockQuantizer


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def run(calibration_ids):
    def call(model, out, recipe="w8a8", calibration=calibration_ids, **options):
        model = str(model) if isinstance(model, Path) else model
        return quamba.quantize(model, recipe, out=out, calibration=calibration, **options)

    return call


class Stop(BaseException):
    """Neither an Exception nor ours: nothing may catch it."""


@contextlib.contextmanager
def stop_before(block: int):
    """The run is torn off in the middle of this block's work."""
    original = BlockQuantizer.round_to_nearest
    count = 0

    def torn(*args):
        nonlocal count
        if count == block:
            raise Stop
        count += 1
        return original(*args)

    BlockQuantizer.round_to_nearest = torn  # type: ignore[method-assign]
    try:
        yield
    finally:
        BlockQuantizer.round_to_nearest = original  # type: ignore[method-assign]
