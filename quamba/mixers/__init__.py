"""Mixers: the sequence-mixing layers. One file a family, written once for float and every precision.

A mixer class gives

* `Args`: a dataclass of its shape, named as transformers names it; `hidden_size` is passed beside it;
* `site_widths(args, hidden_size)`: channels at each of its sites;
* what `Mixer` lists: its weights with the sites they read, and which sites may be integer, in which way;
* `state_shapes(args)`: the shapes (without batch) of its `conv` and `recurrent` state;
* `forward(x, sites, state, mask)`: one for prefill, a chunk and one decoded token, L = many, some, one;
* `fold_norm`, `rotate`, `rotate_residual`, `fold_scales`: transforms of its own float weights, in `Mixer` unless they
  differ; all but the last preserve its function.

A new family is one file here, one mapping in `formats/`, one test file, and one row below.
"""

from quamba.mixers.mamba1 import Mamba1
from quamba.mixers.mamba2 import Mamba2
from quamba.mixers.mixer import Mixer

MIXERS: dict[str, type[Mixer]] = {"mamba1": Mamba1, "mamba2": Mamba2}

__all__ = ["MIXERS", "Mamba1", "Mamba2", "Mixer"]
