"""Every kernel compiles for NVIDIA's and AMD's machines, within their shared memory. In a process of its own, because in
Triton's interpreter nothing compiles."""

import json
import re

import pytest

from quamba_kernels import triton
from tests.triton.processes import python

TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
KERNELS = {"_quantize", "_norm", "_gate", "_hadamard", "_embedding", "_linear", "_conv", "conv_product"}
KERNELS |= {"_scan", "_scan_step", "_ssd", "_ssd_step", "_carry"}
TOKENS = {
    "mamba1, a token": {"_linear", "conv_product", "_scan_step"},
    "mamba2, a token": {"_linear", "_conv", "_ssd_step"},
}
REGISTERS = 64 << 10  # of 32 bits, that a block may have
SPILLED = {"cuda": 256, "hip": 512}  # bytes of a thread's memory (its stack) in place of registers


@pytest.fixture(scope="module", params=["first tiles", pytest.param("all tiles", marks=pytest.mark.slow)])
def compiled(request, tmp_path_factory) -> list[dict]:
    """What was compiled: one choice of tiles for three targets, or all of both."""
    targets = TARGETS if request.param == "first tiles" else ()
    lines = python("-m", "tests.triton.aot", *targets, folder=tmp_path_factory.mktemp("aot"), timeout=None).stdout
    return [json.loads(line) for line in lines.splitlines()]


def test_every_kernel_compiles_for_every_target(compiled):
    for target in {c["target"] for c in compiled} | set(TARGETS):
        assert {c["kernel"] for c in compiled if c["target"] == target} == KERNELS
    for op, expected in TOKENS.items():
        assert {c["kernel"] for c in compiled if c["op"] == op} == expected
    if len(compiled) > 1000:  # all versions
        assert {c["op"] for c in compiled} == {*triton.OPS, *TOKENS}


def test_shared_memory(compiled):
    assert all(c["shared"] <= c["most_shared"] for c in compiled), [
        c for c in compiled if c["shared"] > c["most_shared"]
    ]


def test_registers(compiled):
    for c in compiled:
        kind = c["target"].split(":")[0]
        per_warp = c["registers"] * (64 if kind == "hip" else 32)
        assert per_warp * c["warps"] <= REGISTERS * (2 if kind == "hip" else 1), c
        assert c["spilled"] <= SPILLED[kind], c


def test_stores_are_done_before_a_program_says_so(compiled):
    """On AMD's machines each wave has to wait for its own."""
    assert not any(c["unfinished"] for c in compiled), [c for c in compiled if c["unfinished"]]


def test_int8_products_are_tensor_core_instructions(compiled):
    integer = ("int8_matmul", "w8a8_linear", "w4a8_linear", *TOKENS)
    found = [c for c in compiled if c["kernel"] in ("_linear", "conv_product") and c["op"] in integer]
    assert len(found) >= 8 * len(TARGETS)
    for c in found:
        kind = r"(mma\.sync|wgmma|tcgen05).*(s32|i8)" if c["target"].startswith("cuda") else "v_mfma_i32"
        assert c["products"] and all(re.match(kind, p) for p in c["products"]), c
    hopper = {p for c in found if c["target"] == "cuda:90" for p in c["products"]}
    assert any("wgmma" in p for p in hopper)


def test_float_products_keep_the_digits_of_float32(compiled):
    """In three products of TF32, or as they are: one instruction of TF32 alone would lose half of them."""
    for target, kind in {
        "cuda:80": r"mma\.sync.*tf32",
        "cuda:90": r"mma.*tf32",
        "hip:gfx942": r"v_mfma_f32_\w+f32",
    }.items():
        many = [c for c in compiled if c["op"] == "ssd_scan" and c["target"] == target and c["products"]]
        assert many, target
        assert all(re.search(kind, p) and "xf32" not in p for c in many for p in c["products"]), many
