"""Sites: the named places of a block where an activation may be quantized, with their static scales.

The producer quantizes: a layer that computes a site's value is handed `sites("name")` and rounds in its epilogue. The
same call is the point of observation, so calibration needs no hooks and no second forward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import quamba_kernels as kernels
from quamba.layers.precise import PreciseModule
from quamba.plan import SiteSpec
from quamba.qtensor import QTensor

Observer = Callable[[str, Tensor], None]


class Sites(PreciseModule):
    """`widths` gives each site's number of channels, `specs` its representation; unlisted sites are float.

    A static site has one float32 buffer under its own name: 0-d for axis tensor, `[width]` for axis channel.
    `observer(name, float tensor)` is called with every float value that passes a site (set while calibrating).
    """

    def __init__(self, widths: dict[str, int], specs: dict[str, SiteSpec]):
        super().__init__()
        self.widths = widths
        self.specs = {name: specs.get(name, SiteSpec()) for name in widths}
        self.observer: Observer | None = None
        static = [name for name, spec in self.specs.items() if spec.scale == "static"]
        for name in static:
            shape = (widths[name],) if self.specs[name].axis == "channel" else ()
            self.register_buffer(name, torch.ones(shape, dtype=torch.float32))
        self.precise = tuple(static)
        self._outputs: dict[tuple[str, ...], Output] = {}

    def __call__(self, *names: str) -> Output:
        """Where a layer's result goes: one site, or several side by side along the last axis."""
        if names not in self._outputs:
            self._outputs[names] = Output(self, names)
        return self._outputs[names]

    def _apply(self, fn, recurse: bool = True):
        self._outputs.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._outputs.clear()
        return super()._load_from_state_dict(*args, **kwargs)


class Output:
    """The epilogue of a producing op: `inv` for the kernel, and `finish` to hand its result on.

    `integer`: some of it will be rounded to codes, so a float result should come in float32.
    """

    def __init__(self, sites: Sites, names: tuple[str, ...]):
        self.sites, self.names = sites, names
        self.sizes = [sites.widths[n] for n in names]
        specs = [sites.specs[n] for n in names]
        self.integer = not all(s.is_float for s in specs)
        self.inv: Tensor | None = None
        if all(s.scale == "static" for s in specs):
            scales = [getattr(sites, n) for n in names]
            if len(names) == 1:
                self.inv = 1.0 / scales[0]
            else:
                self.inv = torch.cat([1.0 / s.expand(size) for s, size in zip(scales, self.sizes, strict=True)])

    def finish(self, y: Tensor) -> QTensor | Tensor | list[QTensor | Tensor]:
        """What an op computed with `inv` becomes: a QTensor or float for one site, a list of them for several."""
        pieces = [y] if len(self.names) == 1 else y.split(self.sizes, dim=-1)
        done = [self._site(name, piece) for name, piece in zip(self.names, pieces, strict=True)]
        return done[0] if len(done) == 1 else done

    def _site(self, name: str, y: Tensor) -> QTensor | Tensor:
        spec = self.sites.specs[name]
        if self.sites.observer is not None and y.is_floating_point():
            self.sites.observer(name, y)
        if spec.is_float:
            return y
        if spec.scale == "token":
            return QTensor(*kernels.quantize_per_token(y), "token")
        scale = getattr(self.sites, name)
        values = kernels.quantize(y, 1.0 / scale) if y.is_floating_point() else y
        return QTensor(values, scale, spec.axis)
