"""Which tiles the Triton products are fastest with on this GPU, against what is shipped.

    python benchmarks/gpu_tune.py [--json FILE]

Measures every candidate of `quamba_kernels/triton/tiles.py` on the products of Mamba2-2.7b and 8b, for int8 and int4 weights
with codes and with halves. Needs torch, triton and a GPU, nothing else; takes a few minutes, most of it compiling. A better
order of candidates belongs into that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from quamba_kernels import triton
from quamba_kernels.triton import matmul, tiles

SHAPES = {
    "2.7b in_proj": (10576, 2560),
    "2.7b out_proj": (2560, 5120),
    "8b in_proj": (18560, 4096),
    "8b out_proj": (4096, 8192),
}
ROWS = (1, 16, 64, 256, 2048, 8192)
ROUNDS = 20


def products(
    rows: int, outputs: int, inputs: int, device: torch.device
) -> Iterator[tuple[str, int, bool, Callable[[], Any]]]:
    """Format, bytes of an entry in the product, whether the weight is packed, and the call."""
    codes, halves = (
        torch.zeros(rows, inputs, dtype=torch.int8, device=device),
        torch.zeros(rows, inputs, device=device).half(),
    )
    scale, weight_scale = torch.ones(rows, 1, device=device), torch.ones(outputs, device=device)
    weight = torch.zeros(outputs, inputs, dtype=torch.int8, device=device)
    packed = torch.zeros(outputs, inputs // 2, dtype=torch.uint8, device=device)
    groups = torch.ones(outputs, inputs // 32, dtype=torch.int8, device=device)
    yield "W8A8", 1, False, lambda: triton.w8a8_linear(codes, scale, weight, weight_scale)
    yield "W4A8", 1, True, lambda: triton.w4a8_linear(codes, scale, packed, groups, weight_scale)
    yield "W4A16", 2, True, lambda: triton.w4_linear(halves, packed, groups, weight_scale)


def microseconds(call: Callable[[], Any]) -> float:
    """The median of some rounds, each with a cold cache."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    call()
    times = []
    for _ in range(ROUNDS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA or ROCm device")
    device, found = torch.device("cuda", torch.cuda.current_device()), []
    for name, (outputs, inputs) in SHAPES.items():
        for rows in ROWS:
            for kind, size, packed, call in products(rows, outputs, inputs, device):
                candidates = [
                    t
                    for t in tiles.candidates(rows, size, packed)
                    if t.shared(size, packed) <= tiles.shared_memory(device)
                ]
                for place, tile in enumerate(candidates):
                    matmul.choose = lambda *_, tile=tile: tile
                    try:
                        took = microseconds(call)
                    except Exception as error:
                        print(f"{name}, {rows} rows, {kind}, {tile}: {type(error).__name__}: {error}", file=sys.stderr)
                        continue
                    row = {"product": name, "rows": rows, "format": kind, "tile": str(tile), "place": place, "us": took}
                    found.append(row)
                mine = [r for r in found if (r["product"], r["rows"], r["format"]) == (name, rows, kind)]
                best = min(mine, key=lambda r: r["us"])
                shipped = next((r["us"] for r in mine if r["place"] == 0), float("nan"))
                print(
                    f"{name}, {rows} rows, {kind}: shipped {shipped:.0f} us, best {best['us']:.0f} us with {best['tile']}"
                )
    if options.json:
        options.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
