"""Options and output that several commands share."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from quamba.errors import QuambaError

QUIET = -1
"""The level of `quamba -q`; 0 without it, 1 and 2 with -v and -vv."""


def level() -> int:
    """How much this run says."""
    context = click.get_current_context(silent=True)
    return 0 if context is None or context.obj is None else int(context.obj)


def note(text: str, least: int = 0) -> None:
    """A line on stderr that is no result, from this level on."""
    if level() >= least:
        click.echo(text, err=True)


@contextlib.contextmanager
def logging_at(level: int) -> Iterator[None]:
    """quamba's own log on stderr: errors only, warnings, information, or everything."""
    logger, handler = logging.getLogger("quamba"), logging.StreamHandler()
    before, propagate = logger.level, logger.propagate
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG, logging.ERROR)[level])
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        logger.propagate = propagate


@contextlib.contextmanager
def libraries_at(level: int) -> Iterator[None]:
    """huggingface_hub's and transformers' bars only on a terminal, and with -q no warnings of transformers'. They look at
    the environment when they are imported, which is later."""
    wanted = {}
    if level <= QUIET or not sys.stderr.isatty():
        wanted["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    if level <= QUIET:
        wanted["TRANSFORMERS_VERBOSITY"] = "error"
    new = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def model_argument(command: Callable) -> Callable:
    """MODEL. What can be neither a folder nor a hub id is refused before anything heavy is imported."""
    return click.argument("model", callback=exists, shell_complete=complete_model)(command)


def exists(ctx: click.Context, option: click.Parameter, given: Any) -> Any:
    """Callback of an option or argument that names a model, or several."""
    from quamba.formats import find

    for model in (given,) if isinstance(given, str) else given or ():
        find(model)
    return given


def complete_model(ctx: click.Context, option: click.Parameter, incomplete: str) -> list[Any]:
    """Folders, and the bundled models."""
    from click.shell_completion import CompletionItem

    from quamba.bundled import MODELS

    names = [CompletionItem(name, help="bundled") for name in MODELS if name.startswith(incomplete)]
    return [CompletionItem(incomplete, type="dir"), *names]


strict_option = click.option("--strict", is_flag=True, help="Refuse a checkpoint that needs repairs.")


def model_options(command: Callable) -> Callable:
    """--device, --dtype, --tokenizer, --backend, --strict, --verify."""
    for option in (
        click.option("--verify", is_flag=True, help="Check the hashes of an artifact's files."),
        strict_option,
        click.option("--backend", default="auto", show_default=True, help="Kernels: auto, reference, cpu or triton."),
        click.option("--tokenizer", metavar="T", help="Tokenizer folder or hub id; the model's own by default."),
        click.option("--dtype", default="auto", show_default=True, help="Of float parts: float32, float16, bfloat16."),
        click.option("--device", metavar="D", help="cpu, cuda, cuda:1, ...; cpu by default."),
    ):
        command = option(command)
    return command


def results_options(command: Callable) -> Callable:
    """--output FILE and --json, for the results as JSON."""
    kind = click.Path(dir_okay=False, path_type=Path)
    text = "Also write the results as JSON."
    command = click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")(command)
    return click.option("--output", type=kind, metavar="FILE", callback=_writable, help=text)(command)


def _writable(ctx: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a place that can't be written to before the work, not after it."""
    folder = None if path is None else path.absolute().parent
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise click.BadParameter(f"can't write to {folder}")
    return path


@contextlib.contextmanager
def running_on(backend: str, device: str | None, say: bool = True) -> Iterator[None]:
    """Choose the backend, and say once on stderr what the command runs on."""
    import quamba_kernels
    from quamba.formats.load import as_device

    place = as_device(device, None) or "cpu"
    try:
        context = quamba_kernels.backend(backend)
        context.__enter__()
    except (ValueError, RuntimeError) as error:
        raise QuambaError(str(error)) from error
    try:
        if say:
            note(f"running on {quamba_kernels.describe(place)}")
        yield
    finally:
        context.__exit__(None, None, None)


@contextlib.contextmanager
def progress_bar(title: str, shown: bool = True) -> Iterator[Callable[[int, int, str], None]]:
    """A bar with time left on stderr, driven by calls of (done, total, text)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    shown = shown and console.is_terminal and level() > QUIET
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def report(results: dict[str, Any], show: Callable[[], None], output: Path | None, as_json: bool) -> None:
    """Results for people (`show`) or, with --json, for programs; and into the file of --output."""
    if as_json:
        click.echo(json.dumps(results, indent=2, allow_nan=False))
    else:
        show()
    if output is None:
        return
    try:
        output.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise QuambaError(f"can't write {output}: {error.strerror}") from error


def print_table(table: Any, width: int) -> None:
    """A rich table; `width` where the output is no terminal."""
    from rich.console import Console

    console = Console()
    (console if console.is_terminal else Console(width=width)).print(table)


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"
