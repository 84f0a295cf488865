"""What goes into `from_pretrained(quantization_config=...)`, and what config.json says of a model quantized in place."""

from __future__ import annotations

from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from quamba.errors import RecipeError
from quamba.plan import FORMAT_VERSION, QUANT_METHOD, SiteSpec, WeightSpec
from quamba.schema import choice, nearest

RECIPES = {
    "w8a8": (WeightSpec(8), SiteSpec(8, "token")),
    "w4a16": (WeightSpec(4), SiteSpec()),
}
"""Weight and input of every Linear, by recipe: those that need neither calibration nor a rotation."""

HINT = "import quamba before from_pretrained"
_WRITTEN = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "load": HINT}


class QuambaQuantizationConfig(QuantizationConfigMixin):
    """Quantize a transformers Mamba, Mamba2 or FalconMamba while it is loaded.

    recipe: "w8a8", int8 weights with a scale an output channel and int8 inputs with a scale a token, or "w4a16", int4
    weights rounded to the nearest code, in groups of `group_size` inputs (32, 64 or 128), and float inputs.
    modules_to_not_convert: names, or ends of names, of Linears that stay float.

    Raises RecipeError: anything else needs calibration, or arguments contradict each other.
    """

    def __init__(
        self,
        recipe: str = "w8a8",
        *,
        group_size: int | None = None,
        modules_to_not_convert: list[str] | None = None,
        **written: Any,
    ):
        if not isinstance(recipe, str) or recipe not in RECIPES:
            name = getattr(recipe, "name", recipe)
            raise RecipeError(
                f"recipe {name!r} needs calibration: use quamba.quantize(model, {name!r}); "
                f"in place there are {' and '.join(RECIPES)}"
            )
        for key, value in written.items():
            if key not in _WRITTEN:
                known = ("recipe", "group_size", "modules_to_not_convert")
                raise RecipeError(f"QuambaQuantizationConfig has no {key!r}{nearest(key, known)}")
            if key != "load" and value != _WRITTEN[key]:
                raise RecipeError(f"{key} is {value!r}, this quamba reads {_WRITTEN[key]!r}: upgrade quamba")
        integer4 = RECIPES[recipe][0].bits == 4
        if group_size is not None and not integer4:
            raise RecipeError(f"group_size belongs to w4a16; {recipe} has one scale an output channel")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format_version = FORMAT_VERSION
        self.recipe = recipe
        self.group_size = (32 if group_size is None else group_size) if integer4 else None
        self.modules_to_not_convert = modules_to_not_convert
        self.load = HINT
        if integer4:
            choice("group_size", self.group_size, (32, 64, 128))

    @property
    def weight(self) -> WeightSpec:
        """How the Linears' weights are stored."""
        spec = RECIPES[self.recipe][0]
        return spec if self.group_size is None else WeightSpec(4, group=self.group_size)

    @property
    def input(self) -> SiteSpec:
        """What becomes of the Linears' inputs."""
        return RECIPES[self.recipe][1]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any):
        """From `quantization_config` of a config.json; a `PlanConfig` if it is the plan of one of our own artifacts."""
        if "blocks" in config_dict:
            plan = PlanConfig(**config_dict)
            return (plan, kwargs) if return_unused_kwargs else plan
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)


class PlanConfig(QuantizationConfigMixin):
    """The plan of an artifact, as it stands in config.json. lm-eval, for one, asks for any `quantization_config`."""

    def __init__(self, **plan: Any):
        self.__dict__.update(plan | {"quant_method": QUANT_METHOD})
