"""The layout of transformers' `MambaForCausalLM` and `Mamba2ForCausalLM`: state-spaces/mamba-130m-hf and its kin."""

from __future__ import annotations

import math
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.limits import dt_limits

_LATER = ("falcon_mamba",)


def matches(config: dict[str, Any]) -> bool:
    return config.get("model_type") in (*_FAMILIES, *_LATER)


def rename(name: str) -> str:
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name


def read_config(config: dict[str, Any]) -> QuambaConfig:
    """Keys absent from the file take transformers' own defaults."""
    family = config["model_type"]
    if family in _LATER:
        known = " and ".join(_FAMILIES)
        raise CheckpointError(f"model_type {family} is not read by this version; it reads {known}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json has hidden_act = {config['hidden_act']}; only silu is supported")
    mixer, read_args, defaults = _FAMILIES[family]
    config = defaults | config
    return QuambaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        blocks=[{"mixer": mixer, "args": read_args(config), "mlp": None}] * config["num_hidden_layers"],
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config["tie_word_embeddings"],
        pad_token_id=config.get("pad_token_id"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )


def _mamba1(config: dict[str, Any]) -> dict[str, Any]:
    hidden, rank = config["hidden_size"], config.get("time_step_rank", "auto")
    return {
        "intermediate_size": int(config.get("intermediate_size") or config.get("expand", 2) * hidden),
        "state_size": config.get("state_size", 16),
        "conv_kernel": config.get("conv_kernel", 4),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
        "use_bias": config.get("use_bias", False),
        "use_conv_bias": config.get("use_conv_bias", True),
    }


def _mamba2(config: dict[str, Any]) -> dict[str, Any]:
    inner, heads, width = int(config.get("expand", 2) * config["hidden_size"]), config["num_heads"], config["head_dim"]
    if heads * width != inner:
        raise CheckpointError(f"{heads} heads of {width} channels don't make expand * hidden_size = {inner} channels")
    groups = config["n_groups"]
    return {
        "num_heads": heads,
        "head_dim": width,
        "state_size": config.get("state_size", 128),
        "n_groups": groups,
        # Not a key of transformers': up to 5.22 it took the norm over all channels, from 5.23 on group by group.
        "norm_groups": config.get("norm_groups", groups),
        "conv_kernel": config.get("conv_kernel", 4),
        "chunk_size": config.get("chunk_size", 256),
        "use_bias": config.get("use_bias", False),
        "use_conv_bias": config.get("use_conv_bias", True),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
    } | dt_limits(config.get("time_step_limit", (0.0, math.inf)))


# model_type: our mixer, its arguments, and the defaults in which the families differ.
_FAMILIES: dict[str, Any] = {
    "mamba": (
        "mamba1",
        _mamba1,
        {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True},
    ),
    "mamba2": (
        "mamba2",
        _mamba2,
        {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False}
        | {"num_heads": 128, "head_dim": 64, "n_groups": 8},
    ),
}
