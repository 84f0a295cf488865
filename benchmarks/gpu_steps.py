"""One token of a batch, or a prompt: made ready, and the row that its times become."""

from __future__ import annotations

from typing import Any

import torch
from gpu_measure import Clock, Step, floor, middle, ratios, step
from gpu_models import Model, recurrent_states
from gpu_shapes import FORMATS, Cell, Variant

Row = dict[str, Any]
States = dict[str, Any]  # of every dtype, shared by the formats


def prepare(clock: Clock, model: Model, variant: Variant, cell: Cell, states: States) -> tuple[Step, Row]:
    """A graph of one chunk of the cell, and what is known of it before it is timed."""
    shape, batch, device = model.shape, cell.batch, clock.device
    if variant.state not in states:
        states[variant.state] = recurrent_states(shape, variant.state, batch, device)
    mine = model.states(batch, states[variant.state])
    tensors = [t for state in mine for t in state.tensors]
    ids = torch.randint(0, shape.vocabulary, (batch, cell.chunk), device=device)
    made = step(clock, lambda: model(ids, mine), [ids], tensors, cell.phase == "decode")
    held = sum(t.nbytes for t in tensors)
    logits = batch * shape.vocabulary * (4 if model.head.bits < 16 else 2)
    products = batch * (cell.tokens * model.block_products + model.head_products)
    row = {"format": variant.format.name, "state": variant.state, "phase": cell.phase, "batch": batch}
    row |= {"tokens": cell.tokens, "chunk": cell.chunk, "bytes": model.read_once + 2 * held + logits}
    row |= {"operations": 2 * products, "weights": model.memory, "states": held}
    return made, row | {"memory": model.memory + held + made.allocated}


def speeds(peaks: dict[str, float], row: Row, times: list[float], base: list[float] | None) -> Row:
    """Of a row as `prepare` made it, from the seconds of each round, its own and float16's."""
    kind = "int8" if FORMATS[row["format"]].integer else "float16"
    least, by = floor(peaks, row["bytes"], row["operations"], kind)
    tokens, seconds = row["batch"] * row["tokens"], middle(times)
    found = ratios(base, times) if base else []
    return {
        "tokens_per_s": tokens / seconds,
        "spread": [tokens / max(times), tokens / min(times)],
        "rounds": len(times),
        "ms": 1e3 * seconds,
        "ratio": middle(found) if found else None,
        "ratio_spread": [min(found), max(found)] if found else None,
        "tb_per_s": row["bytes"] / seconds / 1e12,
        "top_per_s": row["operations"] / seconds / 1e12,
        "floor_ms": 1e3 * least if least else None,
        "floor_by": by,
        "percent": 100 * least / seconds if least else None,
    }
