"""The layout of transformers' Mamba, Mamba2 and FalconMamba: state-spaces/mamba-130m-hf and its kin."""

from __future__ import annotations

from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.architecture import Shapes, settle_architecture
from quamba.formats.repairs import Repairs

# What transformers assumes where config.json is silent.
_MAMBA1 = {"family": "mamba1", "vocab_size": 50280, "hidden_size": 768, "layers": 32, "tied": True}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mamba": _MAMBA1,
    "falcon_mamba": _MAMBA1 | {"normed_parameters": True},
    "mamba2": {"family": "mamba2", "vocab_size": 32768, "hidden_size": 4096, "layers": 64, "tied": False}
    | {"num_heads": 128, "n_groups": 8, "state_size": 128},
}


def matches(config: dict[str, Any]) -> bool:
    return config.get("model_type") in _FAMILIES and "dim" not in config


def rename(name: str) -> str:
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name


def read_config(config: dict[str, Any], shapes: Shapes, repairs: Repairs) -> QuambaConfig:
    """Keys absent from the file take transformers' own defaults."""
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json has hidden_act = {config['hidden_act']}; only silu is supported")
    defaults = {"pad_vocab_size_multiple": 1, "native": False} | _FAMILIES[config["model_type"]]
    return settle_architecture(config, shapes, defaults, repairs)
