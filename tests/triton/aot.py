"""Compile the kernels that the ops would launch for GPUs that need not be here: `python -m tests.triton.aot [TARGET ...]`.
Some versions of each kernel; without targets all versions for all of them, with all tiles that products may be cut into.

Prints one JSON object a line: op, kernel, target, bytes of shared memory, registers, and which instructions multiply
matrices. The ops run with their launches caught, so what is compiled is what they would launch. Triton compiles only where
TRITON_INTERPRET isn't set.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton as triton_package
import triton.language as tl
from triton import compile as triton_compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quamba_kernels import triton
from quamba_kernels.recording import listening
from quamba_kernels.triton import common, recording, tiles
from quamba_kernels.triton.common import Launch
from quamba_kernels.triton.fusion import fused

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:89": GPUTarget("cuda", 89, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx90a": GPUTarget("hip", "gfx90a", 64),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {  # bytes that a block may have
    "cuda:80": 163 << 10,
    "cuda:89": 99 << 10,
    "cuda:90": 227 << 10,
    "cuda:100": 227 << 10,
    "hip:gfx90a": 64 << 10,
    "hip:gfx942": 64 << 10,
}
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
CUOBJDUMP = Path(triton_package.__file__).parent / "backends/nvidia/bin/cuobjdump"
PRODUCTS = r"wgmma\.mma_async\S*|mma\.sync\S*|tcgen05\.mma\S*|v_mfma_\w+"


def blank(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return blank(*shape, dtype=dtype)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """One call for each kernel and each way in which it is used, on the shapes of a 2.8b model."""
    half, width, one = torch.float16, 2560, floats()
    x, w, inv = floats(100, width, dtype=half), floats(width), floats(width)
    yield "quantize", lambda: triton.quantize(x, inv)
    yield "quantize_per_token", lambda: triton.quantize_per_token(x)
    yield "rms_norm", lambda: triton.rms_norm(x, w, 1e-5, one)
    yield "rms_norm_per_token", lambda: triton.rms_norm_per_token(x.bfloat16(), w, 1e-5)
    yield "gated_rms_norm", lambda: triton.gated_rms_norm(x, blank(100, width), w, 1e-5, 8, z_scale=inv)
    yield "gate", lambda: triton.gate(x, blank(100, width), z_scale=inv)
    yield "hadamard", lambda: triton.hadamard(floats(100, 5120), floats(20, 20), 1, floats(5120))
    yield "hadamard_per_token", lambda: triton.hadamard_per_token(floats(100, 4096, dtype=half), None)
    yield "hadamard_per_token", lambda: triton.hadamard_per_token(floats(100, 1 << 14), None)  # the widest for all
    ids = blank(2, 7, dtype=torch.int64)
    packed, groups = blank(5120, width // 2, dtype=torch.uint8), blank(5120, width // 32)
    weight, s = blank(5120, width), floats(5120)
    for rows in (2048, 1, 60):
        c, scale = blank(rows, width), floats(rows, 1)
        yield "w8a8_linear", lambda c=c, scale=scale: triton.w8a8_linear(c, scale, weight, s, s, s)
        yield "w4a8_linear", lambda c=c, scale=scale: triton.w4a8_linear(c, scale, packed, groups, s)
        f = floats(rows, width, dtype=half)
        yield "w8_linear", lambda f=f: triton.w8_linear(f, weight, s)
        yield "w4_linear", lambda f=f: triton.w4_linear(f.bfloat16(), packed, groups, s)
    yield "int8_matmul", lambda: triton.int8_matmul(blank(1, width), weight)
    yield "w4a8_linear", lambda: triton.w4a8_linear(blank(1, width), one, packed, groups.half(), s)
    yield "w4_linear", lambda: triton.w4_linear(floats(100, width), packed, groups.half(), s)
    yield "embedding", lambda: triton.embedding(ids, weight, s)
    yield "embedding", lambda: triton.embedding(ids, packed, s, groups, width)
    conv = blank(5120, 4)
    for length in (1, 1000):
        c, g = blank(2, length, 5120), {"x_scale": s, "weight_scale": s, "inv": s, "state": blank(2, 5120, 3)}
        g["mask"] = blank(2, length, dtype=torch.bool)
        yield "causal_conv1d", lambda c=c, g=g: triton.causal_conv1d(c, conv, s, **g)
    yield from scans()


def scans() -> Iterator[tuple[str, Callable[[], Any]]]:
    """One token and many, whole and cut into stretches, with states in every dtype."""
    one, s, h = floats(), floats(5120), floats(80)
    for length, batch, dtype in [
        (1, 2, torch.float32),
        (1, 1, torch.float16),
        (1, 1, torch.int8),
        (1000, 2, torch.float32),
        (1000, 1, torch.float16),
        (1000, 1, torch.int8),
    ]:
        mask = {"mask": blank(batch, length, dtype=torch.bool)} if batch > 1 else {}
        c, dt, bc = blank(batch, length, 5120), floats(batch, length, 5120), floats(batch, length, 16)
        held = mask | state(dtype, batch, 5120, 16)
        scales = {"u_scale": s, "z_scale": s}
        yield (
            "selective_scan",
            partial(triton.selective_scan, c, dt, floats(5120, 16), bc, bc, s, c, s, **held, **scales),
        )
        x, dt, bc = c.unflatten(2, (80, 64)), floats(batch, length, 80), blank(batch, length, 1, 128)
        held = mask | state(dtype, batch, 80, 64, 128)
        scales = {"x_scale": s, "B_scale": one, "C_scale": one}
        yield "ssd_scan", partial(triton.ssd_scan, x, dt, h, bc, bc, h, h, **held, **scales)
    wide = [(12, 256, torch.float32), (1000, 16, torch.float32)]
    wide += [(1000, states, dtype) for states in (128, 256) for dtype in (torch.float32, torch.bfloat16)]
    for length, states, dtype in wide:
        x, bc = blank(1, length, 80, 64, dtype=dtype), blank(1, length, 8, states, dtype=dtype)
        dt = floats(1, length, 80)
        yield "ssd_scan", partial(triton.ssd_scan, x, dt, h, bc, bc, floats(80, 64), h)


def state(dtype: torch.dtype, *shape: int) -> dict[str, torch.Tensor]:
    scale = {"state_scale": floats(*shape[:-1])} if dtype == torch.int8 else {}
    return {"state": blank(*shape, dtype=dtype), **scale}


def tokens() -> Iterator[tuple[str, Callable[[], torch.Tensor], list[torch.Tensor]]]:
    """A block's one token, then the next block's norm, as a function to record, and what varies in it."""
    width, inner, half = 2560, 5120, torch.float16
    w, s, bias = floats(width), floats(inner), floats(inner)
    outer = floats(20, 20)
    for bits, rows in ((8, 1), (4, 3)):
        residual, codes, scale = floats(rows, 1, width, dtype=half), blank(rows, 1, width), floats(rows, 1, 1)
        linear = partial(product, bits)
        conv, past = blank(inner, 4), blank(rows, inner, 3)
        scales = {"x_scale": s, "weight_scale": s, "inv": s}
        state = floats(rows, inner, 16)

        def mamba1(linear=linear, r=residual, c=codes, cs=scale, conv=conv, past=past, scales=scales, state=state):
            x, z = linear(2 * inner, c, cs, inv=floats(2 * inner)).chunk(2, -1)
            x = triton.causal_conv1d(x, conv, bias, state=past, **scales)
            low, B, C = linear(192, x, floats()).split([160, 16, 16], -1)
            dt = triton.w8_linear(low, blank(inner, 160), s)
            rest = (floats(inner, 16), B, C, s, z, s)
            y = triton.selective_scan(x, dt, *rest, state=state, u_scale=s, z_scale=s)
            total = r + linear(width, *triton.hadamard_per_token(y, outer)).to(half)
            return everything(*triton.rms_norm_per_token(total, w, 1e-5))

        yield "mamba1", mamba1, [residual, codes, scale, past, state]
        past, state = blank(rows, inner + 256, 3), floats(rows, 80, 64, 128)
        scales = {"x_scale": floats(inner + 256), "weight_scale": floats(inner + 256), "inv": floats(inner + 256)}
        conv = blank(inner + 256, 4)

        def mamba2(linear=linear, r=residual, c=codes, cs=scale, conv=conv, past=past, scales=scales, state=state):
            coded, dt = linear((2 * inner + 256, 80), c, cs, inv=floats(2 * inner + 256))
            z, x = coded.split([inner, inner + 256], -1)
            x, B, C = triton.causal_conv1d(x, conv, None, state=past, **scales).split([inner, 128, 128], -1)
            h, one = floats(80), floats()
            B, C = B.unflatten(-1, (1, 128)), C.unflatten(-1, (1, 128))
            scale = {"x_scale": one, "B_scale": one, "C_scale": one}
            y = triton.ssd_scan(x.unflatten(-1, (80, 64)), dt, h, B, C, h, h, state=state, **scale).flatten(-2)
            y = triton.gated_rms_norm(y, z, s, 1e-5, z_scale=s)
            total = r + linear(width, *triton.hadamard_per_token(y, outer)).to(half)
            return everything(*triton.rms_norm_per_token(total, w, 1e-5))

        yield "mamba2", mamba2, [residual, codes, scale, past, state]


def product(bits: int, outputs: int | tuple[int, int], x: torch.Tensor, scale: torch.Tensor, inv=None):
    """A linear with an integer weight; with two numbers of outputs, codes and floats of the same weight."""
    rows, inputs = outputs if isinstance(outputs, int) else sum(outputs), x.shape[-1]
    s = floats(rows)
    weights = [blank(rows, inputs)]
    if bits == 4:
        weights = [blank(rows, inputs // 2, dtype=torch.uint8), blank(rows, inputs // 32)]
    op = triton.w8a8_linear if bits == 8 else triton.w4a8_linear
    if isinstance(outputs, int):
        return op(x, scale, *weights, s, None, inv)
    first, last = slice(outputs[0]), slice(outputs[0], None)
    return (
        op(x, scale, *(w[first] for w in weights), s[first], None, inv),
        op(x, scale, *(w[last] for w in weights), s[last]),
    )


def everything(*results: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.float().flatten() for t in results])


def launches(target: str, place: int = 0) -> Iterator[tuple[str, Launch]]:
    """What each call launches, and each token in its recording, with the tiles of that place among those that fit the target
    (the last where there are fewer); nothing runs."""
    Launch.__call__ = lambda self: None  # type: ignore[method-assign]

    def choose(rows: int, size: int, packed: bool, device: torch.device) -> tiles.Tile:
        fitting = [tile for tile in tiles.candidates(rows, size, packed) if tile.shared(size, packed) <= SHARED[target]]
        return fitting[min(place, len(fitting) - 1)]

    matmul = importlib.import_module("quamba_kernels.triton.matmul")
    matmul.choose = choose
    common.ON_AMD = tl.constexpr(target.startswith("hip"))
    for name in {*triton.OPS.values(), "matmul"}:
        module = importlib.import_module(f"quamba_kernels.triton.{name}")
        if hasattr(module, "processors"):
            module.processors = lambda device: 132  # so many that sums and sequences are cut
        if hasattr(module, "product_precision"):
            module.product_precision = lambda: "tf32x3" if target.startswith("cuda") else "ieee"
    for family, function, varying in tokens():
        recorder = recording._Recorder(varying, [])
        result = recorder.watch(function)
        steps = fused(recorder.steps, result)
        yield from ((f"{family}, a token", step) for step in steps if isinstance(step, Launch))
    for op, call in calls():
        listening.to = caught = Caught()
        call()
        listening.to = None
        yield from ((op, step) for step in caught.steps)


class Caught:
    """Stands for a recorder."""

    def __init__(self) -> None:
        self.steps: list[Launch] = []
        self.paused = False

    def note(self, step: Launch) -> None:
        self.steps.append(step)


def source(step: Launch) -> ASTSource:
    """Specialised as Triton does it at a launch: None and 1 are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(step.kernel.params):
        value = step.given.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
        is_tensor = isinstance(value, torch.Tensor)
        kind = "*" + NAMES[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
        signature[parameter.name] = kind
    return ASTSource(fn=step.kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers of a thread, and bytes of memory that stand in for missing ones."""
    if not target.startswith("cuda"):
        found = [
            re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"]) for name in ("vgpr_count", "vgpr_spill_count")
        ]
        registers, spilled = (int(match[1]) if match else 0 for match in found)
        return {"registers": registers, "spilled": 4 * spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (max(map(int, re.findall(rf"{key}:(\d+)", text))) for key in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local}


def unfinished(text: str) -> int:
    """How many atomic additions of AMD's code come without a wait for the stores of all waves before the barrier that precedes
    them."""
    before = [part[: part.rindex("s_barrier")] for part in text.split("global_atomic_add")[:-1]]
    return sum("vmcnt(0)" not in re.split(r"(?:global|buffer)_store", part)[-1] for part in before)


def main(targets: list[str], places: int = 1, most: int | None = None) -> None:
    """places: how many choices of tiles; most: how many versions of a kernel, but for six times as many products."""
    for target in targets:
        seen: set[tuple] = set()
        count: Counter[str] = Counter()
        for op, step in (found for place in range(places) for found in launches(target, place)):
            names = {parameter.name for parameter in step.kernel.params}
            options = {name: value for name, value in step.given.items() if name not in names}
            wanted = source(step)
            key = (op, step.kernel.fn.__name__, repr(sorted(wanted.signature.items())), repr(wanted.constants))
            name = step.kernel.fn.__name__
            if key in seen or (most is not None and count[name] >= (6 * most if name == "_linear" else most)):
                continue
            seen.add(key)
            count[name] += 1
            began = time.monotonic()
            compiled = triton_compile(wanted, target=TARGETS[target], options=options)
            text = compiled.asm["ptx" if target.startswith("cuda") else "amdgcn"]
            line = {"op": op, "kernel": step.kernel.fn.__name__, "target": target, "shared": compiled.metadata.shared}
            line |= {"most_shared": SHARED[target], "seconds": round(time.monotonic() - began, 2)}
            line |= {"products": sorted(set(re.findall(PRODUCTS, text))), "warps": compiled.metadata.num_warps}
            line |= {"unfinished": unfinished(text)}
            print(json.dumps(line | resources(compiled, target)), flush=True)


def all_of_them() -> None:
    """All choices of tiles for all targets, in as many processes as there are cores."""
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(main, [target], places=4) for target in TARGETS]:
            done.result()


if __name__ == "__main__":
    main(sys.argv[1:], most=2) if sys.argv[1:] else all_of_them()
