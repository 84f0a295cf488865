"""quamba inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quamba.cli.common import model_argument, output_option, size, write_json


@click.command("inspect")
@model_argument
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
    from quamba.mixers import MIXERS

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
        components = _components(
            MIXERS[entry["mixer"]], block, {n: s for n, s in sizes.items() if n.startswith(f"backbone.layers.{i}.")}
        )
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


def _components(mixer: Any, block: Any, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Per weight: how it is stored, the site it reads and its precision, its bytes; then the rest of the block."""
    rows = [
        {
            "component": weight,
            "weight": "float" if block.weight(weight).is_float else f"int{block.weight(weight).bits} per channel",
            "reads": site,
            "input": _site(block.site(site)),
            "rotation": vars(block.rotations[weight]) if weight in block.rotations else None,
            "bytes": sum(size for name, size in sizes.items() if f".mixer.{weight}." in name),
        }
        for weight, site in mixer.reads.items()
    ]
    rest = sum(sizes.values()) - sum(row["bytes"] for row in rows)
    others = {name: _site(block.site(name)) for name in mixer.integer_sites if name not in mixer.reads.values()}
    return [*rows, {"component": "rest", "weight": "float", "sites": others, "bytes": rest}]


def _site(spec: Any) -> str:
    if spec.is_float:
        return "float"
    return f"int{spec.bits} per token" if spec.scale == "token" else f"int{spec.bits} static per {spec.axis}"


def _print(results: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    click.echo(
        f"{results['name']}: {results['layers']} blocks, {results['hidden_size']} wide, vocabulary {results['vocab_size']}, "
        f"{size(results['bytes'])} ({results['layout']} layout, float parts {results['dtype']})"
    )
    if results["recipe"]:
        calibration = results["provenance"].get("calibration", {})
        click.echo(f"recipe {results['recipe']}, from {results['provenance'].get('base_model')}")
        click.echo(
            f"static scales from {calibration.get('samples')} windows of {calibration.get('seq_len')} tokens, "
            f"text {calibration.get('source')}, seed {calibration.get('seed')}"
        )
    table = Table("component", "weight", "input", "size", box=box.SIMPLE_HEAD)
    embedding, head, norm = results["embedding"], results["lm_head"], results["final_norm"]
    table.add_row("embedding", embedding["precision"], "token ids", size(embedding["bytes"]))
    for group in results["blocks"]:
        count = group["last"] - group["first"] + 1
        name = f"block {group['first']}" + (f" to {group['last']}" if count > 1 else "")
        total = sum(row["bytes"] for row in group["components"])
        table.add_row(f"{name} ({group['mixer']})", "", "", f"{count} x {size(total)}" if count > 1 else size(total))
        for row in group["components"]:
            if row["component"] == "rest":
                sites = ", ".join(f"{name} {how}" for name, how in row["sites"].items())
                table.add_row("  gate, A, D, norm, scales", row["weight"], sites, size(row["bytes"]))
                continue
            turned = row["rotation"]
            note = f", Hadamard {turned['n']} ({turned['matrix']})" if turned else ""
            table.add_row(
                f"  {row['component']}", row["weight"], f"{row['reads']} {row['input']}{note}", size(row["bytes"])
            )
    table.add_row("final norm", norm["precision"], "residual float", size(norm["bytes"]))
    stored = "tied to embedding" if head["tied_to_embedding"] else size(head["bytes"])
    table.add_row("head", head["precision"], f"head_in {norm['precision']}", stored)
    console = Console()
    (console if console.is_terminal else Console(width=110)).print(table)
