"""transformers' interface to quantization methods, for ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from quamba.errors import CheckpointError, QuambaError
from quamba.inplace.config import PlanConfig, QuambaQuantizationConfig

if TYPE_CHECKING:
    import torch

LINEARS = {
    "mamba": ("in_proj", "x_proj", "out_proj"),
    "falcon_mamba": ("in_proj", "x_proj", "out_proj"),
    "mamba2": ("in_proj", "out_proj"),
}
"""Linears of a mixer that transformers calls as modules, by model_type. It multiplies by Mamba's `dt_proj.weight` itself."""


class QuambaHfQuantizer(HfQuantizer):
    """Replaces Linears before the weights are read, and rounds the weights as they come.

    A model that was saved after that loads again without rounding. Raises QuambaError for model types that it doesn't
    know and for parts on disk, CheckpointError for weights that are missing or not finite.
    """

    quantization_config: QuambaQuantizationConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if isinstance(quantization_config, PlanConfig):
            raise QuambaError(
                "this config.json belongs to an artifact of quamba's: load it with AutoModelForCausalLM or "
                "QuambaLMHeadModel, not with one of transformers' own classes"
            )
        self.not_finite: list[str] = []

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise QuambaError("integer weights can't be left on disk: choose a device_map without 'disk'")

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from quamba.inplace.linear import InPlaceLinear

        config, kind = self.quantization_config, model.config.model_type  # type: ignore[union-attr]
        if kind not in LINEARS:
            raise QuambaError(
                f"in place quamba quantizes {', '.join(LINEARS)}; this model is {kind!r} "
                "(quamba.quantize tells whether it can)"
            )
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and name.rpartition(".")[2] in LINEARS[kind]  # type: ignore[index]
            and should_convert_module(name, config.modules_to_not_convert)
        ]
        if not names:
            raise QuambaError("modules_to_not_convert leaves no Linear to quantize")
        for name in names:
            old: Any = model.get_submodule(name)
            new = InPlaceLinear(
                old.in_features,
                old.out_features,
                old.bias is not None,
                config.weight,
                config.input,
                loads_float=not self.pre_quantized,
            )
            model.set_submodule(name, new)
            # transformers initialises a mixer by writing into `out_proj.weight`, also after loading.
            model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        from quamba.inplace.linear import InPlaceLinear

        module, name = get_module_from_name(model, param_name)
        return not self.pre_quantized and isinstance(module, InPlaceLinear) and name == "weight"

    @property
    def quantized_element_size(self) -> float | None:
        """Bytes for an entry of `weight` when a device map is planned: int8 has its codes there, int4 elsewhere."""
        return 1.0 if self.quantization_config.weight.bits == 8 else 0.0

    def get_quantize_ops(self) -> Any:
        from quamba.inplace.rounding import RoundToNearest

        return RoundToNearest(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.not_finite:
            raise CheckpointError(f"{_some(self.not_finite)} holds NaN or infinite values")
        places = set(getattr(model, "hf_device_map", {"": "one"}).values())
        missing = [] if len(places) > 1 else _not_loaded(model)
        if missing:
            raise CheckpointError(
                f"the checkpoint has no {_some(missing)}: a quantized model can't be started at random"
            )
        return model.requires_grad_(False)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from quamba.inplace.rounding import float_linear

        for name, linear in _integer(model):
            model.set_submodule(name, float_linear(linear, dtype or model.dtype))  # type: ignore[arg-type]
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _integer(model: nn.Module) -> list[tuple[str, Any]]:
    from quamba.inplace.linear import InPlaceLinear

    return [(name, module) for name, module in model.named_modules() if isinstance(module, InPlaceLinear)]


def _not_loaded(model: nn.Module) -> list[str]:
    """Parameters of quantized mixers that came from no checkpoint: transformers marks those that did."""
    mixers = {name.rpartition(".")[0] for name, _ in _integer(model)}
    return [
        f"{mixer}.{name}"
        for mixer in sorted(mixers)
        for name, parameter in model.get_submodule(mixer).named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False)
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


from quamba.auto import register  # noqa: E402

register()
