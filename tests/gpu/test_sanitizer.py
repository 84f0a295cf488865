"""No kernel reads or writes outside of its tensors: NVIDIA's compute-sanitizer looks on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.cases import COMPILED

pytestmark = [pytest.mark.gpu, COMPILED]

ROOT = Path(__file__).parents[2]
PROBLEM = 86  # the exit status it is asked for


@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="compute-sanitizer isn't on PATH")
def test_memory_of_every_op():
    command = ["compute-sanitizer", "--tool", "memcheck", f"--error-exitcode={PROBLEM}"]
    command += ["--target-processes=all", sys.executable, "-m", "tests.gpu.every_op"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    # Without torch's cache every tensor is an allocation of its own, with ends that are watched.
    environment = os.environ | {"PYTHONPATH": paths, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    output = done.stdout[-6000:] + done.stderr[-3000:]
    if "Device not supported" in output:
        pytest.skip("compute-sanitizer doesn't support this device")
    assert "every op ran" in done.stdout, output
    assert done.returncode == 0 and "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr, output
