"""How products are cut into tiles: candidates for each kind of product, the one to use first.

Nothing is tuned when a program runs: the first candidate that fits the device's shared memory is taken.
`benchmarks/gpu_tune.py` measures them all; a better order then belongs here.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

SMALLEST_SHARED = 64 << 10  # bytes of a block on the supported machine that has least, AMD's


@dataclass(frozen=True)
class Tile:
    """BM rows of x times BN rows of the weight, BK of its columns at a time, `stages` of them on their way. Products of codes
    take no fewer than 32 columns, tensor cores no fewer than 16 rows."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int

    def shared(self, size: int, packed: bool) -> int:
        """Bytes of shared memory, about, when entries enter the product with `size` bytes. Two int4 codes of a byte meet two
        entries of x, and are expanded one by one."""
        if packed:
            return ((2 * self.BM * size + self.BN) * max(1, self.stages - 1) + self.BN * size) * self.BK
        return max(1, self.stages - 1) * (self.BM + self.BN) * self.BK * size


# Few rows read the weight once and wait for memory: many bytes on their way. Many rows wait for arithmetic: large tiles.
FEW = [Tile(16, 64, 128, 4, 3), Tile(16, 32, 256, 4, 4), Tile(16, 64, 256, 4, 4), Tile(16, 128, 128, 4, 4)]
FEW_PACKED = [Tile(16, 64, 64, 4, 3), Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)]
SOME = [Tile(64, 64, 64, 4, 3), Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(32, 64, 128, 4, 4)]
MANY = [Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3)]
MANY_PACKED = [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 3), Tile(64, 64, 64, 4, 2)]
MANY_HALVES = [Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 2)]
FLOATS = [Tile(64, 64, 32, 8, 2)]


def candidates(rows: int, size: int, packed: bool) -> list[Tile]:
    """For so many rows of x whose entries enter the product with `size` bytes, and a weight of bytes with two codes each."""
    if rows <= 16:
        few = FEW_PACKED if packed else FEW
        return [replace(tile, BK=max(32, tile.BK // size)) for tile in few]
    if size == 4:
        return FLOATS
    if rows <= 64:
        return SOME
    return MANY_PACKED if packed else MANY if size == 1 else MANY_HALVES


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    if device.type != "cuda":
        return SMALLEST_SHARED
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", SMALLEST_SHARED)


def choose(rows: int, size: int, packed: bool, device: torch.device) -> Tile:
    """The first candidate that fits the device, or the last."""
    tiles = candidates(rows, size, packed)
    return next((tile for tile in tiles if tile.shared(size, packed) <= shared_memory(device)), tiles[-1])
