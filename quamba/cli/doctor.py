"""quamba doctor"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from quamba.cli.common import complete_model, report, results_options, size

_COLOURS = {"ok": "green", "repaired": "yellow", "broken": "red", "FAILED": "red", "healthy": "green"}

SHAPES = ("prompt", "num_beams", "max_new_tokens", "dtype", "device", "transformers")
FILES = ("no_run", "verify")


@click.command("doctor")
@click.argument("model", shell_complete=complete_model)
@click.option("--no-run", is_flag=True, help="Read the files only.")
@click.option("--verify", is_flag=True, help="Check the hashes of an artifact's files.")
@click.option("--tokenizer", metavar="T", help="Tokenizer folder or hub id; the model's own by default.")
@click.option("--shapes", is_flag=True, help="Instead: print what every route to the next token returns.")
@click.option("--prompt", help="With --shapes: the text to continue.")
@click.option("--num-beams", type=click.IntRange(min=2), default=5, show_default=True, help="With --shapes.")
@click.option("--max-new-tokens", type=click.IntRange(min=2), default=8, show_default=True, help="With --shapes.")
@click.option("--dtype", default="auto", show_default=True, help="With --shapes: float32, float16, bfloat16.")
@click.option("--device", metavar="D", help="With --shapes: cpu, cuda, cuda:1, ...; cpu by default.")
@click.option("--transformers", is_flag=True, help="With --shapes: open MODEL with transformers' own class.")
@results_options
@click.pass_context
def doctor_command(
    ctx: click.Context,
    model: str,
    no_run: bool,
    verify: bool,
    tokenizer: str | None,
    shapes: bool,
    prompt: str | None,
    num_beams: int,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    transformers: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Say what MODEL is, what loading it repairs, and what is wrong with it.

    Reads headers, then tensors one at a time, then tries the model out on a few tokens, which includes saving a copy of it
    to the temporary folder ($TMPDIR) and loading that. Exit code 0: healthy, 1: it loads with repairs, 2: broken.

    With --shapes: the logits of all positions, of the last one, step by step with and without a state, and beams, each
    with the shape it should have and whether the values agree; for any causal language model that quamba or transformers
    opens. Exit code 0: all as they should be, 1: one isn't, or MODEL can't be opened.
    """
    for name in FILES if shapes else SHAPES:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            flag = f"--{name.replace('_', '-')}"
            raise click.UsageError(f"{flag} {'has no meaning with' if shapes else 'belongs to'} --shapes")
    if shapes:
        from quamba.formats import find

        find(model)  # before anything heavy is imported
        from quamba.doctor.shapes import check_shapes

        routes = check_shapes(
            model,
            prompt=prompt,
            tokenizer=tokenizer,
            dtype=dtype,
            device=device,
            transformers=transformers,
            beams=num_beams,
            new=max_new_tokens,
        )
        report(routes.to_dict(), lambda: _print_shapes(routes), output, as_json)
        ctx.exit(routes.exit_code)
    from quamba.doctor import diagnose

    found = diagnose(model, run=not no_run, verify=verify, tokenizer=tokenizer)
    report(found.to_dict(), lambda: _print(found), output, as_json)
    ctx.exit(found.exit_code)


def _print(found: Any) -> None:
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
        click.echo(f"  {_coloured('repaired')}: {repair['what']}{_of(repair['tensors'])}: {repair['why']}")
    for fact in found.notes:
        click.echo(f"  note: {fact.what}")
    for finding in found.broken:
        click.echo(f"  {_coloured('broken')}: {finding.what}{_of(finding.tensors)}")
    for check in found.checks:
        click.echo(f"  {_coloured('ok' if check.passed else 'FAILED')}: {check.name}: {check.detail}")
    click.echo(f"{found.model}: {_coloured(found.verdict)}")


def _print_shapes(found: Any) -> None:
    facts = found.facts
    click.echo(f"{found.model}: {facts['class']}, {facts['dtype']} on {facts['device']}, in {facts['folder']}")
    click.echo(f"  tokenizer: {facts['tokenizer']}")
    text = "" if facts["prompt"] is None else f"{facts['prompt']!r}, "
    click.echo(f"  prompt: {text}ids {facts['ids']}; {facts['beams']} beams, {facts['new_tokens']} new tokens")
    for route in found.routes:
        verdict = _coloured("ok" if route.passed else "FAILED")
        click.echo(f"  {verdict}: {route.name}: expected {route.expected}, got {route.got}: {route.diagnosis}")
    bad = ", ".join(found.failed)
    click.echo(f"{found.model}: {f'not as it should be: {bad}' if bad else 'every route is as it should be'}")


def _coloured(word: str) -> str:
    """In its colour; `click.echo` takes that away where the output is no terminal."""
    return click.style(word, fg=_COLOURS[word])


def _of(names: list[str] | tuple[str, ...]) -> str:
    from quamba.formats.repairs import some

    return f" ({some(list(names))})" if names else ""
