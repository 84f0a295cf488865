"""The layout that mamba-ssm's `MambaLMHeadModel.save_pretrained` writes: state-spaces/mamba-130m, mamba2-130m and kin."""

from __future__ import annotations

import math
from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.limits import dt_limits


def matches(config: dict[str, Any]) -> bool:
    return "d_model" in config and "n_layer" in config and "model_type" not in config


def rename(name: str) -> str:
    """Our names are mamba-ssm's."""
    return name


def read_config(config: dict[str, Any]) -> QuambaConfig:
    """Keys absent from older files take mamba-ssm's own defaults."""
    ssm = config.get("ssm_cfg") or {}
    layer = ssm.get("layer", "Mamba1")
    if layer not in _LAYERS:
        raise CheckpointError(f"the model's layers are {layer}; this version reads {' and '.join(_LAYERS)}")
    for key, fine in (("attn_layer_idx", []), ("rms_norm", True)):
        if config.get(key, fine) != fine:
            raise CheckpointError(f"config.json has {key} = {config[key]}; this version reads {key} = {fine} only")
    hidden = config["d_model"]
    multiple = config.get("pad_vocab_size_multiple", 8)
    mixer, read_args = _LAYERS[layer]
    inner = config.get("d_intermediate", 0)
    mlp = {"intermediate_size": -(-inner // 128) * 128} if inner else None  # as mamba-ssm's GatedMLP rounds it
    return QuambaConfig(
        vocab_size=math.ceil(config["vocab_size"] / multiple) * multiple,
        hidden_size=hidden,
        blocks=[{"mixer": mixer, "args": read_args(ssm, hidden), "mlp": mlp}] * config["n_layer"],
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=config.get("tie_embeddings", True),
    )


def _mamba1(ssm: dict[str, Any], hidden: int) -> dict[str, Any]:
    rank = ssm.get("dt_rank", "auto")
    return {
        "intermediate_size": int(ssm.get("expand", 2) * hidden),
        "state_size": ssm.get("d_state", 16),
        "conv_kernel": ssm.get("d_conv", 4),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
    }


def _mamba2(ssm: dict[str, Any], hidden: int) -> dict[str, Any]:
    inner, head, groups = int(ssm.get("expand", 2) * hidden), ssm.get("headdim", 64), ssm.get("ngroups", 1)
    if ssm.get("d_ssm") not in (None, inner):
        raise CheckpointError(
            f"ssm_cfg has d_ssm = {ssm['d_ssm']}; this version reads d_ssm = {inner} (all of it) only"
        )
    if ssm.get("activation", "swish") not in ("swish", "silu"):
        raise CheckpointError(f"ssm_cfg has activation = {ssm['activation']}; only swish (silu) is supported")
    if inner % head:
        raise CheckpointError(f"{inner} channels can't be cut into heads of headdim = {head}")
    return {
        "num_heads": inner // head,
        "head_dim": head,
        "state_size": ssm.get("d_state", 128),
        "n_groups": groups,
        "norm_groups": groups,
        "conv_kernel": ssm.get("d_conv", 4),
        "chunk_size": ssm.get("chunk_size", 256),
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
        "D_has_hdim": ssm.get("D_has_hdim", False),
        "rms_norm": ssm.get("rmsnorm", True),
        "norm_before_gate": ssm.get("norm_before_gate", False),
    } | dt_limits(ssm.get("dt_limit", (0.0, math.inf)))


_LAYERS = {"Mamba1": ("mamba1", _mamba1), "Mamba2": ("mamba2", _mamba2)}
