"""The header of a safetensors file, checked before a byte of its tensors is believed."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quamba.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse and check a safetensors header: every tensor's bytes exist, fit its shape, and overlap no other's."""

    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged or no safetensors file: {why}")

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        refuse_pointer(file, start)
        if len(start) < 8:
            raise bad("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise bad(f"its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (ValueError, RecursionError, MemoryError) as error:
            raise bad(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata is not a mapping of strings")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, item in header.items():
        check_name(file, name)
        try:
            dtype, shape, (begin, end) = DTYPES[item["dtype"]], tuple(item["shape"]), item["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise bad(f"the entry of {name} can't be understood ({error!r})") from error
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise bad(f"{name} has sizes that are no natural numbers")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"{name} of shape {list(shape)} doesn't fit its {end - begin} bytes")
        entries[name] = Entry(file, shape, dtype)
        spans.append((begin, end, name))
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise bad(f"the bytes of {name} overlap others or leave a gap")
        expected = end
    if 8 + length + expected != size:
        raise bad(f"it should have {8 + length + expected} bytes and has {size} (truncated?)")
    return entries, metadata


def refuse_pointer(file: Path, start: bytes) -> None:
    """`start`: the file's first bytes."""
    if start.startswith(b"version "):
        raise CheckpointError(f"{file} is a git-lfs pointer, not the weights: fetch them with 'git lfs pull'")


def check_name(file: Path, name: str) -> str:
    """`name`, if it can stand in a message and in another file."""
    if len(name) > 500 or not name.isprintable():
        raise CheckpointError(f"{file} has a tensor with an impossible name: {name[:50]!a}")
    return name


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result
