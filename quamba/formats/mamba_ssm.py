"""The layout that mamba-ssm's `MambaLMHeadModel.save_pretrained` writes: state-spaces/mamba-130m and its kin."""

from __future__ import annotations

import math
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError


def matches(config: dict[str, Any]) -> bool:
    return "d_model" in config and "n_layer" in config and "model_type" not in config


def rename(name: str) -> str:
    """Our names are mamba-ssm's."""
    return name


def read_config(config: dict[str, Any]) -> QuambaConfig:
    """Keys absent from older files take mamba-ssm's own defaults."""
    ssm = dict(config.get("ssm_cfg") or {})
    layer = ssm.pop("layer", "Mamba1")
    if layer != "Mamba1":
        raise CheckpointError(f"the model's layers are {layer}; this version reads Mamba1 only")
    for key, fine in (("d_intermediate", 0), ("attn_layer_idx", []), ("rms_norm", True)):
        if config.get(key, fine) != fine:
            raise CheckpointError(f"config.json has {key} = {config[key]}; this version reads {key} = {fine} only")
    hidden = config["d_model"]
    rank = ssm.get("dt_rank", "auto")
    multiple = config.get("pad_vocab_size_multiple", 8)
    args = {
        "intermediate_size": int(ssm.get("expand", 2) * hidden),
        "state_size": ssm.get("d_state", 16),
        "conv_kernel": ssm.get("d_conv", 4),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
    }
    return QuambaConfig(
        vocab_size=math.ceil(config["vocab_size"] / multiple) * multiple,
        hidden_size=hidden,
        blocks=[{"mixer": "mamba1", "args": args, "mlp": None}] * config["n_layer"],
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
    )
