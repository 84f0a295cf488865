"""quamba eval"""

from __future__ import annotations

from pathlib import Path

import click

from quamba.cli.common import exists, model_options, output_option, progress_bar, running_on, write_json


@click.command("eval")
@click.argument("model", required=False, callback=exists)
@click.option("--task", "tasks", metavar="NAME[,NAME]", help="lm-eval tasks, such as lambada_openai,piqa.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--data", metavar="DIR|bundled", help="Folder with <task>.jsonl, or the shipped sample; default: fetch.")
@click.option("--against", metavar="MODEL", callback=exists, help="Evaluate this one, too, and the distance to it.")
@click.option(
    "--perplexity", "texts", multiple=True, metavar="FILE", help="A text file, or wikitext, novels (bundled)."
)
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens, for perplexity.")
@model_options
@output_option
def eval_command(
    model: str | None,
    tasks: str | None,
    limit: int | None,
    batch_size: int,
    data: str | None,
    against: str | None,
    texts: tuple[str, ...],
    context: int,
    device: str | None,
    dtype: str,
    tokenizer: str | None,
    backend: str,
    strict: bool,
    verify: bool,
    output: Path | None,
) -> None:
    """Measure MODEL: tasks, perplexity, and how far it is from another model.

    Without MODEL: the current folder if it is a quantized model, else the newest quantized model in it.

    \b
    quamba eval --task lambada_openai
    quamba eval mamba1-nano-w8a8 --against mamba1-nano --perplexity wikitext
    quamba eval mamba1-nano-w8a8 --task lambada_openai,piqa --data my/tasks
    """
    if not (tasks or texts or against):
        raise click.UsageError("say what to measure: --task lambada_openai, --perplexity FILE, or --against MODEL")
    if not tasks and (limit or data):
        raise click.UsageError("--limit and --data belong to --task")
    model = model or newest_artifact()
    if against is not None and model == against:
        raise click.UsageError(f"{model} can't be compared with itself")
    from rich.console import Console

    from quamba.evaluation import encode_text, evaluate, results_dict, results_table
    from quamba.formats import load_tokenizer
    from quamba.model import QuambaLMHeadModel

    if against and not texts:
        texts = ("wikitext",)
    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    with running_on(backend, device), progress_bar("loading") as progress:
        words = load_tokenizer(model, tokenizer)
        ids = {Path(text).name: encode_text(words, text) for text in texts}
        networks = {
            label: QuambaLMHeadModel.from_pretrained(name, dtype=dtype, device=device, strict=strict, verify=verify)
            for label, name in _labels(model, against).items()
        }
        measured, divergences = evaluate(
            networks,
            words,
            names,
            ids,
            context=context,
            limit=limit,
            batch_size=batch_size,
            data=data,
            progress=progress,
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(results_table(measured, divergences))
    write_json(output, results_dict(measured, divergences))


def _labels(model: str, against: str | None) -> dict[str, str]:
    """What the table calls the models: their last path component, or all of it where that is the same."""
    names = [model] if against is None else [model, against]
    short = [Path(name).resolve().name if name == "." else Path(name).name for name in names]
    return dict(zip(short if len(set(short)) == len(names) else names, names, strict=True))


def newest_artifact() -> str:
    """The current folder, or the quantized model in it that was finished last; says which. UsageError if there is none."""
    from quamba.formats import is_artifact

    here = Path()
    if is_artifact(here):
        click.echo(f"evaluating the current folder, {here.resolve().name}")
        return "."
    found = [path for path in here.iterdir() if path.is_dir() and path.suffix != ".partial" and is_artifact(path)]
    if not found:
        raise click.UsageError(
            "no MODEL given, and neither the current folder nor one in it is a quantized model; "
            "make one with: quamba quantize mamba1-nano --w8a8"
        )
    newest = max(found, key=lambda path: (path / "config.json").stat().st_mtime)
    others = f"the newest of {len(found)} quantized models here" if len(found) > 1 else "the quantized model here"
    click.echo(f"evaluating {newest}, {others}")
    return str(newest)
