"""The processes that share an evaluation: those that `accelerate launch` or `torchrun` started, else this one alone.

Every process holds a whole copy of each model and takes every n-th row of a task and every n-th batch of a text; the first
one gathers and reports.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from quamba.errors import QuambaError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """rank: this one's number, from 0; count: how many; accelerator: accelerate's, if there are several."""

    rank: int = 0
    count: int = 1
    accelerator: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def merge(self, mine: dict[int, T]) -> dict[int, T]:
        """The union of every process's entries, in all of them."""
        if self.count == 1:
            return mine
        import torch.distributed

        parts: list[dict[int, T]] = [{}] * self.count
        torch.distributed.all_gather_object(parts, mine)
        return {key: value for part in parts for key, value in part.items()}

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            self.accelerator.wait_for_everyone()

    def device(self, wanted: str | None) -> str | None:
        """This process's device: of several GPUs each takes its own, unless one is named by its number."""
        return str(self.accelerator.device) if self.count > 1 and wanted in ("cuda", "auto") else wanted


ALONE = Processes()


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[Processes]:
    """The processes of this run: several if this one was started as one of several (WORLD_SIZE, which launchers set).

    device: on "cuda" and "auto" they meet on the GPUs, otherwise on the CPU. Raises QuambaError without accelerate.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        yield ALONE
        return
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise QuambaError("evaluation in several processes needs accelerate: pip install accelerate") from error
    patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))  # one process may have much longer rows
    import torch

    cpu = device in (None, "cpu") or (device == "auto" and not torch.cuda.is_available())
    accelerator = Accelerator(cpu=cpu, kwargs_handlers=[patience])
    try:
        yield Processes(accelerator.process_index, accelerator.num_processes, accelerator)
    finally:
        accelerator.end_training()
