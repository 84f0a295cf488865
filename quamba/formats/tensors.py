"""Tensor files: names, shapes and dtypes from headers first, bytes later and only those asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.headers import Entry, read_header
from quamba.formats.pickled import load_bin


class Tensors(Protocol):
    """Tensors behind names: files, a model in memory, or a view of either."""

    entries: dict[str, Entry]
    metadata: dict[str, dict[str, str]]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]: ...

    @property
    def nbytes(self) -> int: ...

    def fingerprint(self) -> str: ...


class TensorFiles:
    """All tensors of a folder, sharded or not, safetensors preferred over `pytorch_model.bin`.

    `entries`: name -> Entry. `metadata`: file name -> safetensors metadata. Raises CheckpointError for missing, damaged
    or contradictory files before any tensor is read.
    """

    def __init__(self, folder: Path, prefer_index: bool = False):
        """prefer_index: of an index and a single file beside it, which transformers would read, take the index."""
        self.folder, self.prefer_index = folder, prefer_index
        self.leftover = ""
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._unpickled: dict[Path, dict[str, Tensor]] = {}  # memory-mapped, unless of a torch before 1.6
        for file in self._files():
            if file.suffix == ".safetensors":
                entries, metadata = read_header(file)
            else:
                self._unpickled[file] = load_bin(file)
                entries, metadata = _entries(file, self._unpickled[file]), {}
            double = set(entries) & set(self.entries)
            if double:
                raise CheckpointError(f"{folder}: tensor {min(double)} stands in two files")
            self.entries |= entries
            self.metadata[file.name] = metadata

    def _files(self) -> list[Path]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
            ("consolidated.safetensors", "consolidated.safetensors.index.json"),
        ):
            one, several = (self.folder / single).is_file(), (self.folder / index).is_file()
            if several and (self.prefer_index or not one):
                return self._indexed(self.folder / index)
            if one:
                self.leftover = index if several else ""
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
                found |= {name: self._unpickled[file][name] for name in inside}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        """Changes when a file does: names, sizes and times of modification, without reading the files."""
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in self._files()]
        return hashlib.sha256(repr(stats).encode()).hexdigest()


class LiveTensors:
    """The tensors of a model in memory, behind the same interface."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        self.entries = _entries(Path(), self.tensors)
        self.metadata: dict[str, dict[str, str]] = {}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            total.update(name.encode())
            total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()


class View:
    """Tensors under other names, or made of others. `add` and `make` say where each comes from."""

    def __init__(self, files: Tensors):
        self.files, self.metadata = files, files.metadata
        self.entries: dict[str, Entry] = {}
        self.sources: dict[str, tuple[tuple[str, ...], Callable[..., Tensor] | None]] = {}

    def add(self, name: str, theirs: str) -> None:
        self.entries[name], self.sources[name] = self.files.entries[theirs], ((theirs,), None)

    def make(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, function: Callable[..., Tensor], *theirs: str
    ):
        """`function` of the tensors called `theirs`, made anew each time it is read."""
        file = self.files.entries[theirs[0]].file if theirs else Path()
        self.entries[name], self.sources[name] = Entry(file, shape, dtype), (theirs, function)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        for name in names:
            if name not in self.sources:
                raise CheckpointError(f"there is no tensor {name}")
        theirs = self.files.read(dict.fromkeys(t for name in names for t in self.sources[name][0]))
        found: dict[str, Tensor] = {}
        for name in names:
            sources, function = self.sources[name]
            if function is None:
                found[name] = theirs[sources[0]]
                continue
            entry = self.entries[name]
            try:
                made = function(*(theirs[source] for source in sources))
                found[name] = made.to(entry.dtype).reshape(entry.shape)
            except RuntimeError as error:
                raise CheckpointError(f"{', '.join(sources)} can't become {name}: {error}") from error
        return found

    @property
    def nbytes(self) -> int:
        return self.files.nbytes

    def fingerprint(self) -> str:
        return self.files.fingerprint()


def _entries(file: Path, tensors: dict[str, Tensor]) -> dict[str, Entry]:
    return {name: Entry(file, tuple(t.shape), t.dtype) for name, t in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"can't read {path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return data
