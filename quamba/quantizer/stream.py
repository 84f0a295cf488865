"""The residual stream of all calibration samples, between two blocks: a float32 file, read through a memory map."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor


class Stream:
    """`[samples, seq_len, width]` float32 in the file `stream-<block>.bin`: the input of that block.

    Written with plain writes, not through the map: on a full disk a write fails with an error, a store into a map kills
    the process.
    """

    def __init__(self, folder: Path, block: int, shape: tuple[int, int, int], batch: int):
        self.path = folder / f"stream-{block:05d}.bin"
        self.shape, self.batch = shape, batch

    @property
    def nbytes(self) -> int:
        return 4 * self.shape[0] * self.shape[1] * self.shape[2]

    def batches(self) -> Iterator[Tensor]:
        """Batches `[<= batch, seq_len, width]`, copies that may be written to."""
        whole = torch.from_file(str(self.path), size=self.nbytes // 4, dtype=torch.float32).view(self.shape)
        for piece in whole.split(self.batch):
            yield piece.clone()

    def write(self, batches: Iterable[Tensor]) -> None:
        """Write all batches, in order, and sync."""
        with self.path.open("wb") as file:
            for batch in batches:
                file.write(batch.float().cpu().contiguous().numpy().tobytes())
            file.flush()
            os.fsync(file.fileno())
        if self.path.stat().st_size != self.nbytes:
            raise RuntimeError(f"{self.path} has {self.path.stat().st_size} bytes instead of {self.nbytes}")

    def delete(self) -> None:
        self.path.unlink(missing_ok=True)
