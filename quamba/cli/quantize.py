"""quamba quantize"""

from __future__ import annotations

import time
from pathlib import Path

import click

from quamba.cli.common import (
    QUIET,
    level,
    model_argument,
    model_options,
    progress_bar,
    report,
    results_options,
    running_on,
    size,
)
from quamba.errors import QuambaError


@click.command("quantize")
@model_argument
@click.option("--w8a8", is_flag=True, help="int8 weights and activations.")
@click.option("--w4a8", is_flag=True, help="int4 weights, int8 activations.")
@click.option("--w4a16", is_flag=True, help="int4 weights, float activations.")
@click.option("--recipe", metavar="FILE.yaml", help="A recipe of your own, or the name of one in configs/.")
@click.option("--quantize-embedding/--no-quantize-embedding", "embedding", default=None, help="Integer embedding.")
@click.option("--quantize-lm-head/--no-quantize-lm-head", "lm_head", default=None, help="Integer head.")
@click.option("--apply-gptq/--no-apply-gptq", "gptq", default=None, help="Round weights by GPTQ.")
@click.option(
    "--group-heads/--no-group-heads", default=None, help="Mamba2: 4 x 4 scale groups by sorted channels and heads."
)
@click.option("-o", "--out", metavar="DIR", help="Where to; <model>-<recipe> in the current folder by default.")
@click.option("--overwrite", is_flag=True, help="Replace DIR if it exists.")
@click.option(
    "--calibration", default="bundled", show_default=True, metavar="bundled|FILE|hf:NAME", help="Text for the scales."
)
@click.option("--samples", type=click.IntRange(min=1), help="Windows of text; by default the recipe's.")
@click.option("--seq-len", type=click.IntRange(min=2), help="Tokens a window; by default the recipe's.")
@click.option("--seed", default=0, show_default=True, help="Chooses the windows.")
@model_options
@results_options
def quantize_command(
    model: str,
    w8a8: bool,
    w4a8: bool,
    w4a16: bool,
    recipe: str | None,
    embedding: bool | None,
    lm_head: bool | None,
    gptq: bool | None,
    group_heads: bool | None,
    out: str | None,
    overwrite: bool,
    calibration: str,
    samples: int | None,
    seq_len: int | None,
    seed: int,
    device: str | None,
    dtype: str,
    tokenizer: str | None,
    backend: str,
    strict: bool,
    verify: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Quantize MODEL into a new folder that loads like any other model.

    \b
    quamba quantize mamba1-nano --w8a8
    quamba quantize path/to/mamba -o smaller --recipe my.yaml --calibration my.txt

    Exactly one of --w8a8, --w4a8, --w4a16, --recipe; the switches change what it says. An interrupted run resumes when
    you type the same command again.
    """
    presets = [name for name, chosen in (("w8a8", w8a8), ("w4a8", w4a8), ("w4a16", w4a16)) if chosen]
    named = presets + ([recipe] if recipe else [])
    if len(named) != 1:
        raise click.UsageError("say how: exactly one of --w8a8, --w4a8, --w4a16, --recipe FILE.yaml")
    from quamba.formats import open_checkpoint
    from quamba.quantizer import quantize
    from quamba.recipe import Recipe

    started = time.monotonic()
    checkpoint = open_checkpoint(model, strict=strict, verify=verify)
    resolved = Recipe.find(named[0], family=checkpoint.config.blocks[0]["mixer"])
    tied = checkpoint.config.tie_word_embeddings and not resolved.untie
    if tied and None in (embedding, lm_head):  # one matrix: either switch means both
        embedding = lm_head = embedding if lm_head is None else lm_head
    resolved = resolved.with_switches(embedding, lm_head, gptq, group_heads)
    folder = Path(out or f"{checkpoint.location.name}-{resolved.name}")
    if folder.exists() and not overwrite:
        raise QuambaError(f"{folder} exists: choose another folder (-o) or replace it with --overwrite")
    with running_on(backend, device), progress_bar("quantizing") as progress:
        quantize(
            model,
            resolved,
            out=folder,
            calibration=calibration,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    results = {
        "out": str(folder),
        "recipe": resolved.name,
        "source_bytes": checkpoint.files.nbytes,
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "seconds": round(time.monotonic() - started, 2),
        "peak_memory_bytes": peak_memory(),
    }
    report(results, lambda: _print(checkpoint.location.name, results), output, as_json)


def peak_memory() -> int:
    """Most memory this process has held so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print(name: str, results: dict) -> None:
    before, after, folder = results["source_bytes"], results["bytes"], results["out"]
    click.echo(f"{name} -> {folder}  ({results['recipe']})")
    click.echo(f"  size         {size(before)} -> {size(after)}  ({before / after:.2f}x smaller)")
    click.echo(f"  time         {results['seconds']:.1f} s")
    click.echo(f"  peak memory  {size(results['peak_memory_bytes'])}")
    if level() == QUIET:
        return
    click.echo("next:")
    click.echo(f"  quamba eval {folder} --task lambada_openai --data bundled")
    click.echo(f'  quamba generate {folder} --prompt "Once upon a time"')
