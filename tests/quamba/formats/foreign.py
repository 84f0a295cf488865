"""Tiny random models of transformers' with their logits, and the same weights as other people's files have them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

IDS = torch.randint(0, 60, (2, 13), generator=torch.Generator().manual_seed(5))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "initializer_range": 0.3}
HEADS = {"head_dim": 16, "num_heads": 4, "n_groups": 1, "tie_word_embeddings": True}
CLASSES = {
    "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM, {"time_step_rank": 3}),
    "mamba2": (transformers.Mamba2Config, transformers.Mamba2ForCausalLM, HEADS),
    "falcon_mamba": (transformers.FalconMambaConfig, transformers.FalconMambaForCausalLM, {"time_step_rank": 3}),
}
HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"


def theirs(kind, seed=0, **overrides):
    """A model of transformers', every parameter random and of a size that matters."""
    config, model, more = CLASSES[kind]
    torch.manual_seed(seed)
    model = model(config(**SMALL | more | overrides)).eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith(("bias", ".D", "A_log")):
            p.add_(torch.randn_like(p) * 0.2)
    return model


@functools.cache
def _truth(kind, overrides):
    model = theirs(kind, **dict(overrides))
    return model, model(IDS).logits


def truth(kind, **overrides):
    """The model and its logits of IDS. Only for reading."""
    return _truth(kind, tuple(overrides.items()))


def files_of(kind, layout, **overrides):
    """config.json and tensors of `theirs(kind)` in "transformers" or "mamba_ssm" layout, a tied head left out."""
    model, _ = truth(kind, **overrides)
    config = json.loads(model.config.to_json_string(use_diff=False))
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors[HEAD]
    if layout == "transformers":
        return config | {"architectures": [type(model).__name__]}, tensors
    ssm = {"d_state": config["state_size"], "layer": "Mamba1", "dt_rank": config.get("time_step_rank")}
    if kind == "mamba2":
        ssm = {"d_state": config["state_size"], "layer": "Mamba2", "headdim": config["head_dim"]}
        ssm["ngroups"] = config["n_groups"]
    data = {"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 64, "ssm_cfg": ssm, "attn_layer_idx": []}
    data |= {"attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    data |= {"pad_vocab_size_multiple": 8, "tie_embeddings": config["tie_word_embeddings"]}
    return data, {name.replace("embeddings.", "embedding."): t for name, t in tensors.items()}


def write(folder: Path, config, tensors, files="model.safetensors", shards=1, name="config.json"):
    """A model folder. `config` None: no such file; `files`: the weights' name, by which they are stored."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    stem, suffix = files.rsplit(".", 1)
    parts = {files: tensors}
    if shards > 1:
        every = list(tensors.items())
        parts = {f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}": dict(every[i::shards]) for i in range(shards)}
        index = {tensor: file for file, part in parts.items() for tensor in part}
        (folder / f"{files}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for file, part in parts.items():
        if suffix == "bin":
            torch.save(part, folder / file)
        else:
            save_file({tensor: t.contiguous() for tensor, t in part.items()}, folder / file)
    return folder
