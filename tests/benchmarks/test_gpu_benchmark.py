"""gpu.py without a GPU: tiny shapes in Triton's interpreter, which goes through all but graphs and events."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from quamba_kernels import triton

pytestmark = pytest.mark.skipif(not triton.available(), reason=triton.why_not())

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module("gpu_report")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=env, timeout=300
    )


@pytest.fixture(scope="module")
def tiny(background) -> tuple[list[dict], str]:
    """Rows and page of a run on tiny shapes."""
    run = background("test_every_format_and_state_has_its_rows")
    status, _, err = run.wait()
    assert status == 0, err[-4000:]
    assert "MISSING" not in err, err[-4000:]
    return json.loads(run.read("rows")), run.read("page")


@pytest.mark.slow
def test_every_format_and_state_has_its_rows(tiny):
    rows, _ = tiny
    steps = {(r["model"], r["format"], r["state"], r["phase"]): r for r in rows if r["kind"] == "step"}
    formats = ("float16", "W8A8", "W4A8", "W4A16")
    for model in ("mamba2-tiny", "mamba-tiny"):
        assert {key[1:] for key in steps if key[0] == model} == {
            *((f, s, "decode") for f in formats for s in ("float32", "int8")),
            *((f, "float32", "prefill") for f in formats),
        }
    for (_, format, state, _), row in steps.items():
        assert row["spread"][0] <= row["tokens_per_s"] <= row["spread"][1]
        assert row["bytes"] > row["weights"] / 4 and row["operations"] > 0 and row["percent"] > 0
        assert row["ms"] > 0 and row["how"] == "no graph: main memory" and row["launch_ms"] is None
        assert (row["launches"] is None) == (row["phase"] == "prefill")  # those of a graph aren't counted here
        if (format, state) == ("float16", "float32"):
            assert row["ratio"] == 1
        assert row["memory"] >= row["weights"] + row["states"]
    one = steps["mamba2-tiny", "W8A8", "int8", "decode"]
    assert one["states"] < 0.5 * steps["mamba2-tiny", "W8A8", "float32", "decode"]["states"]


@pytest.mark.slow
def test_single_kernels_and_probes(tiny):
    rows, page = tiny
    measured = {(r["kind"], r.get("by")) for r in rows if r["kind"] in ("product", "scan") and "ms" in r}
    assert measured >= {
        ("product", f"quamba {op}") for op in ("int8_matmul", "w8a8_linear", "w4a8_linear", "w4_linear")
    }
    assert measured >= {("product", "torch float16"), ("scan", "quamba float16"), ("scan", "quamba int8")}
    assert {r["what"] for r in rows if r["kind"] == "probe" and r["rate"]} == {"bytes", "float16", "int8"}
    assert "mamba-ssm's kernels need a GPU" in page  # listed as missing
    assert "NONE: a run in main memory" in page


def test_nothing_left_out_goes_unsaid(tmp_path):
    done = run("--device", "cpu", "--models", "tiny", "--seconds", "0", TRITON_INTERPRET="1")
    assert done.returncode != 0 and "nothing was measured" in done.stderr
    for what in (
        "mamba-tiny, decode at batch 1",
        "mamba2-tiny, prefill of 16",
        "selective scan of mamba-tiny",
        "product 1",
    ):
        assert any(line.startswith(f"* {what}") and "no time left" in line for line in done.stdout.splitlines()), what


def test_main_memory_needs_the_interpreter():
    environment = {"TRITON_INTERPRET": "0"}
    done = run("--device", "cpu", "--models", "tiny", **environment)
    assert done.returncode == 2 and "TRITON_INTERPRET=1" in done.stderr


@pytest.mark.parametrize("number, verdict", [(1.8, "met"), (1.6, "MISSED"), (None, "not measured")])
def test_a_bar_is_met_missed_or_not_measured(report, number, verdict):
    bar = report.BARS[0]
    row = bar.where | {"ratio": number, "percent": 99}
    other = row | {"batch": 16, "ratio": 99}
    assert report.judged(bar, [other, row])[-1] == verdict
    assert report.judged(bar, [])[-1] == "not measured"
