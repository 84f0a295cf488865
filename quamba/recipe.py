"""Recipes: what the user asks for. A YAML file or preset name -> Recipe -> (with a model's architecture) a Plan."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import RecipeError
from quamba.layers import GatedMLP, Hadamard
from quamba.plan import SITES, BlockPlan, Plan, SiteSpec, WeightSpec
from quamba.schema import choice, nearest, read_dataclass

PRESETS = ("w8a8", "w4a8", "w4a16")
OBSERVERS = ("minmax", "mse", "percentile")


@dataclass(frozen=True)
class Calibration:
    """How much text static scales are taken from, unless the call says otherwise: samples of seq_len tokens."""

    samples: int = 128
    seq_len: int = 512


@dataclass(frozen=True)
class Gptq:
    """Which weights GPTQ rounds (the others: to nearest); damping, a share of the Hessian's mean diagonal; act_order:
    inputs with the largest activations first."""

    weights: tuple[str, ...] = ()
    damping: float = 0.01
    act_order: bool = False


@dataclass(frozen=True)
class Override:
    """Other sites and weights for some layers; negative numbers count from the last. Entries not named stay."""

    layers: tuple[int, ...]
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    sites: dict[str, SiteSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise RecipeError("layers: an override must name at least one layer")


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how; see docs/recipes.md for every key.

    observer, observers: how static scales follow from calibration, in general and by site: "minmax" (largest
    magnitude), "mse" (the clipping that minimises the squared error) or "percentile" (the published formula, at
    `percentile`). shared: sites that take the largest of their scales. clip: weights' scales, "absmax" or by "search" for
    the least squared error. propagate: what later blocks are calibrated on: outputs of the "quantized" blocks before
    them, or of the "float" ones. rotate: linears that get an online Hadamard rotation in front; rotate_residual: turn
    the residual stream; reorder: sort channels and cluster heads before channels are grouped. untie: store a tied head
    twice. int4_vocabulary_from: integer embedding and head take 4 bits from this hidden size on (0: never).
    """

    name: str
    family: str
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    sites: dict[str, SiteSpec] = field(default_factory=dict)
    layers: tuple[Override, ...] = ()
    embedding: WeightSpec = WeightSpec()
    final_norm: SiteSpec = SiteSpec()
    lm_head: WeightSpec = WeightSpec()
    int4_vocabulary_from: int = 0
    untie: bool = False
    fold_norm: bool = True
    rotate: tuple[str, ...] = ()
    rotate_residual: bool = False
    reorder: bool = False
    observer: str = "minmax"
    observers: dict[str, str] = field(default_factory=dict)
    percentile: float = 0.9995
    shared: tuple[tuple[str, ...], ...] = ()
    clip: str = "absmax"
    gptq: Gptq = Gptq()
    propagate: str = "quantized"
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        choice("observer", self.observer, OBSERVERS)
        for site, observer in self.observers.items():
            choice("observers", site, SITES)
            choice(f"observers.{site}", observer, OBSERVERS)
        for sites in self.shared:
            for site in sites:
                choice("shared", site, SITES)
        for site, spec in self.sites.items():
            if spec.groups:
                raise RecipeError(f"sites.{site}.groups: their number follows from the family; leave it out")
        choice("clip", self.clip, ("absmax", "search"))
        choice("propagate", self.propagate, ("quantized", "float"))
        if not 0 < self.percentile <= 1:
            raise RecipeError(f"percentile is {self.percentile}; it must lie between 0 and 1")
        if self.gptq.damping <= 0:
            raise RecipeError(f"gptq.damping is {self.gptq.damping}; it must be above 0")
        if self.calibration.samples < 1 or self.calibration.seq_len < 2:
            raise RecipeError("calibration needs at least 1 sample of 2 tokens")
        if self.rotate_residual and not self.fold_norm:
            raise RecipeError(
                "rotate_residual needs fold_norm: a rotation mixes the channels that a norm's weight scales"
            )
        for name in ("embedding", "lm_head"):
            if getattr(self, name).axis == "split":
                raise RecipeError(f"{name}: its rows are one thing, so axis can't be split")
        if self.final_norm.axis != "tensor":
            raise RecipeError("final_norm: the input of an integer linear needs axis: tensor, or scale: token")
        if not self.final_norm.is_float and self.lm_head.is_float:
            raise RecipeError("final_norm is integer, so lm_head must be, too")

    def observer_of(self, site: str) -> str:
        return self.observers.get(site, self.observer)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe") -> Recipe:
        return read_dataclass(cls, data, where)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a YAML file. RecipeError names the key that is wrong."""
        import yaml

        path = Path(path)
        try:
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"can't read recipe {path}: {error}") from error
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
        return cls.from_dict(data, where=path.name)

    @classmethod
    def find(cls, name: str, family: str) -> Recipe:
        """A preset (`w8a8`: the default of the family), the name of a file in configs/, or a path to a YAML file."""
        folder = configs_dir()
        names = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
        if name in PRESETS:
            wanted = f"{family}-{name}"
            if wanted not in names:
                have = ", ".join(sorted(n for n in names if n.startswith(f"{family}-"))) or "none"
                raise RecipeError(f"this version has no {name} recipe for {family}; it has: {have}")
            return cls.load(names[wanted])
        if name in names:
            return cls.load(names[name])
        if name.endswith((".yaml", ".yml")) or "/" in name:
            return cls.load(name)
        raise RecipeError(f"unknown recipe {name!r}{nearest(name, [*names, *PRESETS])}; or give a path to a YAML file")

    def with_switches(
        self,
        embedding: bool | None = None,
        lm_head: bool | None = None,
        gptq: bool | None = None,
        group_heads: bool | None = None,
    ) -> Recipe:
        """This recipe with integer vocabulary, GPTQ, or 4 x 4 scale groups by sorted channels switched on or off."""
        changes: dict[str, Any] = {}
        if embedding is not None and embedding == self.embedding.is_float:
            changes["embedding"] = WeightSpec(8 if embedding else 16)
        if lm_head is not None and lm_head == self.lm_head.is_float:
            integer = any(not self.sites.get(site, SiteSpec()).is_float for site in ("mixer_in", "out_proj_in"))
            changes["lm_head"] = WeightSpec(8 if lm_head else 16)
            changes["final_norm"] = SiteSpec(8, "token") if lm_head and integer else SiteSpec()
        if gptq is not None and gptq != bool(self.gptq.weights):
            changes["gptq"] = dataclasses.replace(self.gptq, weights=self._linears() if gptq else ())
        if group_heads is not None and group_heads != self.reorder:
            changes["reorder"] = group_heads
            sites = {name: self.sites.get(name, SiteSpec()) for name in ("x", "B", "C", "state")}
            if group_heads and (self.family != "mamba2" or any(sites[name].is_float for name in ("x", "B", "C"))):
                raise RecipeError("group_heads belongs to Mamba2 with static integer x, B and C (--w8a8, --w4a8)")
            axis = "group" if group_heads else "tensor"
            if not group_heads:  # as published without sorting: one scale, clipped
                changes["observers"] = self.observers | {"x": "percentile", "state": "percentile"}
            grouped = {n: SiteSpec(8, "static", axis) for n, site in sites.items() if site.scale == "static"}
            changes["sites"] = self.sites | grouped
        return dataclasses.replace(self, **changes)

    def _linears(self) -> tuple[str, ...]:
        """Weights that GPTQ can round."""
        from quamba.mixers import MIXERS

        return (*(name for name in MIXERS[self.family].reads if name != "conv1d"), *GatedMLP.reads, "lm_head")

    def _check(self, config: QuambaConfig) -> None:
        """RecipeError for what no block shows."""
        for name in self.gptq.weights:
            choice("gptq.weights", name, self._linears())
        if self.reorder and self.family != "mamba2":
            raise RecipeError("reorder sorts the heads of Mamba2; this family has none")
        for sites in self.shared:
            if any(self.sites.get(site, SiteSpec()) != SiteSpec(8, "static") for site in sites):
                raise RecipeError(f"shared: {', '.join(sites)} must all have one static scale, axis: tensor")
        for override in self.layers:
            for layer in override.layers:
                if not -len(config.blocks) <= layer < len(config.blocks):
                    raise RecipeError(f"layers names layer {layer}; the model has {len(config.blocks)}")

    def resolve(self, config: QuambaConfig) -> Plan:
        """The plan for one model. RecipeError where the recipe asks for what the family or the model can't do."""
        self._check(config)
        blocks = tuple(self._block(config, index) for index in range(len(config.blocks)))
        embedding, head = self.embedding, self.lm_head
        if self.int4_vocabulary_from and config.hidden_size >= self.int4_vocabulary_from:
            embedding, head = (WeightSpec(4) if spec.bits == 8 else spec for spec in (embedding, head))
        if config.tie_word_embeddings and not self.untie and embedding != head:
            raise RecipeError(
                "this model's head is its embedding, one matrix in one format: quantize both or neither, or untie them"
            )
        rotation = Hadamard.plan(config.hidden_size) if self.rotate_residual else None
        return Plan(blocks, embedding, self.final_norm, head, rotation, recipe=self.name)

    def _block(self, config: QuambaConfig, index: int) -> BlockPlan:
        from quamba.mixers import MIXERS

        entry = config.blocks[index]
        if entry["mixer"] != self.family:
            raise RecipeError(f"recipe {self.name} is for {self.family}, but block {index} is {entry['mixer']}")
        mixer = MIXERS[entry["mixer"]]
        args = mixer.Args(**entry["args"])
        weights, sites = dict(self.weights), dict(self.sites)
        for override in self.layers:
            if index in [layer % len(config.blocks) for layer in override.layers]:
                weights |= override.weights
                sites |= override.sites
        mlp_weights = {name: weights.pop(name) for name in GatedMLP.reads if name in weights}
        mlp_sites = {name: sites.pop(name) for name in GatedMLP.reads.values() if name in sites}
        mixer.check_recipe(sites, weights)
        if not args.use_conv_bias:
            weights.pop("conv_bias", None)
        GatedMLP.check_recipe(mlp_sites, mlp_weights)
        rotations = mixer.rotations(args)
        if entry.get("mlp") is not None:  # what a recipe says of an MLP holds where there is one
            weights, sites = weights | mlp_weights, sites | mlp_sites
            rotations |= {"fc2": Hadamard.plan(entry["mlp"]["intermediate_size"])}
        for name in self.rotate:
            choice("rotate", name, (*rotations, "fc2"))
        splits, groupings = mixer.splits(args), mixer.groupings(args)
        for name, weight in weights.items():
            if weight.axis == "split" and name not in splits:
                raise RecipeError(f"weights.{name}: its rows are one thing, so axis can't be split")
        for name, site in sites.items():
            if site.axis == "group":
                if name not in groupings:
                    raise RecipeError(f"sites.{name} has no groups of channels in {self.family}")
                sites[name] = dataclasses.replace(site, groups=groupings[name][1])
        return BlockPlan(
            {name: spec for name, spec in sites.items() if not spec.is_float},
            {name: spec for name, spec in weights.items() if not spec.is_float},
            {name: rotations[name] for name in self.rotate if name in rotations},
        )


def configs_dir() -> Path:
    """Where the shipped recipes lie: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
