"""What the README tells a first user to type, typed: it ends with a folder that is ready to upload."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from quamba.cli import main

ROOT = Path(__file__).resolve().parents[3]


def commands():
    """The lines of the README's shell blocks that call quamba, without their comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["quamba"]]


def test_the_readme_shows_every_step():
    assert {"quantize", "eval", "generate", "inspect", "doctor"} <= {words[0] for words in commands()}


@pytest.mark.slow
def test_the_readmes_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for words in commands():
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, (words, result.output, result.exception)
    folder = tmp_path / "mamba1-nano-w8a8"
    assert "quamba" in ModelCard.load(folder / "README.md").data.tags
    names = {file.name for file in folder.iterdir()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
    }

    from transformers import AutoTokenizer, pipeline

    write = pipeline("text-generation", model=str(folder), tokenizer=AutoTokenizer.from_pretrained(folder))
    assert write("The old man", max_new_tokens=3)[0]["generated_text"].startswith("The old man")
