"""The layout of transformers' Mamba, Mamba2 and FalconMamba: state-spaces/mamba-130m-hf and its kin."""

from __future__ import annotations

import re
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


BY_GROUPS = (5, 23)
"""The version of transformers from which Mamba2's norm is taken group by group, as in mamba-ssm."""


def _before(version: str, limit: tuple[int, int]) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < limit


_CLASSES = {"MambaForCausalLM": "mamba", "Mamba2ForCausalLM": "mamba2", "FalconMambaForCausalLM": "falcon_mamba"}


def _kind(config: dict[str, Any]) -> str | None:
    """The model_type, or what the class that is named has."""
    kind, classes = config.get("model_type"), config.get("architectures")
    if kind is None and isinstance(classes, list) and classes:
        kind = _CLASSES.get(str(classes[0]))
    return kind if isinstance(kind, str) and kind in _FAMILIES else None


def matches(config: dict[str, Any]) -> bool:
    return _kind(config) is not None and "dim" not in config


def live_facts(model: Any) -> dict[str, Any]:
    """What only the running model knows: over how many groups of channels Mamba2's norm goes."""
    norms = [module for name, module in model.named_modules() if name.endswith(".mixer.norm")]
    if not norms:
        return {}
    width = norms[0].weight.shape[0]
    return {"norm_groups": width // getattr(norms[0], "group_size", width)}


def rename(name: str) -> str:
    return "backbone.embedding.weight" if name == "backbone.embeddings.weight" else name


def read_config(config: dict[str, Any], shapes: Shapes, repairs: Repairs) -> QuambaConfig:
    """Keys absent from the file take transformers' own defaults."""
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise CheckpointError(
            f"its Linears were quantized in transformers (method {method!r}): load it with AutoModelForCausalLM, or give "
            "the float model"
        )
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"config.json has hidden_act = {config['hidden_act']}; only silu is supported")
    version = str(config.get("transformers_version") or "")
    if config.get("n_groups", 1) != 1 and "norm_groups" not in config and _before(version, BY_GROUPS):
        repairs.add(
            f"transformers {version} took the norm of all {config['n_groups']} groups of channels together, mamba-ssm and "
            "later versions of each by itself; it is read the second way",
            "so the model was made for mamba-ssm; if it was trained with that version, put norm_groups = 1 into config.json",
        )
    defaults = {"pad_vocab_size_multiple": 1, "native": False} | _FAMILIES[str(_kind(config))]
    return settle_architecture(config, shapes, defaults, repairs)
