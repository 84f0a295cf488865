"""quamba inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quamba.cli.common import model_argument, print_table, report, results_options, size


@click.command("inspect")
@model_argument
@results_options
def inspect_command(model: str, output: Path | None, as_json: bool) -> None:
    """Show what MODEL is made of: architecture, precision and size of every component, and where its scales came from.

    Reads headers only.
    """
    from quamba.formats import open_checkpoint, summarize

    checkpoint = open_checkpoint(model)
    results = summarize(checkpoint) | {"repairs": checkpoint.repairs.to_list()}

    def show() -> None:
        _print(results)
        if checkpoint.repairs.found:
            click.echo(f"loading it repairs:\n{checkpoint.repairs}")

    report(results, show, output, as_json)


def _print(results: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    click.echo(
        f"{results['name']}: {results['layers']} blocks, {results['hidden_size']} wide, vocabulary {results['vocab_size']}, "
        f"{size(results['bytes'])} ({results['layout']} layout, float parts {results['dtype']})"
    )
    if results["recipe"]:
        provenance = results["provenance"]
        calibration, base = provenance.get("calibration"), provenance.get("base_model")
        click.echo(f"recipe {results['recipe']}" + (f", from {base}" if base else ""))
        if calibration:
            click.echo(
                f"static scales from {calibration.get('samples')} windows of {calibration.get('seq_len')} tokens, "
                f"text {calibration.get('source')}, seed {calibration.get('seed')}"
            )
        else:
            click.echo("static scales as the imported file had them; it doesn't say from which text")
    if results["hadamard"]:
        click.echo(f"residual stream turned by Hadamard {results['hadamard']['n']} ({results['hadamard']['matrix']})")
    click.echo(
        f"bits a weight: {results['body_bits']:.2f} in the blocks, {results['vocabulary_bits']:.2f} in the vocabulary"
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
                table.add_row("  gate, scan, norm, scales", row["weight"], sites, size(row["bytes"]))
                continue
            turned = row["rotation"]
            note = f", Hadamard {turned['n']} ({turned['matrix']})" if turned else ""
            table.add_row(
                f"  {row['component']}", row["weight"], f"{row['reads']} {row['input']}{note}", size(row["bytes"])
            )
    table.add_row("final norm", results["dtype"], "residual float", size(norm["bytes"]))
    stored = "tied to embedding" if head["tied_to_embedding"] else size(head["bytes"])
    table.add_row("head", head["precision"], f"head_in {norm['precision']}", stored)
    print_table(table, 110)
