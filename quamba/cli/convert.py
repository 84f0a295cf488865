"""quamba convert"""

from __future__ import annotations

from pathlib import Path

import click

from quamba.cli.common import complete_model, exists, progress_bar, report, results_options, size, strict_option


@click.command("convert")
@click.argument("model", metavar="SRC", callback=exists, shell_complete=complete_model)
@click.argument("out", metavar="DST")
@click.option("--exact", is_flag=True, help="Two-level int4 weights as the int8 codes they are multiplied as.")
@click.option("--dtype", default="auto", show_default=True, help="Of float parts: float32, float16, bfloat16.")
@click.option("--tokenizer", metavar="T", help="Tokenizer folder or hub id; the model's own by default.")
@click.option("--overwrite", is_flag=True, help="Replace DST if it is a model of quamba's.")
@strict_option
@click.option("--verify", is_flag=True, help="Check the hashes of an artifact's files.")
@results_options
def convert_command(
    model: str,
    out: str,
    exact: bool,
    dtype: str,
    tokenizer: str | None,
    overwrite: bool,
    strict: bool,
    verify: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write SRC, a checkpoint of any layout that loads, into the folder DST in quamba's own.

    \b
    quamba convert ut-enyac/quamba-130m-w8a8 my-quamba
    quamba convert path/to/mamba2 my-mamba2 --dtype float16
    """
    from quamba.formats import convert
    from quamba.formats.load import as_dtype

    with progress_bar("converting") as progress:
        checkpoint = convert(
            model,
            out,
            exact=exact,
            strict=strict,
            verify=verify,
            dtype=as_dtype(dtype),
            tokenizer=tokenizer,
            overwrite=overwrite,
            progress=progress,
        )
    after = sum(file.stat().st_size for file in Path(out).glob("*.safetensors"))
    results = {"out": out, "layout": checkpoint.layout, "bytes": after, "repairs": checkpoint.repairs.to_list()}

    def show() -> None:
        before = f"{checkpoint.location.name} ({checkpoint.layout} layout, {size(checkpoint.files.nbytes)})"
        click.echo(f"{before} -> {out} ({size(after)})")
        if checkpoint.repairs.found:
            click.echo(f"repaired:\n{checkpoint.repairs}")

    report(results, show, output, as_json)
