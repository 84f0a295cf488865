"""Small random models of transformers' own classes, and what they compute with the weights that integers stand for."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    Mamba2Config,
    MambaConfig,
    PreTrainedModel,
)

from quamba.plan import WeightSpec
from quamba.quantizer.weights import dequantize_weight, quantize_weight

# 40 and 80 inputs: groups of 32 don't divide them.
COMMON = {"vocab_size": 96, "hidden_size": 40, "num_hidden_layers": 2, "state_size": 8, "expand": 2}
CONFIGS = {
    "mamba": MambaConfig(**COMMON, time_step_rank=5, use_bias=True),
    "mamba2": Mamba2Config(**COMMON, num_heads=10, head_dim=8, n_groups=2, chunk_size=4, tie_word_embeddings=True),
    "falcon_mamba": FalconMambaConfig(**COMMON, time_step_rank=5),
}
LINEARS = {
    "mamba": ("in_proj", "x_proj", "out_proj"),
    "mamba2": ("in_proj", "out_proj"),
    "falcon_mamba": ("in_proj", "x_proj", "out_proj"),
}


def write_model(kind: str, folder: Path, **changes) -> Path:
    """A model of that kind with every parameter random, in transformers' layout."""
    torch.manual_seed(len(kind))
    config = type(CONFIGS[kind]).from_dict(CONFIGS[kind].to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "A_log" not in name:
                parameter.normal_(std=1.0 if "embedding" in name else parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def ids(seed: int = 0, length: int = 11) -> Tensor:
    return torch.randint(0, 96, (2, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, given: Tensor) -> Tensor:
    return model(given, use_cache=False).logits


def linears(model: PreTrainedModel, kind: str) -> dict[str, torch.nn.Module]:
    found = {n: m for n, m in model.named_modules() if ".mixer." in n and n.rpartition(".")[2] in LINEARS[kind]}
    assert len(found) == model.config.num_hidden_layers * len(LINEARS[kind])
    return found


def round_weight(weight: Tensor, recipe: str, group: int = 32) -> Tensor:
    """The reals that the codes of a weight stand for."""
    if recipe == "w8a8":
        step = weight.abs().amax(1, keepdim=True) / 127
        return (weight / step).round() * step
    spec = WeightSpec(4, group=group)
    return dequantize_weight(quantize_weight(weight, spec), spec, weight.shape[1])


def round_tokens(x: Tensor) -> Tensor:
    largest = x.abs().amax(-1, keepdim=True)
    return (x * (127 / largest)).round() * (largest / 127)


def stand_in(folder: Path, kind: str, recipe: str, group: int = 32) -> PreTrainedModel:
    """The float model with rounded weights, and inputs rounded in front of the same Linears."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for linear in linears(model, kind).values():
        linear.weight.data = round_weight(linear.weight.data, recipe, group)
        if recipe == "w8a8":
            linear.register_forward_pre_hook(lambda module, given: (round_tokens(given[0]),))
    return model
