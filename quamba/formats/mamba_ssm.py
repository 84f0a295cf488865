"""The layout that mamba-ssm's `MambaLMHeadModel.save_pretrained` writes: state-spaces/mamba-130m, mamba2-130m and kin.

Also Mistral's for Mamba-Codestral, which is mamba-ssm's under a prefix, with the config in `params.json`.
"""

from __future__ import annotations

from typing import Any

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.architecture import Shapes, settle_architecture
from quamba.formats.repairs import Repairs

_LAYERS = ("Mamba1", "Mamba2")


def matches(config: dict[str, Any]) -> bool:
    codestral = "dim" in config and "n_layers" in config
    own = config.get("model_type") in (None, "mamba_ssm") and not str(config.get("architectures")).count("ForCausalLM")
    return codestral or (own and ("d_model" in config or "n_layer" in config))


def rename(name: str) -> str:
    """Our names are mamba-ssm's; a file may have transformers' beside a config of mamba-ssm's."""
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name


def check_supported(config: dict[str, Any], ssm: dict[str, Any]) -> None:
    """CheckpointError for what the layout can say and no model here can be."""
    layer = ssm.get("layer", "Mamba1")
    if layer not in _LAYERS:
        raise CheckpointError(f"the model's layers are {layer}; this version reads {' and '.join(_LAYERS)}")
    for key, fine in (("attn_layer_idx", []), ("rms_norm", True)):
        if config.get(key, fine) not in (fine, None):
            raise CheckpointError(f"the config has {key} = {config[key]}; this version reads {key} = {fine} only")
    if ssm.get("activation", "swish") not in ("swish", "silu"):
        raise CheckpointError(f"ssm_cfg has activation = {ssm['activation']}; only swish (silu) is supported")


def read_config(config: dict[str, Any], shapes: Shapes, repairs: Repairs) -> QuambaConfig:
    """Keys absent from older files take mamba-ssm's own defaults."""
    ssm = config.get("ssm_cfg") or {}
    check_supported(config, ssm)
    if "dim" in config:  # Codestral: always Mamba2
        config = config | {"ssm_cfg": {"layer": "Mamba2"} | ssm, "pad_vocab_size_multiple": 1}
    defaults = {"tied": "dim" not in config, "pad_vocab_size_multiple": 8, "n_groups": 1, "state_size": 128}
    return settle_architecture(config, shapes, defaults | {"native": True}, repairs)
