"""Some tests of Triton's kernels need a process of their own for a minute: it is started when all tests are known, to run
beside the others, and waited for where they stand. For `conftest.py` to import."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from quamba_kernels import triton

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "test_kernels_in_the_interpreter": (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/interpreted"],
        {"TRITON_INTERPRET": "1"},
    ),
    "test_every_kernel_compiles_for_every_target[first tiles]": (
        ["-m", "tests.triton.aot", "cuda:80", "cuda:90", "hip:gfx942"],
        {},
    ),
    "test_every_kernel_compiles_for_every_target[all tiles]": (["-m", "tests.triton.aot"], {}),
    "test_every_format_and_state_has_its_rows": (
        [
            "benchmarks/gpu.py",
            "--device",
            "cpu",
            "--models",
            "tiny",
            "--json",
            "{folder}/rows",
            "--markdown",
            "{folder}/page",
        ],
        {"TRITON_INTERPRET": "1"},
    ),
}


class Background:
    """A run in a process of its own. Its output goes to files: nobody reads a pipe meanwhile."""

    def __init__(self, arguments: list[str], environment: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory(prefix="quamba-triton-")
        self.files = [Path(self.folder.name) / name for name in ("out", "err")]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        env |= {"TRITON_CACHE_DIR": self.folder.name, "OMP_NUM_THREADS": "1"}
        out, err = (file.open("wb") for file in self.files)
        with out, err:
            command = [sys.executable, *(argument.format(folder=self.folder.name) for argument in arguments)]
            self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)

    def wait(self) -> tuple[int, str, str]:
        """Its exit status and what it printed."""
        status = self.process.wait()
        out, err = (file.read_text(encoding="utf-8", errors="replace") for file in self.files)
        return status, out, err

    def read(self, name: str) -> str:
        """A file that it wrote to its {folder}."""
        return (Path(self.folder.name) / name).read_text(encoding="utf-8")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


_running: dict[str, Background] = {}


def pytest_collection_finish(session):
    wanted = {item.name for item in session.items} & set(COMMANDS)
    if triton.available() and not triton.interpreting() and not session.config.option.collectonly:
        _running.update({name: Background(*COMMANDS[name]) for name in sorted(wanted)})


def pytest_sessionfinish():
    for background in _running.values():
        background.stop()


@pytest.fixture(scope="module")
def background():
    """A run that was started, by the name of its test; skips without triton."""

    def find(name: str) -> Background:
        if not triton.available():
            pytest.skip(triton.why_not())
        return _running.get(name) or _running.setdefault(name, Background(*COMMANDS[name]))

    return find
