"""Exact accumulators on a machine without VNNI, where 8-bit products of common libraries saturate at int16."""

import os
import subprocess
import sys

SCRIPT = """
import torch
import quamba_kernels
from quamba_kernels import cpu

def check(name):
    for k in (1, 2, 64, 1000, 4096):
        for x in (-128, 127):
            for w in (-128, -127, 127):
                xs, ws = torch.full((3, k), x, dtype=torch.int8), torch.full((5, k), w, dtype=torch.int8)
                xs[1, ::2] = 127
                ws[1, 1::2] = -128
                assert torch.equal(quamba_kernels.int8_matmul(xs, ws).long(), xs.long() @ ws.long().T), (name, k, x, w)
    print(name)

with quamba_kernels.backend("reference"):
    check("reference")
for variant in cpu.variants():
    with quamba_kernels.backend("cpu"), cpu.force_variant(variant):
        check(variant)
"""


def test_accumulators_are_exact():
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    from quamba_kernels import cpu

    assert done.stdout.split() == ["reference", *cpu.variants()]
