"""SIGKILL at random moments: what is on disk afterwards is nothing, something resumable, or the whole artifact.

The runs are forked from a process that has everything imported and has started no thread, so that a kill can strike
anywhere within a run instead of within the imports. This file run as a script is that process.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

KILLS = {"quantize": 40, "convert": 12}
BUDGET = {"quantize": 45.0, "convert": 12.0}  # seconds for all of them
IDS = [[(7 * i * i + j * (i + 3)) % 64 for j in range(48)] for i in range(12)]


def serve() -> None:
    """Read lines of JSON {what, source, out, delay}; fork a run, kill it after `delay` seconds (or never), answer its
    fate."""
    import safetensors.torch  # noqa: F401
    import torch
    import transformers

    import quamba
    from quamba.formats import convert

    torch.set_num_threads(1)
    # These load lazily: now, and not in every child.
    for name in ("quantize", "QuambaLMHeadModel"):
        getattr(quamba, name)
    getattr(transformers, "GenerationConfig")  # noqa: B009
    for line in sys.stdin:
        order = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            try:
                if order["what"] == "convert":
                    convert(order["source"], order["out"], overwrite=True)
                    os._exit(0)
                with quamba.backend("reference"):
                    quamba.quantize(order["source"], out=order["out"], calibration=torch.tensor(IDS), overwrite=True)
            except BaseException as error:
                print(error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        if order["delay"] is not None:
            time.sleep(order["delay"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print(
            json.dumps({"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}), flush=True
        )


if __name__ == "__main__":
    serve()
    sys.exit()


class Server:
    what = "quantize"

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, source: Path, out: Path, delay: float | None = None) -> dict:
        order = {"what": self.what, "source": str(source), "out": str(out), "delay": delay}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    assert server.process.wait(30) == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("what", ["quantize", "convert"])
def test_killed_at_any_moment_nothing_loads_as_complete_that_is_not(tiny, server, tmp_path, what):
    from quamba import QuambaLMHeadModel
    from quamba.errors import QuambaError

    def loads(folder: Path) -> bool:
        try:
            return QuambaLMHeadModel.from_pretrained(folder) is not None
        except QuambaError:
            return False

    server.what = what
    source = tiny(layers=6, files="safetensors")
    whole = tmp_path / "whole"
    assert server.run(source, whole)["status"] == 0
    expected = contents(whole)
    again = server.run(source, whole)  # replaces it
    assert again["status"] == 0
    assert contents(whole) == expected

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    chance = random.Random(1)
    end = time.monotonic() + BUDGET[what]
    struck = finished = resumable = 0
    while struck < KILLS[what] and time.monotonic() < end:
        fate = server.run(source, out, delay=chance.uniform(0, 0.8 * again["seconds"]))["status"]
        assert fate in (0, -signal.SIGKILL)
        struck += fate != 0
        finished += fate == 0
        assert out.is_dir() or not out.exists()
        if out.exists():
            # Killed just before its replacement it may bear the mark, which the next run takes away.
            marks = {"replaced.json", "replaced.json.tmp"} if fate else set()
            assert {name: data for name, data in contents(out).items() if name not in marks} == expected
            assert loads(out)
        elif fate == 0:
            raise AssertionError("a run that succeeded left no artifact")
        if partial.exists():
            resumable += (partial / "run.json").exists()
            # Only between the last file's sync and the rename, or while a later run clears that away, is it a model.
            assert not loads(partial) or contents(partial).items() <= expected.items()
        if chance.random() < 0.3 and out.exists():
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    assert struck >= KILLS[what] // 3  # all of them, where the machine is fast enough
    assert resumable >= struck // 5
    assert server.run(source, out)["status"] == 0
    assert contents(out) == expected
    assert loads(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny", "whole"]
