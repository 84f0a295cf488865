"""Triton's interpreter and its compiler exclude each other in a process, so each of them gets its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from quamba_kernels import triton

ROOT = Path(__file__).parents[2]


def python(
    *arguments: str, folder: Path, interpreted: bool = False, timeout: int | None = 600
) -> subprocess.CompletedProcess[str]:
    """A process that must end well; `folder`: for its cache. Skips without triton."""
    if not triton.available():
        pytest.skip(triton.why_not())
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    env |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TRITON_CACHE_DIR": str(folder)}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return done
