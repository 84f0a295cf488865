"""Mixers: the sequence-mixing layers. One file a family, written once for float and every precision.

A mixer class gives

* `Args`: a dataclass of its shape, named as transformers names it; `hidden_size` is passed beside it;
* `site_widths(args, hidden_size)`: channels at each of its sites;
* `reads`: its weights in the order they are quantized, each with the site it reads; `integer_sites`: those that may be
  integer; `check_recipe(sites, weights)`: refuses combinations that have no arithmetic;
* `state_shapes(args)`: the shapes (without batch) of its `conv` and `recurrent` state;
* `forward(x, sites, state, mask)`: one for prefill, a chunk and one decoded token, L = many, some, one;
* `fold_norm(weight)`, `rotate(rotations)`, `fold_scales(scales, plan)`: transforms of its own float weights; the first
  two preserve its function.

A new family is one file here, one mapping in `formats/`, one test file, and one row below.
"""

from typing import Any

from quamba.mixers.mamba1 import Mamba1
from quamba.mixers.mamba2 import Mamba2

MIXERS: dict[str, Any] = {"mamba1": Mamba1, "mamba2": Mamba2}

__all__ = ["MIXERS", "Mamba1", "Mamba2"]
