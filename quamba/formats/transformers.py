"""The layout of transformers' `MambaForCausalLM`: state-spaces/mamba-130m-hf and its kin."""

from __future__ import annotations

import math
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError

_LATER = ("mamba2", "falcon_mamba")


def matches(config: dict[str, Any]) -> bool:
    return config.get("model_type") in ("mamba", *_LATER)


def rename(name: str) -> str:
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name


def read_config(config: dict[str, Any]) -> QuambaConfig:
    """Keys absent from the file take transformers' own defaults."""
    if config["model_type"] in _LATER:
        raise CheckpointError(f"model_type {config['model_type']} is not read by this version; it reads mamba (Mamba1)")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json has hidden_act = {config['hidden_act']}; only silu is supported")
    hidden = config.get("hidden_size", 768)
    rank = config.get("time_step_rank", "auto")
    args = {
        "intermediate_size": int(config.get("intermediate_size") or config.get("expand", 2) * hidden),
        "state_size": config.get("state_size", 16),
        "conv_kernel": config.get("conv_kernel", 4),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
        "use_bias": config.get("use_bias", False),
        "use_conv_bias": config.get("use_conv_bias", True),
    }
    return QuambaConfig(
        vocab_size=config.get("vocab_size", 50280),
        hidden_size=hidden,
        blocks=[{"mixer": "mamba1", "args": args, "mlp": None}] * config.get("num_hidden_layers", 32),
        layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
        pad_token_id=config.get("pad_token_id"),
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=config.get("eos_token_id"),
    )
