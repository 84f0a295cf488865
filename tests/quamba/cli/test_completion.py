"""Shell completion: click's own, with quamba's commands, options and models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from quamba.bundled import MODELS
from quamba.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]


def completed(*words):
    *before, incomplete = words
    found = BashComplete(main, {}, "quamba", "_QUAMBA_COMPLETE").get_completions(list(before), incomplete)
    return [(item.type, item.value) for item in found]


def test_commands_options_and_models():
    assert [value for _, value in completed("")] == list(COMMANDS)
    assert completed("quan") == [("plain", "quantize")]
    assert ("plain", "--apply-gptq") in completed("quantize", "mamba1-nano", "--apply")
    for words in (("inspect", ""), ("eval", ""), ("eval", "x", "--against", ""), ("doctor", ""), ("convert", "")):
        assert completed(*words) == [("dir", ""), *(("plain", name) for name in MODELS)]
    assert completed("inspect", "mamba2") == [("dir", "mamba2"), ("plain", "mamba2-nano")]
    assert [value for _, value in completed("completion", "")] == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_asks_quamba(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"_QUAMBA_COMPLETE={shell}_complete" in result.stdout


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_in_a_real_bash_and_at_once(tmp_path):
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    program = tmp_path / "quamba"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m quamba "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "COMP_WORDS": "quamba ins"}
    environment |= {"COMP_CWORD": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = (
        'eval "$(quamba completion bash)"; COMP_WORDS=(quamba ins); COMP_CWORD=1; '
        '_quamba_completion quamba ins quamba; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "inspect", done.stderr
    times = []
    for _ in range(3):
        started = time.monotonic()
        asked = environment | {"_QUAMBA_COMPLETE": "bash_complete", "COMP_WORDS": "quamba eval mam", "COMP_CWORD": "2"}
        done = subprocess.run([program], env=asked, capture_output=True, text=True, timeout=60, check=False)
        times.append(time.monotonic() - started)
        assert "plain,mamba1-nano" in done.stdout, done.stderr
    assert min(times) < 1, times
