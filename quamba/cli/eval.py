"""quamba eval"""

from __future__ import annotations

from pathlib import Path

import click

from quamba.cli.common import (
    complete_model,
    exists,
    model_options,
    note,
    print_table,
    progress_bar,
    report,
    results_options,
    running_on,
)

_FOLDER = click.Path(file_okay=False, path_type=Path)
_TASKS = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("eval")
@click.argument("models", nargs=-1, metavar="[MODEL]...", callback=exists, shell_complete=complete_model)
@click.option("--task", "tasks", multiple=True, metavar="NAME[,NAME]", help="lm-eval tasks: lambada_openai,piqa.")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first N rows of each task.")
@click.option("--data", metavar="DIR|bundled", help="Folder with <task>.jsonl, or the shipped sample; default: fetch.")
@click.option("--include", type=_TASKS, metavar="DIR", help="Task files of your own.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Requests at once.")
@click.option("--max-length", type=click.IntRange(min=2), default=2048, show_default=True, help="Tokens, for tasks.")
@click.option(
    "--perplexity", "texts", multiple=True, metavar="FILE", help="A text file, or wikitext, novels (bundled)."
)
@click.option("--context", type=click.IntRange(min=2), default=1024, show_default=True, help="Tokens, for perplexity.")
@click.option(
    "--against",
    metavar="MODEL",
    callback=exists,
    shell_complete=complete_model,
    help="Evaluate this one, too; the others' distance to it, and whether it is chance.",
)
@click.option("--resume/--no-resume", default=True, help="Go on where a killed run stopped, or start over.")
@click.option("--lm-eval-output", type=_FOLDER, metavar="DIR", help="Also write the files that lm-eval writes.")
@model_options
@results_options
def eval_command(
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    limit: int | None,
    data: str | None,
    include: Path | None,
    batch_size: int,
    max_length: int,
    texts: tuple[str, ...],
    context: int,
    against: str | None,
    resume: bool,
    lm_eval_output: Path | None,
    device: str | None,
    dtype: str,
    tokenizer: str | None,
    backend: str,
    strict: bool,
    verify: bool,
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure each MODEL: tasks, perplexity, and how far it is from another model.

    Without MODEL: the current folder if it is a quantized model, else the newest quantized model in it.

    \b
    quamba eval --task lambada_openai
    quamba eval mamba1-nano-w8a8 --against mamba1-nano --perplexity wikitext
    quamba eval mamba1-nano-w8a8 mamba1-nano-w4a8 --task lambada_openai,piqa --data my/tasks

    Every value comes with its standard error. In several processes:
    `torchrun --nproc-per-node 2 -m quamba eval ...`, on several GPUs
    `accelerate launch --multi_gpu -m quamba eval ... --device cuda`.
    """
    names = [task.strip() for group in tasks for task in group.split(",") if task.strip()]
    if not (names or texts or against):
        raise click.UsageError("say what to measure: --task lambada_openai, --perplexity FILE, or --against MODEL")
    if not names and (limit or data or include or lm_eval_output):
        raise click.UsageError("--limit, --data, --include and --lm-eval-output belong to --task")
    chosen = list(models) or [newest_artifact()]
    if against in chosen:
        raise click.UsageError(f"{against} can't be compared with itself")
    chosen += [against] if against else []
    if len(set(chosen)) < len(chosen):
        raise click.UsageError("a model is named twice")
    if against and not texts:
        texts = ("wikitext",)
    from quamba.evaluation import results_dict, results_table
    from quamba.evaluation.lm_eval_files import save_for_lm_eval
    from quamba.evaluation.processes import joined
    from quamba.evaluation.session import measure

    labels = _labels(chosen)
    reference = list(labels)[-1] if against else None
    with joined(device) as processes:
        device = processes.device(device)
        with running_on(backend, device, processes.first), progress_bar("loading", processes.first) as progress:
            measured = measure(
                labels,
                tokenizer,
                loading={"dtype": dtype, "device": device, "strict": strict, "verify": verify},
                resume=resume,
                note=note,
                processes=processes,
                tasks=names,
                texts=_labels(list(texts)),
                reference=reference,
                context=context,
                limit=limit,
                batch_size=batch_size,
                max_length=max_length,
                data=data,
                include=include,
                progress=progress,
            )
    if not processes.first:
        return
    if lm_eval_output:
        for found in measured:
            note(f"wrote {save_for_lm_eval(found, labels[found.name], lm_eval_output)}")
    results = results_dict(measured, reference)
    report(results, lambda: print_table(results_table(measured, reference), 140), output, as_json)


def _labels(names: list[str]) -> dict[str, str]:
    """What the table calls models and texts: their last path component, or all of it where that is the same."""
    short = [Path(name).resolve().name if name == "." else Path(name).name for name in names]
    return dict(zip(short if len(set(short)) == len(names) else names, names, strict=True))


def newest_artifact() -> str:
    """The current folder, or the quantized model in it that was finished last; says which. UsageError if there is none."""
    from quamba.formats import is_artifact

    here = Path()
    if is_artifact(here):
        note(f"evaluating the current folder, {here.resolve().name}")
        return "."
    found = [path for path in here.iterdir() if path.is_dir() and path.suffix != ".partial" and is_artifact(path)]
    if not found:
        raise click.UsageError(
            "no MODEL given, and neither the current folder nor one in it is a quantized model; "
            "make one with: quamba quantize mamba1-nano --w8a8"
        )
    newest = max(found, key=lambda path: (path / "config.json").stat().st_mtime)
    others = f"the newest of {len(found)} quantized models here" if len(found) > 1 else "the quantized model here"
    note(f"evaluating {newest}, {others}")
    return str(newest)
