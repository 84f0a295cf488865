"""Some thousand damaged checkpoints; `make fuzz` tries many more."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, forks, and limits its memory")
def test_damaged_checkpoints_are_refused_or_harmless():
    command = [sys.executable, "-m", "tests.quamba.formats.fuzz", "--mutants", "3000", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3000 mutants with seed 7: 0 went wrong" in done.stdout


def test_the_fuzzer_notices(tmp_path):
    """With the check of hashes switched off, flipped bits go unnoticed."""
    script = (
        "import sys; from quamba.formats import artifact; from tests.quamba.formats import fuzz;"
        "artifact.check_hashes = lambda *_: None; sys.argv = ['fuzz', '--mutants', '400', '--seed', '3']; fuzz.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert "a flipped bit went unnoticed by verify" in done.stdout, done.stdout + done.stderr
