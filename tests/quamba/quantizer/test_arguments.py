"""What `quamba.quantize` makes of its arguments."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import quamba
from quamba import QuambaLMHeadModel, bundled
from quamba.errors import QuambaError

IDS = torch.arange(1, 65).view(2, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": nn.Linear(2, 2)}, "can't quantize a Linear"),
        ({"model": None}, "can't quantize a NoneType"),
        ({"recipe": None}, "not NoneType"),
        ({"recipe": {"name": "x"}}, "not dict"),
        ({"calibration": [1, 2]}, "not list"),
        ({"samples": 0}, "samples is 0"),
        ({"seq_len": 1}, "seq_len is 1"),
        ({"device": "meta"}, "can't be used"),
        ({"dtype": "int8"}, "dtype can't be"),
    ],
)
def test_wrong_ones_are_named(arguments, message):
    with pytest.raises(QuambaError, match=message):
        quamba.quantize(**{"model": "mamba1-nano", "calibration": IDS} | arguments)


def test_paths_are_as_good_as_strings(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(bundled.calibration_text()[:4000])
    recipe = quamba.recipe.configs_dir() / "mamba1-w8a8.yaml"
    quamba.quantize(bundled.model_path("mamba1-nano"), recipe, calibration=text, seq_len=64, samples=2)


def test_a_live_model_takes_a_tokenizer_by_name_and_keeps_its_generation_config(tmp_path):
    live = QuambaLMHeadModel.from_pretrained("mamba1-nano")
    live.generation_config.repetition_penalty = 1.25
    quamba.quantize(live, tokenizer="mamba1-nano", out=tmp_path / "out", samples=2, seq_len=64)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["repetition_penalty"] == 1.25


def test_the_current_folder_keeps_its_generation_config(tmp_path, monkeypatch):
    monkeypatch.chdir(bundled.model_path("mamba1-nano"))
    quamba.quantize(".", out=tmp_path / "out", calibration=IDS)
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == Path("generation_config.json").read_bytes()


def test_more_samples_than_there_are_is_said(caplog, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(bundled.calibration_text()[:4000])
    quamba.quantize("mamba1-nano", calibration=str(text), samples=1000, seq_len=64)
    assert "has only" in caplog.text
