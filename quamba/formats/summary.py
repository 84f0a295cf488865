"""What a checkpoint is made of, component by component, from its headers alone."""

from __future__ import annotations

from typing import Any

import torch

from quamba.config import QuambaConfig
from quamba.formats.checkpoint import Checkpoint
from quamba.layers import GatedMLP
from quamba.mixers import MIXERS
from quamba.plan import BlockPlan


def summarize(checkpoint: Checkpoint) -> dict[str, Any]:
    """Architecture, precision and bytes, as plain data. Equal consecutive blocks are one entry.

    body_bits: bits on disk for each float parameter of the blocks, scales and all; vocabulary_bits: the same of
    embedding, head and final norm (a tied head counts once).
    """
    config, plan = checkpoint.config, checkpoint.config.plan
    sizes = tensor_bytes(checkpoint)
    groups: list[dict[str, Any]] = []
    for i, (block, entry) in enumerate(zip(plan.blocks, config.blocks, strict=True)):
        prefix = f"backbone.layers.{i}."
        own = {name[len(prefix) :]: size for name, size in sizes.items() if name.startswith(prefix)}
        group = {"first": i, "last": i, "mixer": entry["mixer"], "components": _components(entry, block, own)}
        if groups and all(groups[-1][key] == group[key] for key in ("mixer", "components")):
            groups[-1]["last"] = i
        else:
            groups.append(group)
    dtype = str(config.dtype).removeprefix("torch.")

    def vocabulary(name: str, spec: Any) -> dict[str, Any]:
        nbytes = sum(size for tensor, size in sizes.items() if tensor.startswith(name))
        return {"precision": dtype if spec.is_float else str(spec), "bytes": nbytes}

    return {
        "name": checkpoint.location.name,
        "layout": checkpoint.layout,
        "family": ", ".join(sorted({block["mixer"] for block in config.blocks})),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "dtype": dtype,
        "bytes": sum(sizes.values()),
        **bits(checkpoint),
        "recipe": plan.recipe or None,
        "provenance": plan.provenance,
        "hadamard": vars(plan.hadamard) if plan.hadamard else None,
        "blocks": groups,
        "embedding": vocabulary("backbone.embedding.", plan.embedding),
        "final_norm": vocabulary("backbone.norm_f.", plan.final_norm),
        "lm_head": vocabulary("lm_head.", plan.lm_head) | {"tied_to_embedding": config.tie_word_embeddings},
    }


def tensor_bytes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of each tensor, by our names."""
    return {name: entry.nbytes for name, entry in checkpoint.files.entries.items()}


def bits(checkpoint: Checkpoint) -> dict[str, float]:
    """body_bits and vocabulary_bits, see `summarize`."""
    return bits_of(checkpoint.config, tensor_bytes(checkpoint))


def bits_of(config: QuambaConfig, sizes: dict[str, int]) -> dict[str, float]:
    """The same from the bytes of each tensor, by our names."""
    from quamba.formats.artifact import expected_tensors
    from quamba.plan import Plan

    floating = config.with_plan(Plan.floating(config.num_hidden_layers))
    floating.tie_word_embeddings = True  # an embedding stored twice is no other embedding
    parameters = {"body": 0, "vocabulary": 0}
    for name, (shape, _) in expected_tensors(floating).items():
        parameters[_part(name)] += torch.Size(shape).numel()
    stored = {"body": 0, "vocabulary": 0}
    for name, size in sizes.items():
        stored[_part(name)] += size
    return {f"{part}_bits": 8 * stored[part] / parameters[part] for part in stored}


def _part(name: str) -> str:
    return "body" if name.startswith("backbone.layers.") else "vocabulary"


def _components(entry: dict[str, Any], block: BlockPlan, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Per weight: how it is stored, the site it reads and its precision, its bytes; then the rest of the block."""
    mixer = MIXERS[entry["mixer"]]
    reads = {name: ("mixer", site) for name, site in mixer.reads.items()}
    if entry.get("mlp") is not None:
        reads |= {name: ("mlp", site) for name, site in GatedMLP.reads.items()}
    rows: list[dict[str, Any]] = []
    for name, (part, site) in reads.items():
        rows.append(
            {
                "component": name,
                "weight": str(block.weight(name)),
                "reads": site,
                "input": str(block.site(site)),
                "rotation": vars(block.rotations[name]) if name in block.rotations else None,
                "bytes": sum(size for tensor, size in sizes.items() if tensor.startswith(f"{part}.{name}.")),
            }
        )
    rest = sum(sizes.values()) - sum(row["bytes"] for row in rows)
    read = {site for _, site in reads.values()}
    others = {name: str(block.site(name)) for name in mixer.integer_sites() if name not in read}
    small = ", ".join(name for name in mixer.vectors if not block.weight(name).is_float)
    return [
        *rows,
        {"component": "rest", "weight": f"float, int8 {small}" if small else "float", "sites": others, "bytes": rest},
    ]
