import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "cpu.py"
KEYS = {"model", "format", "engine", "threads", "phase", "tokens_per_s", "spread", "ratio_to", "ratio"}


PEAKS = {"read": 20.0, "peak": 200.0, "what": "int8", "by": "C loops"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmarks_cpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=500)


def test_rows_of_one_model_are_complete_and_consistent(tmp_path: Path) -> None:
    small = "--models mamba1-nano --engines quamba --formats float32,W8A8+head --threads 1 --rounds 1 --prompt 16 --decode 4"
    report = tmp_path / "report.md"
    found = run(*small.split(), "--json", str(tmp_path / "rows.json"), "--markdown", str(report))
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert all(row.keys() >= KEYS for row in rows)
    speeds = {(row["format"], row["phase"]): row for row in rows if row["tokens_per_s"] is not None}
    assert speeds.keys() == {(f, p) for f in ("float32", "W8A8+head") for p in ("prefill 16", "decode 4", "generate 4")}
    for (name, phase), row in speeds.items():
        assert row["spread"] == [row["tokens_per_s"]] * 2
        assert row["tokens_per_s"] > 0
        if name == "float32":
            assert row["ratio"] is None
        else:
            assert row["ratio_to"] == "quamba float32"
            assert row["ratio"] == pytest.approx(row["tokens_per_s"] / speeds["float32", phase]["tokens_per_s"])
    decode = speeds["float32", "decode 4"]
    assert decode["gb_per_s"] == pytest.approx(4.45e6 * 4 * decode["tokens_per_s"] / 1e9, rel=0.05)  # float32 weights
    values = {row["phase"] for row in rows if row["tokens_per_s"] is None}
    assert values >= {"first token", "first token and imports", "peak memory", "load", "file"}
    assert report.read_text() in found.stdout


def test_an_engine_that_is_not_there_is_said_to_be_missing(script: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    missing = script.absent(["quamba", "llama.cpp"])
    assert missing.keys() == {"llama.cpp"}
    assert "MISSING llama.cpp: not installed: llama_cpp, gguf" in capsys.readouterr().err
    assert "* MISSING llama.cpp: not installed" in script.report({}, [], {2: PEAKS}, missing)


@pytest.mark.parametrize(
    "number, verdict",
    [({"ratio": 9.1}, "met"), ({"ratio": 8.9}, "MISSED"), ({}, "not measured"), (None, "not measured")],
)
def test_a_bar_is_met_missed_or_not_measured(script: ModuleType, number: dict | None, verdict: str) -> None:
    bar = importlib.import_module("cpu_formats").BARS[0]
    row = {"model": bar.model, "format": bar.format, "engine": "quamba", "phase": bar.phase, "ratio_to": bar.against}
    rows = [] if number is None else [row | {"threads": 1, "ratio": 99}, row | {"threads": 2} | number]
    assert importlib.import_module("cpu_report").judged(bar, rows, threads=2)[-1] == verdict


def test_a_round_that_stalled_is_left_out_and_ratios_stay_inside_a_round(script: ModuleType) -> None:
    ours, theirs = {0: 100.0, 1: 3.0, 2: 90.0}, {0: 50.0, 1: 60.0, 2: 30.0}
    report = importlib.import_module("cpu_report")
    assert report.kept(ours, "decode 128") == {0: 100.0, 2: 90.0}
    assert report.quotients(report.kept(ours, "decode 128"), theirs) == [2, 3]
    assert report.kept(ours, "load") == ours
    assert report.kept(ours | {3: 4.0}, "decode 128") == ours | {3: 4.0}  # two of four: nobody knows which is right
