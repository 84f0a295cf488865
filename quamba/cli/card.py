"""quamba card"""

from __future__ import annotations

import json
from pathlib import Path

import click

from quamba.cli.common import report, results_options
from quamba.errors import CheckpointError, DataError


@click.command("card")
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--results",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Put these measurements in: what `quamba eval --output FILE` has written.",
)
@results_options
def card_command(folder: Path, results: Path | None, output: Path | None, as_json: bool) -> None:
    """Show the model card of FOLDER, a quantized model, and put measurements into it.

    \b
    quamba eval mamba1-nano-w8a8 --against mamba1-nano --perplexity wikitext --output results.json
    quamba card mamba1-nano-w8a8 --results results.json
    """
    from quamba.evaluation.card import for_card
    from quamba.formats import is_artifact
    from quamba.formats.card import Card

    card = Card.read(folder) if is_artifact(folder) else None
    if card is None:
        raise CheckpointError(f"{folder} is no quantized model with a README.md")
    if results is not None:
        try:
            data = json.loads(results.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"can't read {results}: {error}") from error
        card = card.with_results(*for_card(data, folder.resolve().name))
        card.write(folder)
    report({"metadata": card.front, "text": card.text}, lambda: click.echo(str(card)), output, as_json)
