"""quamba inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quamba.cli.common import megabytes, output_option, write_json


@click.command("inspect")
@click.argument("model")
@output_option
def inspect_command(model: str, output: Path | None) -> None:
    """Show what MODEL is made of: architecture, precision and size of every component, and where its scales came from.

    Reads headers only.
    """
    from quamba.formats import open_checkpoint

    results = describe(open_checkpoint(model))
    _print(results)
    write_json(output, results)


def describe(checkpoint: Any) -> dict[str, Any]:
    """Everything the command shows, as plain data. Equal consecutive blocks are one entry."""
    config, plan = checkpoint.config, checkpoint.config.plan
    sizes: dict[str, int] = {}
    for name, theirs in checkpoint.names.items():
        entry = checkpoint.files.entries[theirs]
        nbytes = entry.dtype.itemsize
        for n in entry.shape:
            nbytes *= n
        sizes[name] = nbytes
    groups: list[dict[str, Any]] = []
    for i, (block, entry) in enumerate(zip(plan.blocks, config.blocks, strict=True)):
        components = _components(block, {n: s for n, s in sizes.items() if n.startswith(f"backbone.layers.{i}.")})
        group = {"first": i, "last": i, "mixer": entry["mixer"], "components": components}
        if groups and all(groups[-1][key] == group[key] for key in ("mixer", "components")):
            groups[-1]["last"] = i
        else:
            groups.append(group)
    dtype = str(config.dtype).removeprefix("torch.")
    tied = config.tie_word_embeddings
    head_bytes = sizes.get("lm_head.weight", 0)
    return {
        "name": checkpoint.location.name,
        "layout": checkpoint.layout,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "dtype": dtype,
        "bytes": sum(sizes.values()),
        "recipe": plan.recipe or None,
        "provenance": plan.provenance,
        "blocks": groups,
        "embedding": {"precision": dtype, "bytes": sizes["backbone.embedding.weight"]},
        "final_norm": {
            "precision": dtype if plan.final_norm.is_float else _site(plan.final_norm),
            "bytes": sizes["backbone.norm_f.weight"],
        },
        "lm_head": {"precision": dtype, "bytes": head_bytes, "tied_to_embedding": tied},
    }


def _components(block: Any, sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Per weight: how it is stored, what it reads, its bytes; then the rest of the block."""
    from quamba.mixers import Mamba1

    reads = {**dict(Mamba1.groups), "conv1d": "conv_in"}
    found: dict[str, dict[str, Any]] = {}
    for weight in Mamba1.weights:
        spec, site = block.weight(weight), block.site(reads[weight])
        rotation = block.rotations.get(weight)
        found[weight] = {
            "weight": "float" if spec.is_float else f"int{spec.bits}, scale per output channel",
            "reads": reads[weight],
            "input": _site(site) + (f", rotated (Hadamard {rotation.n}, {rotation.matrix})" if rotation else ""),
            "bytes": sum(size for name, size in sizes.items() if f".mixer.{weight}." in name),
        }
    found["z (gate)"] = {"weight": "-", "reads": "z", "input": _site(block.site("z")), "bytes": 0}
    rest = sum(sizes.values()) - sum(entry["bytes"] for entry in found.values())
    found["A, D, norm, scales"] = {"weight": "float", "reads": "-", "input": "-", "bytes": rest}
    return found


def _site(spec: Any) -> str:
    return "float" if spec.is_float else f"int{spec.bits}, {spec.scale} scale per {spec.axis}"


def _print(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    click.echo(
        f"{results['name']}: {results['layers']} blocks, {results['hidden_size']} wide, vocabulary {results['vocab_size']}, "
        f"{megabytes(results['bytes'])} ({results['layout']} layout, float parts {results['dtype']})"
    )
    if results["recipe"]:
        calibration = results["provenance"].get("calibration", {})
        click.echo(f"recipe {results['recipe']}, from {results['provenance'].get('base_model')}")
        click.echo(
            f"static scales from {calibration.get('samples')} windows of {calibration.get('seq_len')} tokens, "
            f"text {calibration.get('source')}, seed {calibration.get('seed')}"
        )
    table = Table("component", "weight", "input", "size")
    embedding, head, norm = results["embedding"], results["lm_head"], results["final_norm"]
    table.add_row("embedding", embedding["precision"], "token ids", megabytes(embedding["bytes"]))
    for group in results["blocks"]:
        name = f"block {group['first']}" + (f" to {group['last']}" if group["last"] > group["first"] else "")
        table.add_row(f"[bold]{name}[/bold] ({group['mixer']})", "", "", "each")
        for component, entry in group["components"].items():
            source = f"{entry['reads']}: {entry['input']}" if entry["reads"] != "-" else "-"
            table.add_row(f"  {component}", entry["weight"], source, megabytes(entry["bytes"]))
    table.add_row("final norm", norm["precision"], "residual: float", megabytes(norm["bytes"]))
    stored = "tied to embedding" if head["tied_to_embedding"] else megabytes(head["bytes"])
    table.add_row("head", head["precision"], f"head_in: {norm['precision']}", stored)
    Console().print(table)
