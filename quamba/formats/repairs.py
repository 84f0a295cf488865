"""What was put right while reading somebody's checkpoint: collected, told once, refused when strict."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from quamba.errors import CheckpointError

log = logging.getLogger("quamba")


@dataclass(frozen=True)
class Repair:
    """what: one clause, what is wrong and what is done; why: why that is safe; tensors: those concerned, if it is some."""

    what: str
    why: str
    tensors: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}{f' ({some(self.tensors)})' if self.tensors else ''}: {self.why}"


@dataclass
class Repairs:
    """All repairs of one checkpoint, called `name`."""

    name: str
    found: list[Repair] = field(default_factory=list)

    def add(self, what: str, why: str, *tensors: str) -> None:
        """Note a repair; the same one in several blocks is one repair of several tensors."""
        for i, known in enumerate(self.found):
            if (known.what, known.why) == (what, why):
                self.found[i] = Repair(what, why, (*known.tensors, *(t for t in tensors if t not in known.tensors)))
                return
        self.found.append(Repair(what, why, tensors))

    def refuse(self) -> None:
        """Raise CheckpointError if there is anything: what `strict` means."""
        if self.found:
            raise CheckpointError(f"{self.name} needs repairs, which strict loading refuses:\n{self}")

    def tell(self) -> None:
        """One warning with all of them."""
        if self.found:
            log.warning("%s was repaired while loading:\n%s", self.name, self)

    def to_list(self) -> list[dict[str, Any]]:
        return [asdict(repair) | {"tensors": list(repair.tensors)} for repair in self.found]

    def __str__(self) -> str:
        return "\n".join(f"  - {repair}" for repair in self.found)


def count(number: int, noun: str) -> str:
    """`1 tensor is`, `3 tensors are`."""
    return f"1 {noun} is" if number == 1 else f"{number} {noun}s are"


def some(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
