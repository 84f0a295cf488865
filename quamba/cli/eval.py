"""quamba eval"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quamba.cli.common import model_options, output_option, progress_bar, running_on, write_json


@click.command("eval")
@click.argument("model", required=False)
@click.option("--task", "tasks", metavar="NAME[,NAME]", help="lm-eval tasks, such as lambada_openai,piqa.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows of each task.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--data", metavar="DIR|bundled", help="Folder with <task>.jsonl, or the shipped sample; default: fetch."
)
@click.option("--against", metavar="MODEL", help="Evaluate this one, too, and the distance to it.")
@click.option("--perplexity", "texts", multiple=True, metavar="FILE", help="A text file, or wikitext, novels (bundled).")
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
    model = model or newest_artifact()
    from rich.console import Console

    from quamba.evaluation import results_dict, results_table

    if against and not texts:
        texts = ("wikitext",)
    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    with running_on(backend, device), progress_bar("loading") as progress:
        measured, divergences = evaluate(
            [model, against] if against else [model],
            names,
            texts,
            progress,
            {"limit": limit, "batch_size": batch_size, "data": data},
            context=context,
            load={"dtype": dtype, "device": device},
            tokenizer=tokenizer,
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(results_table(measured, divergences))
    write_json(output, results_dict(measured, divergences))


def evaluate(
    models: list[str],
    tasks: list[str],
    texts: tuple[str, ...],
    progress: Any,
    options: dict[str, Any],
    *,
    context: int = 1024,
    load: dict[str, Any] | None = None,
    tokenizer: str | None = None,
) -> tuple[list[Any], dict[str, Any]]:
    """Load one or two models and measure everything asked for: (results a model, divergence a text)."""
    from quamba.evaluation import compare, encode_text, run_tasks, score_text
    from quamba.evaluation.report import ModelResults
    from quamba.formats import load_tokenizer
    from quamba.model import QuambaLMHeadModel

    words = load_tokenizer(models[0], tokenizer)
    ids = {text: encode_text(words, text) for text in texts}
    networks = [QuambaLMHeadModel.from_pretrained(name, **(load or {})) for name in models]
    measured = []
    for name, network in zip(models, networks, strict=True):
        short = Path(name).name or name
        result = ModelResults(short)
        for text, tokens in ids.items():
            step = _titled(progress, f"{short}: perplexity of {Path(text).name}")
            result.texts[Path(text).name] = score_text(network, tokens, context, progress=step)
        if tasks:
            progress(0, None, f"{short}: {', '.join(tasks)}")
            result.tasks = run_tasks(network, words, tasks, **options)
        measured.append(result)
    divergences = {}
    if len(networks) > 1:
        for text, tokens in ids.items():
            step = _titled(progress, f"divergence on {Path(text).name}")
            divergences[Path(text).name] = compare(networks[0], networks[1], tokens, context, progress=step)
    return measured, divergences


def _titled(progress: Any, title: str) -> Any:
    return lambda done, total, _: progress(done, total, title)


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
