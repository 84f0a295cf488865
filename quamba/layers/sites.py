"""Sites: the named places of a block where an activation may be quantized, with their static scales.

The producer quantizes: a layer that computes a site's value is handed `sites("name")` and rounds in its epilogue. The
same call is the point of observation, so calibration needs no hooks and no second forward.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

import quamba_kernels as kernels
from quamba.layers.precise import PreciseModule
from quamba.plan import SiteSpec
from quamba.qtensor import QTensor


class Sites(PreciseModule):
    """`widths` gives each site's number of channels, `specs` its representation; unlisted sites are float.

    A static site has one float32 buffer under its own name: 0-d for axis tensor, `[width]` for axis channel, `[groups]`
    for axis group with `<name>_group` int16 `[width]`, the group of each channel. The recurrent state's scale differs
    by state index, too: `depths` gives their number, and groups have scales `[groups, depth]`.
    `observers`: name -> function called with every float value that passes that site (set while calibrating).
    """

    def __init__(self, widths: dict[str, int], specs: dict[str, SiteSpec], depths: dict[str, int] | None = None):
        super().__init__()
        self.widths = widths
        self.depths = depths or {}
        self.specs = {name: specs.get(name, SiteSpec()) for name in widths}
        self.observers: dict[str, Callable[[Tensor], None]] = {}
        static = [name for name, spec in self.specs.items() if spec.scale == "static"]
        for name in static:
            spec, width, depth = self.specs[name], widths[name], self.depths.get(name, 0)
            shape = {"tensor": (), "channel": (width,), "group": (spec.groups, depth) if depth > 1 else (spec.groups,)}
            self.register_buffer(name, torch.ones(shape[spec.axis], dtype=torch.float32))
            if spec.axis == "group":
                self.register_buffer(f"{name}_group", torch.zeros(width, dtype=torch.int16))
        self.precise = tuple(static)
        self._outputs: dict[tuple[str, ...], Output] = {}

    def scale(self, name: str) -> Tensor:
        """The static scale of a site as kernels take it: 0-d or `[width]` (`[width, depth]`)."""
        scale = getattr(self, name)
        if self.specs[name].axis == "group":
            scale = scale[getattr(self, f"{name}_group").long()]
        return scale

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

    `integer`: some of it will be rounded to codes, so a float result should come in float32. `runs`: itself; or of a mixture
    of static sites and others, those side by side that are alike, so that an op can round what is static.
    """

    def __init__(self, sites: Sites, names: tuple[str, ...]):
        self.sites, self.names = sites, names
        self.sizes = [sites.widths[n] for n in names]
        specs = [sites.specs[n] for n in names]
        self.integer = not all(s.is_float for s in specs)
        static = [name for name, spec in zip(names, specs, strict=True) if spec.scale == "static"]
        self.scales = {name: sites.scale(name) for name in static}
        self.inverse = {name: 1.0 / scale for name, scale in self.scales.items()}
        self.inv: Tensor | None = None
        if len(static) == len(names):
            pieces = [self.inverse[name].expand(size) for name, size in zip(names, self.sizes, strict=True)]
            self.inv = self.inverse[names[0]] if len(names) == 1 else torch.cat(pieces)
        self.runs = [self]
        if 0 < len(static) < len(names):
            self.runs = [sites(*run) for _, run in groupby(names, key=static.__contains__)]

    @property
    def per_token(self) -> bool:
        """Whether the op may find the scales itself: one site, with a scale per token, and nobody to show the floats to."""
        specs = [self.sites.specs[name] for name in self.names]
        return len(specs) == 1 and specs[0].scale == "token" and self.names[0] not in self.sites.observers

    def finish(self, y: Tensor) -> QTensor | Tensor | list[QTensor | Tensor]:
        """What an op computed with `inv` becomes: a QTensor or float for one site, a list of them for several."""
        pieces = [y] if len(self.names) == 1 else y.split(self.sizes, dim=-1)
        done = [self._site(name, piece) for name, piece in zip(self.names, pieces, strict=True)]
        return done[0] if len(done) == 1 else done

    def _site(self, name: str, y: Tensor) -> QTensor | Tensor:
        spec = self.sites.specs[name]
        if name in self.sites.observers and y.is_floating_point():
            self.sites.observers[name](y)
        if spec.is_float:
            return y
        if spec.scale == "token":
            return QTensor(*kernels.quantize_per_token(y), "token")
        values = kernels.quantize(y, self.inverse[name]) if y.is_floating_point() else y
        return QTensor(values, self.scales[name], "tensor" if spec.axis == "tensor" else "channel")
