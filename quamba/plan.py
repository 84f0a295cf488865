"""The plan: a recipe resolved for one model, component by component. It is what an artifact saves, and it is law.

Names, shapes and dtypes of an artifact's tensors follow from the plan alone. A component that the plan doesn't list is
float; the three vocabulary components (embedding, final norm, head) always stand in it with entries of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from quamba.errors import QuambaError, RecipeError
from quamba.schema import choice, read_dataclass

FORMAT_VERSION = 1
QUANT_METHOD = "quamba"

SITES = (
    "mixer_in",
    "conv_in",
    "x",
    "B",
    "C",
    "dt",
    "z",
    "x_proj_out",
    "out_proj_in",
    "state",
    "mlp_in",
    "fc2_in",
    "head_in",
)
"""The one vocabulary of places where an activation may be quantized. `head_in` belongs to the model, the rest to a block."""

GROUPS = (32, 64, 128)
"""Inputs that share an int4 group scale."""

MULTIPLIER = 15
"""Largest magnitude of an integer group scale: 15 * -8 is an int8 code."""


@dataclass(frozen=True)
class SiteSpec:
    """How one activation is represented. `bits` 8 or 16 (float); `scale` static, token (dynamic) or none (float);
    `axis` of a static scale: tensor (one number), channel (one per channel) or group (one per group of channels; a recipe
    leaves `groups`, their number, to the family)."""

    bits: int = 16
    scale: str = "none"
    axis: str = "tensor"
    groups: int = 0

    def __post_init__(self) -> None:
        choice("bits", self.bits, (8, 16))
        choice("scale", self.scale, ("static", "token", "none"))
        choice("axis", self.axis, ("tensor", "channel", "group"))
        if (self.bits == 16) != (self.scale == "none"):
            raise RecipeError(
                f"bits: {self.bits} contradicts scale: {self.scale}: 16 bits go with none, 8 with the others"
            )
        if self.axis != "tensor" and self.scale != "static":
            raise RecipeError(f"axis: {self.axis} belongs to scale: static, not to scale: {self.scale}")
        if self.groups and self.axis != "group":
            raise RecipeError(f"groups: {self.groups} contradicts axis: {self.axis}")

    @property
    def is_float(self) -> bool:
        return self.bits == 16

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        if self.scale == "token":
            return f"int{self.bits} per token"
        return f"int{self.bits} static per {self.axis}" + (f" ({self.groups})" if self.groups else "")


@dataclass(frozen=True)
class WeightSpec:
    """How one weight is stored.

    bits 16: float. 8: int8 codes with a float32 scale an output channel, or (`axis`) one for each of the parts that the
    output is split into, or one for the whole tensor. 4: packed int4 codes with a float32 scale an output channel, and
    for every `group` inputs a second one: an integer multiplier of at most 15 (`group_scale: integer`), or float16.
    """

    bits: int = 16
    axis: str = "channel"
    group: int = 0
    group_scale: str = "integer"

    def __post_init__(self) -> None:
        choice("bits", self.bits, (4, 8, 16))
        choice("axis", self.axis, ("channel", "split", "tensor"))
        choice("group_scale", self.group_scale, ("integer", "float"))
        if self.bits == 4:
            if self.group == 0:
                object.__setattr__(self, "group", GROUPS[0])
            choice("group", self.group, GROUPS)
        for name, default in (("group", 0), ("group_scale", "integer")) if self.bits != 4 else (("axis", "channel"),):
            if getattr(self, name) != default:
                raise RecipeError(f"{name}: {getattr(self, name)} doesn't go with bits: {self.bits}")

    @property
    def is_float(self) -> bool:
        return self.bits == 16

    def __str__(self) -> str:
        if self.is_float:
            return "float"
        if self.bits == 4:
            return f"int4 per {self.group}, {self.group_scale} scales"
        return f"int8 per {self.axis}"


@dataclass(frozen=True)
class Rotation:
    """An online Hadamard rotation of width n = m * 2^k: `matrix` sylvester (m = 1), a Paley name, identity,
    or a foreign table's name in imported models."""

    n: int
    m: int = 1
    matrix: str = "sylvester"


def _plain(value: Any) -> Any:
    """Dataclasses as JSON. Fields that came later are left out where they say nothing: the digest of a plan is that of
    the earlier version's."""
    if isinstance(value, WeightSpec):
        default = WeightSpec(value.bits)
        said = ("group", "group_scale") if value.bits == 4 else ("axis",) if value != default else ()
        return {name: getattr(value, name) for name in ("bits", *said)}
    if isinstance(value, SiteSpec):
        return {name: item for name, item in vars(value).items() if name != "groups" or item}
    if isinstance(value, Plan):
        return {name: _plain(item) for name, item in vars(value).items() if name != "hadamard" or item}
    if dataclasses.is_dataclass(value):
        return {name: _plain(item) for name, item in vars(value).items()}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class BlockPlan:
    sites: dict[str, SiteSpec] = field(default_factory=dict)
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sites:
            choice("site", name, SITES)

    def site(self, name: str) -> SiteSpec:
        return self.sites.get(name, SiteSpec())

    def weight(self, name: str) -> WeightSpec:
        return self.weights.get(name, WeightSpec())


@dataclass(frozen=True)
class Plan:
    """`quantization_config` of an artifact. `recipe` and `provenance` tell where it came from and decide nothing.

    hadamard: the rotation of the residual stream, or None. Embedding and head hold it in their weights; where they are
    tied, and so can't, it is applied after the embedding and undone before the final norm.
    """

    blocks: tuple[BlockPlan, ...]
    embedding: WeightSpec = WeightSpec()
    final_norm: SiteSpec = SiteSpec()
    lm_head: WeightSpec = WeightSpec()
    hadamard: Rotation | None = None
    recipe: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def floating(cls, layers: int) -> Plan:
        return cls(blocks=(BlockPlan(),) * layers)

    @property
    def is_float(self) -> bool:
        specs: list[SiteSpec | WeightSpec] = [self.embedding, self.final_norm, self.lm_head]
        for block in self.blocks:
            specs += [*block.sites.values(), *block.weights.values()]
        return all(s.is_float for s in specs) and not self.hadamard and not any(b.rotations for b in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        head = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION}
        return head | _plain(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Raises QuambaError for another method, a newer format, unknown keys or illegal values."""
        data = dict(data)
        method, version = data.pop("quant_method", None), data.pop("format_version", None)
        if method != QUANT_METHOD:
            raise QuambaError(f"quantization_config has quant_method {method!r}; expected {QUANT_METHOD!r}")
        if version != FORMAT_VERSION:
            raise QuambaError(
                f"the artifact has format version {version!r}, this quamba reads {FORMAT_VERSION}: "
                "upgrade quamba, or quantize the model again"
            )
        return read_dataclass(cls, data, "quantization_config")
