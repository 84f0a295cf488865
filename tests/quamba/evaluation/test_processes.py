"""An evaluation shared by two processes gives what one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quamba.errors import QuambaError
from quamba.evaluation.processes import ALONE, joined
from tests.quamba.evaluation.local_tasks import KINDS, write_tasks

ROOT = Path(__file__).resolve().parents[3]
ROWS = 11  # odd: the processes have unequal shares


def quamba(tmp_path, *arguments, processes=1, **environment):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "quamba"]
    command = [sys.executable, *(launcher if processes > 1 else ["-m", "quamba"]), *map(str, arguments)]
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    places = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    more = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | places | environment
    return subprocess.run(
        command, cwd=tmp_path, env=os.environ | more, capture_output=True, text=True, timeout=540, check=False
    )


@pytest.fixture(scope="module")
def needs_accelerate():
    pytest.importorskip("accelerate", reason="evaluation in several processes needs accelerate")


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path, tiny_folder, tiny_artifact, needs_accelerate):
    tasks = write_tasks(tmp_path / "tasks", ROWS)
    (tmp_path / "words.txt").write_text("The old man went to the window and looked at the sea. " * 40)
    found = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        done = quamba(
            tmp_path,
            *("eval", tiny_artifact, "--against", tiny_folder, "--tokenizer", "mamba1-nano", "--output", out),
            *("--task", ",".join(KINDS), "--include", tasks, "--data", tasks, "--max-length", 24, "--batch-size", 2),
            *("--perplexity", "words.txt", "--context", 32),
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("tiny_loglikelihood") == 3  # one table: two metrics of lm-eval's and ours
        found.append(json.loads(out.read_text()))
    same(*found)
    assert not list((tmp_path / "cache" / "quamba" / "eval").iterdir())


def test_without_accelerate_it_says_what_to_install(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(QuambaError, match="pip install accelerate"), joined(None):
        pass


def test_alone_nothing_is_shared(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cuda") as processes:
        assert processes is ALONE and processes.first and processes.device("cuda") == "cuda"
        assert processes.merge({1: "a"}) == {1: "a"}
        processes.wait()


def same(a, b, where="results"):
    """Equal but for the last bits of float32 sums over another set of rows."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{i}]")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5), where
    else:
        assert a == b, where
