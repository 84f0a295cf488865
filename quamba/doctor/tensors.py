"""Values that no healthy checkpoint has, found one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quamba.doctor.diagnosis import Diagnosis, Finding
from quamba.errors import CheckpointError
from quamba.formats.checkpoint import EMBEDDING, Checkpoint, is_finite

SMALLEST_SCALE, LARGEST_SCALE = 1e-12, 1e4
NOT_POSITIVE = "scales that are zero or negative"
SATURATED = 0.05
"""Share of int8 codes at their limits. A scale from the largest entry puts a handful there; one too small, many."""


def examine(checkpoint: Checkpoint, found: Diagnosis) -> None:
    """Add what is wrong with the values of a checkpoint's tensors; the same in several tensors is one finding."""
    problems: dict[str, list[str]] = {}
    rows = f"{EMBEDDING}_scale"
    for name in checkpoint.files.entries:
        try:
            (tensor,) = checkpoint.files.read([name]).values()
        except (CheckpointError, OSError) as error:
            found.broken.append(Finding(str(error), (name,)))
            continue
        for what in _problems(name, tensor):
            if name == rows and what == NOT_POSITIVE and checkpoint.layout == "published quamba":
                found.notes.append(Finding(f"the embedding's rows have {what}, as the published code makes them"))
                continue
            problems.setdefault(what, []).append(name)
    found.broken += [Finding(what, tuple(names)) for what, names in problems.items()]


def _problems(name: str, tensor: Tensor) -> Iterator[str]:
    if tensor.numel() == 0:
        yield "no entries"
        return
    if tensor.is_floating_point() and not is_finite(tensor):
        yield "NaN or infinite values"
        return
    scale = (name.endswith("_scale") and not name.endswith("group_scale")) or ".scales." in name
    if scale and tensor.is_floating_point():
        size = tensor.float()
        if bool((size < SMALLEST_SCALE).any()):
            yield NOT_POSITIVE
        if bool((size > LARGEST_SCALE).any()):
            yield f"scales beyond {LARGEST_SCALE:g}"
    elif tensor.ndim > 1 and not bool(tensor.any()):
        yield "all zero: a file that was not downloaded whole looks like this"
    elif tensor.dtype == torch.int8 and tensor.ndim > 1 and not name.endswith("group_scale"):
        share = float((tensor.short().abs() >= 127).float().mean())
        if share > SATURATED and tensor.shape[-1] > 1 / SATURATED:
            yield f"int8 codes at their limits (more than {SATURATED:.0%}): the scale is too small"
