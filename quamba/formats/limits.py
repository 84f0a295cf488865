"""Limits of Mamba2's dt as config files hold them."""

from __future__ import annotations

import math
from typing import Any

from quamba.errors import CheckpointError


def dt_limits(pair: Any) -> dict[str, float | None]:
    """Our `dt_min` and `dt_max` (None: no limit, as JSON has no infinity) from a pair of numbers.

    Infinity is written as `Infinity`, `"inf"` or, by transformers, `{"__float__": "Infinity"}`. Raises CheckpointError.
    """
    try:
        low, high = (float(n["__float__"] if isinstance(n, dict) else n) for n in pair)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the limits of dt must be two numbers, not {pair!r}") from error
    if not 0 <= low <= high or low == math.inf:
        raise CheckpointError(f"dt can't be limited to between {low} and {high}")
    return {"dt_min": low, "dt_max": None if high == math.inf else high}
