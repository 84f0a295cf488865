"""The package works without triton, mamba-ssm and the compiled library, and says what it runs on."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ("triton", "mamba_ssm"):
    sys.modules[name] = None  # an import raises ImportError
import quamba_kernels.cpu.library as library
library._find = lambda: None
import torch, quamba, quamba_kernels
print(quamba_kernels.describe())
assert quamba_kernels.backend_name() == "reference"
model = quamba.QuambaLMHeadModel.from_pretrained("mamba1-nano", dtype="float32")
ids = torch.arange(1, 9)[None]
out = quamba.quantize(model, "w8a8", calibration=ids.repeat(2, 1)).generate(ids, max_new_tokens=2, do_sample=False)
print(out.shape[1])
"""


def test_without_any_of_them():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("torch reference kernels (") and "compiler" in first
    assert last == "10"
