import json
import os
import shutil

import pytest
from click.testing import CliRunner

from quamba.cli import main


def run(*args):
    return CliRunner().invoke(main, ["eval", *map(str, args)])


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("The old man went to the window and looked at the sea. " * 12)
    return file


def test_it_asks_what_to_measure(tiny_folder):
    result = run(tiny_folder)
    assert result.exit_code == 2
    assert "--task" in result.output and "--perplexity" in result.output and "--against" in result.output


def test_without_a_model_here_it_says_what_to_type(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    result = run("--perplexity", text)
    assert result.exit_code == 2
    assert "quamba quantize mamba1-nano --w8a8" in result.output


def test_it_takes_the_current_folder_or_the_newest_artifact_in_it(tmp_path, monkeypatch, text, tiny_artifact):
    for age, name in ((100, "new"), (900, "old")):
        shutil.copytree(tiny_artifact, tmp_path / name)
        config = tmp_path / name / "config.json"
        os.utime(config, (config.stat().st_mtime - age,) * 2)
    shutil.copytree(tiny_artifact, tmp_path / "unfinished.partial")
    monkeypatch.chdir(tmp_path)
    first = run("--perplexity", text, "--tokenizer", "mamba1-nano")
    assert first.exit_code == 0, first.output
    assert "new" in first.stdout.splitlines()[0] and "newest" in first.stdout.splitlines()[0]
    monkeypatch.chdir(tmp_path / "old")
    here = run("--perplexity", text, "--tokenizer", "mamba1-nano")
    assert here.exit_code == 0 and "current folder" in here.stdout.splitlines()[0]


def test_the_bundled_mamba2(text):
    result = run("mamba2-nano", "--perplexity", text, "--context", "16")
    assert result.exit_code == 0, result.output
    assert "mamba2-nano" in result.output


def test_two_models_side_by_side(tmp_path, text, tiny_artifact, tiny_folder):
    out = tmp_path / "results.json"
    options = ("--against", tiny_folder, "--perplexity", text, "--context", 64, "--tokenizer", "mamba1-nano")
    result = run(tiny_artifact, *options, "--output", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    quantized, reference = (model["texts"]["words.txt"] for model in found["models"])
    assert quantized["tokens"] == reference["tokens"] == found["divergence"]["words.txt"]["tokens"]
    assert 0 < found["divergence"]["words.txt"]["mean_kl"] < 0.5
    assert quantized["perplexity"] == pytest.approx(reference["perplexity"], rel=0.2)
    assert "difference" in result.stdout and "top-1" in result.stdout


@pytest.mark.parametrize("missing", ["model", "text"])
def test_what_is_missing_is_named_without_a_traceback(tmp_path, text, tiny_folder, missing):
    gone = tmp_path / "gone"
    result = run(gone, "--perplexity", text) if missing == "model" else run(tiny_folder, "--perplexity", gone)
    assert result.exit_code == 1
    assert str(gone) in result.output and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
