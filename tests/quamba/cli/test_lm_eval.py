"""`quamba lm-eval` is lm-eval's own command line on models that transformers knows through quamba."""

from __future__ import annotations

import json
import sys

import datasets
import pytest
from click.testing import CliRunner

from quamba.cli import main
from quamba.formats import load_tokenizer
from tests.quamba.evaluation.local_tasks import write_tasks


def test_everything_is_passed_through(monkeypatch):
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(list(sys.argv)))
    before = list(sys.argv)
    for words in (
        ["run", "--model", "hf", "--tasks", "a,b", "-h", "--json"],
        ["ls", "tasks"],
        ["--help"],
        ["--model_args", "pretrained=x,dtype=float32", "--limit=3", "-q", "-v"],
    ):
        assert CliRunner().invoke(main, ["lm-eval", *words], catch_exceptions=False).exit_code == 0
        assert seen.pop() == ["lm-eval", *words]
    assert sys.argv == before


def test_its_own_help():
    result = CliRunner().invoke(main, ["lm-eval", "run", "--help"])
    assert result.exit_code == 0 and "--model_args" in result.stdout


def test_an_artifact_is_a_model_of_hf(tmp_path, tiny_artifact, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    tasks = write_tasks(tmp_path / "tasks")
    words = tmp_path / "words"
    load_tokenizer("mamba1-nano").save_pretrained(words)
    arguments = [
        *("run", "--model", "hf", "--model_args", f"pretrained={tiny_artifact},tokenizer={words},max_length=24"),
        *("--tasks", str(tasks / "tiny_choice.yaml"), "--batch_size", "1", "--device", "cpu"),
        *("--output_path", str(tmp_path / "theirs")),
    ]
    result = CliRunner().invoke(main, ["lm-eval", *arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]["tiny_choice"]
    ours = CliRunner(env={"XDG_CACHE_HOME": str(tmp_path / "cache")}).invoke(
        main,
        [
            *("eval", str(tiny_artifact), "--tokenizer", str(words), "--task", "tiny_choice", "--max-length", "24"),
            *("--include", str(tasks), "--data", str(tasks), "--batch-size", "1", "--json"),
        ],
    )
    metrics = json.loads(ours.stdout)["models"][0]["tasks"][0]["metrics"]
    for name in ("acc", "acc_norm"):
        assert metrics[name]["value"] == theirs[f"{name},none"]
        assert metrics[name]["stderr"] == pytest.approx(theirs[f"{name}_stderr,none"])
