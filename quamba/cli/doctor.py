"""quamba doctor"""

from __future__ import annotations

import json

import click

from quamba.cli.common import size


@click.command("doctor")
@click.argument("model")
@click.option("--no-run", is_flag=True, help="Read the files only.")
@click.option("--verify", is_flag=True, help="Check the hashes of an artifact's files.")
@click.option("--tokenizer", metavar="T", help="Tokenizer folder or hub id; the model's own by default.")
@click.option("--json", "as_json", is_flag=True, help="Print the diagnosis as JSON.")
@click.pass_context
def doctor_command(
    ctx: click.Context, model: str, no_run: bool, verify: bool, tokenizer: str | None, as_json: bool
) -> None:
    """Say what MODEL is, what loading it repairs, and what is wrong with it.

    Reads headers, then tensors one at a time, then tries the model out on a few tokens, which includes saving a copy of it
    to the temporary folder ($TMPDIR) and loading that. Exit code 0: healthy, 1: it loads with repairs, 2: broken.
    """
    from quamba.doctor import diagnose

    found = diagnose(model, run=not no_run, verify=verify, tokenizer=tokenizer)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        ctx.exit(found.exit_code)
    facts = found.facts
    if facts:
        click.echo(
            f"{found.model}: {facts['layout']} layout, {facts['layers']} blocks "
            f"({facts['family']}), {facts['hidden_size']} wide, "
            f"vocabulary {facts['vocab_size']}, {size(facts['bytes'])}"
        )
        click.echo(
            f"  precision: {facts['body_bits']:.2f} bits a weight in the blocks, {facts['vocabulary_bits']:.2f} in the "
            f"vocabulary; float parts {facts['dtype']}"
        )
    for repair in found.repairs:
        click.echo(f"  repaired: {repair['what']}{_of(repair['tensors'])}: {repair['why']}")
    for note in found.notes:
        click.echo(f"  note: {note.what}")
    for finding in found.broken:
        click.echo(f"  broken: {finding.what}{_of(finding.tensors)}")
    for check in found.checks:
        click.echo(f"  {'ok' if check.passed else 'FAILED'}: {check.name}: {check.detail}")
    click.echo(f"{found.model}: {found.verdict}")
    ctx.exit(found.exit_code)


def _of(names: list[str] | tuple[str, ...]) -> str:
    from quamba.formats.repairs import some

    return f" ({some(list(names))})" if names else ""
