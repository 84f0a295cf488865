"""The folder an artifact is made in: locked, resumable, and turned into the artifact by one rename."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from quamba.errors import QuambaError
from quamba.formats.artifact import is_artifact, write_atomically

MARK = "replaced.json"
"""In an artifact that is being replaced. A folder `<out>.old` without it is somebody's own."""


class RunFolder:
    """`<out>.partial/` while at work, `<out>` when finished. A context manager holding an exclusive lock.

    `run.json` there says what run it is and how many blocks are done; a folder with it never loads as a model. A run
    with the same key resumes, any other starts over. Raises QuambaError: `<out>` exists and `overwrite` is off, another
    process holds the lock, the place can't be written.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        out = Path(os.path.abspath(out))  # `.` and `..` have no name of their own
        self.out, self.overwrite = out, overwrite
        self.path = out.with_name(out.name + ".partial")
        self.old = out.with_name(out.name + ".old")
        self._made: list[Path] = []
        self._kept = False  # the folder isn't ours
        self._resumable = False
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        self.check()
        self._made = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise QuambaError(f"can't write to {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._lock).st_ino != self.path.stat().st_ino:
                raise BlockingIOError
        except OSError as error:
            os.close(self._lock)
            raise QuambaError(f"another process is quantizing or converting into {self.out} right now") from error
        try:
            self._own()
            self._repair()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, QuambaError) and not self._kept:
            self._remove()
        if self._lock is not None:
            os.close(self._lock)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise QuambaError(
                f"no space left on the device of {self.path}: free some and run the same command again"
                f"{', it resumes after the last finished block' if self._resumable else ''}"
            ) from error

    def _remove(self) -> None:
        """Leave nothing behind: the same call would meet the same error again."""
        shutil.rmtree(self.path, ignore_errors=True)
        for folder in self._made:
            if any(folder.iterdir()):
                break
            folder.rmdir()

    def check(self) -> None:
        """Refuse an output that exists, before any work."""
        if self.out.exists() and not self.overwrite:
            raise QuambaError(f"{self.out} exists: choose another folder or replace it with --overwrite")
        if (self.out.exists() or self.out.is_symlink()) and not self.out.is_dir():
            raise QuambaError(f"{self.out} is no folder")
        if self.out.exists() and any(self.out.iterdir()) and not is_artifact(self.out):
            raise QuambaError(
                f"{self.out} holds something else than a quantized model, which --overwrite won't replace"
            )
        if self.out.exists() and self.old.exists() and not (self.old / MARK).exists():
            raise QuambaError(f"{self.old} is in the way: {self.out.name} moves there for a moment. Rename it first")
        parent = next(p for p in self.path.absolute().parents if p.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise QuambaError(f"can't write to {parent}: choose another folder")

    def _own(self) -> None:
        """Refuse a `.partial` folder that no run of ours made: it would be emptied."""
        names = {entry.name for entry in self.path.iterdir()} - {"run.json.tmp"}
        if names and "run.json" not in names and not is_artifact(self.path):
            self._kept = True
            raise QuambaError(
                f"{self.path} is in the way: this run would work there. Rename it, or choose another folder"
            )

    def _repair(self) -> None:
        """An earlier run was killed between moving the old artifact away and moving the new one in."""
        for name in (MARK, f"{MARK}.tmp"):  # killed before the old artifact moved away
            (self.out / name).unlink(missing_ok=True)
        if (self.old / MARK).exists():
            if self.out.exists():
                self._delete_old()
            else:
                self.old.rename(self.out)
                (self.out / MARK).unlink()
                self.check()

    def _delete_old(self) -> None:
        """The mark goes last: torn off half-way, the rest is still known as ours."""
        for entry in self.old.iterdir():
            if entry.name != MARK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        (self.old / MARK).unlink()
        self.old.rmdir()

    def need(self, nbytes: int, advice: str = "") -> None:
        """QuambaError if the device has less space left than `nbytes`."""
        free = shutil.disk_usage(self.path).free
        if free < nbytes:
            raise QuambaError(
                f"{self.path.parent} has {free / 1e6:.0f} MB left and this run needs about {nbytes / 1e6:.0f} MB: "
                f"choose another folder{advice}"
            )

    def resume(self, key: dict[str, Any]) -> int:
        """Number of blocks that an interrupted run with this very key has finished, or -1 after clearing the folder."""
        try:
            state = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            if state["key"] == key and state["done"] >= 0:
                self._resumable = True
                return int(state["done"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self.mark(key, -1)  # first: torn off while it is cleared, the folder is still known as ours
        for entry in self.path.iterdir():
            if entry.name != "run.json":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return -1

    def mark(self, key: dict[str, Any], done: int) -> None:
        """Record that the shards and the stream up to block `done` are on disk."""
        self._resumable |= done >= 0
        write_atomically(self.path / "run.json", json.dumps({"key": key, "done": done}).encode())

    def finish(self) -> None:
        """Make the folder the artifact: drop what only the run needed, sync, swap."""
        for entry in self.path.iterdir():
            if entry.name.startswith("stream-") or entry.suffix == ".tmp":
                entry.unlink()
        (self.path / "run.json").unlink()
        assert self._lock is not None
        os.fsync(self._lock)
        replaces = self.out.exists()
        if replaces:
            write_atomically(self.out / MARK, b"{}\n")
            self.out.rename(self.old)
        self.path.rename(self.out)
        _sync(self.out.parent)
        if replaces:
            self._delete_old()


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
