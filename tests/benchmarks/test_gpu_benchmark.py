"""gpu.py without a GPU: tiny shapes in Triton's interpreter, which goes through all but graphs and events."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from quamba_kernels import triton
from tests.triton.processes import python

pytestmark = pytest.mark.skipif(not triton.available(), reason=triton.why_not())

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    return importlib.import_module("gpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[list[dict], str]:
    """Rows and page of a run on tiny shapes."""
    folder = tmp_path_factory.mktemp("gpu")
    run = ["benchmarks/gpu.py", "--device", "cpu", "--models", "tiny"]
    files = ["--json", str(folder / "rows"), "--markdown", str(folder / "page")]
    done = python(*run, *files, folder=folder, interpreted=True)
    assert "MISSING" not in done.stderr, done.stderr[-4000:]
    return json.loads((folder / "rows").read_text()), (folder / "page").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_format_and_state_has_its_rows(tiny):
    rows, _ = tiny
    steps = {(r["model"], r["format"], r["state"], r["phase"]): r for r in rows if r["kind"] == "step"}
    formats = ("float16", "W8A8", "W4A8", "W4A16")
    for model in ("mamba2-tiny", "mamba-tiny"):
        assert {key[1:] for key in steps if key[0] == model} == {
            *((f, s, "decode") for f in formats for s in ("float32", "int8")),
            *((f, "float32", "prefill") for f in formats if model == "mamba2-tiny"),
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


def test_nothing_left_out_goes_unsaid(script, capsys):
    chosen = argparse.Namespace(models=["mamba2-tiny", "mamba-tiny"], seconds=0, device="cpu", quick=False)
    bench = script.Bench(argparse.Namespace(**vars(chosen), json=None, markdown=None))
    bench.run()
    page = bench.write().splitlines()
    for what in (
        "mamba-tiny, decode at batch 1",
        "mamba2-tiny, prefill of 4",
        "selective scan of mamba-tiny",
        "product 1",
    ):
        assert any(line.startswith(f"* {what}") and line.endswith("no time left") for line in page), what
    assert "MISSING mamba2-tiny, W4A8: no time left" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, error",
    [
        (["--device", "cpu"], "TRITON_INTERPRET=1"),
        (["--models", "mamba-3b", "--device", "cpu"], "unknown: mamba-3b"),
        pytest.param(
            [], "no CUDA or ROCm device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(script, monkeypatch, capsys, arguments, error):
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    with pytest.raises(SystemExit):
        script.arguments()
    assert error in capsys.readouterr().err


@pytest.mark.parametrize("number, verdict", [(1.8, "met"), (1.6, "MISSED"), (None, "not measured")])
def test_a_bar_is_met_missed_or_not_measured(script, number, verdict):
    report = importlib.import_module("gpu_report")
    bar = report.BARS[0]
    row = bar.where | {"ratio": number, "percent": 99}
    other = row | {"batch": 16, "ratio": 99}
    assert report.judged(bar, [other, row])[-1] == verdict
    assert report.judged(bar, [])[-1] == "not measured"
