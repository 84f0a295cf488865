"""Recipes: what the user asks for. A YAML file or preset name -> Recipe -> (with a model's architecture) a Plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import RecipeError
from quamba.plan import BlockPlan, Plan, SiteSpec, WeightSpec
from quamba.schema import choice, nearest, read_dataclass

PRESETS = ("w8a8", "w4a8", "w4a16")


@dataclass(frozen=True)
class Calibration:
    """How much text static scales are taken from, unless the call says otherwise: samples of seq_len tokens."""

    samples: int = 128
    seq_len: int = 512


@dataclass(frozen=True)
class Recipe:
    """What to quantize and how; see docs/recipes.md for every key.

    observer: how static scales follow from calibration: "minmax" (largest magnitude) or "mse" (the clipping that
    minimises the squared error). propagate: what later blocks are calibrated on: outputs of the "quantized" blocks
    before them, or of the "float" ones. rotate: linears that get an online Hadamard rotation in front.
    """

    name: str
    family: str
    weights: dict[str, WeightSpec] = field(default_factory=dict)
    sites: dict[str, SiteSpec] = field(default_factory=dict)
    embedding: WeightSpec = WeightSpec()
    final_norm: SiteSpec = SiteSpec()
    lm_head: WeightSpec = WeightSpec()
    fold_norm: bool = True
    rotate: tuple[str, ...] = ()
    observer: str = "minmax"
    propagate: str = "quantized"
    calibration: Calibration = Calibration()

    def __post_init__(self) -> None:
        choice("observer", self.observer, ("minmax", "mse"))
        choice("propagate", self.propagate, ("quantized", "float"))
        if self.calibration.samples < 1 or self.calibration.seq_len < 2:
            raise RecipeError("calibration needs at least 1 sample of 2 tokens")
        for name in ("embedding", "final_norm", "lm_head"):
            if not getattr(self, name).is_float:
                raise RecipeError(f"{name}: this version keeps it in float (bits: 16)")

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

    def resolve(self, config: QuambaConfig) -> Plan:
        """The plan for one model. RecipeError where the recipe asks for what the family can't do."""
        from quamba.mixers import MIXERS

        blocks = []
        for i, entry in enumerate(config.blocks):
            if entry["mixer"] != self.family:
                raise RecipeError(f"recipe {self.name} is for {self.family}, but block {i} is {entry['mixer']}")
            mixer = MIXERS[entry["mixer"]]
            args = mixer.Args(**entry["args"])
            mixer.check_recipe(self.sites, self.weights)
            rotations = mixer.rotations(args)
            for name in self.rotate:
                choice("rotate", name, tuple(rotations))
            weights = {name: spec for name, spec in self.weights.items() if not spec.is_float}
            sites = {name: spec for name, spec in self.sites.items() if not spec.is_float}
            blocks.append(BlockPlan(sites, weights, {name: rotations[name] for name in self.rotate}))
        return Plan(tuple(blocks), self.embedding, self.final_norm, self.lm_head, recipe=self.name)


def configs_dir() -> Path:
    """Where the shipped recipes lie: inside the installed package, or at the top of a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
