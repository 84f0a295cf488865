"""Tensor files: names, shapes and dtypes from headers first, bytes later and only those asked for."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorFiles:
    """All tensors of a folder, sharded or not, safetensors preferred over `pytorch_model.bin`.

    `entries`: name -> Entry. `metadata`: file name -> safetensors metadata. Raises CheckpointError for missing, damaged
    or contradictory files before any tensor is read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self._files():
            entries, metadata = read_header(file) if file.suffix == ".safetensors" else _bin_header(file)
            double = set(entries) & set(self.entries)
            if double:
                raise CheckpointError(f"{folder}: tensor {min(double)} stands in two files")
            self.entries |= entries
            self.metadata[file.name] = metadata

    def _files(self) -> list[Path]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (self.folder / index).is_file():
                return self._indexed(self.folder / index)
            if (self.folder / single).is_file():
                return [self.folder / single]
        raise CheckpointError(
            f"{self.folder} holds no weights: expected model.safetensors or pytorch_model.bin, or one of their index files"
        )

    def _indexed(self, index: Path) -> list[Path]:
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
            raise CheckpointError(f"{index} has no usable weight_map")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name or Path(name).suffix not in (".safetensors", ".bin"):
                raise CheckpointError(f"{index} names the file {name!r}: only plain names in the same folder are read")
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder} lacks the file {name} that {index.name} names")
        return [self.folder / name for name in files]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, memory-mapped. Raises CheckpointError for a name that isn't there."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.entries:
                raise CheckpointError(f"{self.folder} has no tensor {name}")
            wanted.setdefault(self.entries[name].file, []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            if file.suffix == ".safetensors":
                from safetensors import SafetensorError, safe_open

                try:
                    with safe_open(file, framework="pt") as handle:
                        found |= {name: handle.get_tensor(name) for name in inside}
                except SafetensorError as error:
                    raise CheckpointError(f"{file} is damaged: {error}") from error
            else:
                tensors = _load_bin(file)
                found |= {name: tensors[name] for name in inside}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return _nbytes(self.entries)

    def fingerprint(self) -> str:
        """Changes when a file does: names, sizes and times of modification, without reading the files."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()


class LiveTensors:
    """The tensors of a model in memory, behind the same interface."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.entries = {name: Entry(Path(), tuple(t.shape), t.dtype) for name, t in self.tensors.items()}
        self.metadata: dict[str, dict[str, str]] = {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    @property
    def nbytes(self) -> int:
        return _nbytes(self.entries)

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(name.encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


def _nbytes(entries: dict[str, Entry]) -> int:
    return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries.values())


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data


def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse and check a safetensors header: every tensor's bytes exist, fit its shape, and overlap no other's."""

    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{file} is damaged or no safetensors file: {why}")

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise bad("it is shorter than a header")
        (length,) = struct.unpack("<Q", start)
        if length > min(MAX_HEADER, size - 8):
            raise bad(f"its header claims {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            raise bad(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise bad("its metadata is not a mapping of strings")
    entries: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, item in header.items():
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


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _load_bin(file: Path) -> dict[str, Tensor]:
    try:
        zipped = zipfile.is_zipfile(file)  # torch before 1.6 wrote something else, which can't be mapped
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} can't be read as a file of weights: {reason}") from error
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in data.items()):
        raise CheckpointError(f"{file} holds something else than a dict of tensors")
    return data


def _bin_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    return {name: Entry(file, tuple(t.shape), t.dtype) for name, t in _load_bin(file).items()}, {}
