"""Processes of their own for tests, without the seconds that torch takes to be imported: children of one process in which
torch is imported and nothing else of ours, transformers' or the hub's."""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest


class Forks:
    """`run` is `subprocess.run([sys.executable, *arguments])` for `-c CODE` and `-m MODULE`, with captured text."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: int = 120
    ) -> subprocess.CompletedProcess[str]:
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            order: dict[str, Any] = {"arguments": arguments, "cwd": str(cwd or Path.cwd()), "timeout": timeout}
            order |= {"env": dict(os.environ if env is None else env), "out": f"{folder}/out", "err": f"{folder}/err"}
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            status = json.loads(self.process.stdout.readline())
            out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(arguments, status, out, err)


@pytest.fixture(scope="session")
def forks():
    found = Forks()
    yield found
    found.process.stdin.close()
    assert found.process.wait(30) == 0


def child(order: dict[str, Any]) -> int:
    """Carry out an order in this process; its exit status."""
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    for number, file in ((0, "/dev/null"), (1, order["out"]), (2, order["err"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(order["timeout"])
    kind, what, *rest = order["arguments"]
    sys.argv = [kind, *rest]
    try:
        if kind == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    import torch  # noqa: F401

    sys.path.pop(0)  # this file's folder
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            status = child(json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
