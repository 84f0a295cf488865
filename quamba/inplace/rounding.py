"""From a checkpoint's float weight to the tensors of an `InPlaceLinear`, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps

from quamba.inplace.linear import InPlaceLinear
from quamba.quantizer.weights import dequantize_weight, quantize_weight

CLIP = {8: "absmax", 4: "search"}
"""How scales are found, by bits: as in the presets of the same names."""


class RoundToNearest(ConversionOps):
    """`X.weight`, float `[out, in]`, to the integer tensors of `X` by their full names."""

    def __init__(self, hf_quantizer: Any):
        self.hf_quantizer = hf_quantizer

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        model: Any = None,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        ((name, weight),) = input_dict.items()
        weight = weight[0] if isinstance(weight, list) else weight
        place = name.rpartition(".")[0]
        linear: InPlaceLinear = model.get_submodule(place)
        if not bool(torch.isfinite(weight).all()):
            # An error raised here would reach the user as a line of transformers' loading report.
            self.hf_quantizer.not_finite.append(name)
        tensors = quantize_weight(weight, linear.spec, clip=CLIP[linear.spec.bits])
        if "weight" not in tensors:
            linear.register_parameter("weight", None)
            if missing_keys is not None:
                missing_keys.discard(name)
        return {f"{place}.{suffix}": tensor for suffix, tensor in tensors.items()}


def float_linear(linear: InPlaceLinear, dtype: torch.dtype) -> nn.Linear:
    """The Linear that an integer one stands for, its inputs not rounded."""
    names = ("weight", "weight_packed", "weight_scale", "weight_group_scale")
    tensors: dict[str, Tensor] = {name: t for name in names if (t := getattr(linear, name, None)) is not None}
    weight = dequantize_weight(tensors, linear.spec, linear.inputs).to(dtype)
    made = nn.Linear(linear.inputs, linear.outputs, linear.bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if isinstance(linear.bias, Tensor):
        made.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
    return made
