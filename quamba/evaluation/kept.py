"""Finished answers of an evaluation, kept on disk until all of it is done: a killed run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt")


class Answers:
    """key -> answer (plain JSON), a line each in `<folder>/<rank>.jsonl`; every process reads all and writes its own.

    Without a folder nothing is kept. A line that a kill tore off is ignored. `prefix` goes in front of every key.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0):
        self.folder, self.prefix = folder, ""
        self._known: dict[str, Any] = {}
        self._file: IO[str] | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.glob("*.jsonl")):
            self._known |= dict(_lines(file))
        self._file = (folder / f"{rank}.jsonl").open("a", encoding="utf-8")
        self._file.write("\n" if self._file.tell() else "")

    @property
    def left(self) -> int:
        """How many an interrupted run has left."""
        return len(self._known)

    def of(self, prefix: str) -> Answers:
        """The same store for one model's answers."""
        part = Answers()
        part.folder, part.prefix, part._known, part._file = self.folder, prefix, self._known, self._file
        return part

    def get(self, key: str) -> Any | None:
        return self._known.get(self.prefix + key)

    def put(self, key: str, answer: Any) -> None:
        if self._file is not None:
            self._file.write(json.dumps([self.prefix + key, answer]) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Nothing more comes. A folder in which nothing was kept goes."""
        if self._file is None or self.folder is None:
            return
        self._file.close()
        file = Path(self._file.name)
        with contextlib.suppress(OSError):
            if file.stat().st_size == 0:
                file.unlink()
                self.folder.rmdir()

    def discard(self) -> None:
        """All is done: nothing is left on disk."""
        self.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _lines(file: Path) -> Iterable[tuple[str, Any]]:
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            key, answer = json.loads(line)
            yield key, answer


def digest(*parts: Any) -> str:
    """Of plain JSON data."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def run_folder(models: Mapping[str, Path], settings: Mapping[str, Any]) -> Path:
    """Where the answers of a run of these models (label -> folder) with these settings are kept.

    Below `$XDG_CACHE_HOME/quamba/eval`, `~/.cache` by default. Other files in a model's folder (by name, size and time of
    change), other settings or other versions of the libraries mean another folder.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quamba" / "eval"
    files = {label: [str(folder.resolve()), _facts(folder)] for label, folder in models.items()}
    versions = {name: version(name) for name in ("torch", "transformers", "lm_eval")}
    from quamba import __version__

    return root / digest(files, dict(settings), versions, __version__)[:16]


def _facts(folder: Path) -> list[tuple[str, int, int]]:
    found = sorted({file for pattern in _FILES for file in folder.glob(pattern)})
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in found]
