"""Options and output that several commands share."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from quamba.errors import QuambaError


def model_argument(command: Callable) -> Callable:
    """MODEL. What can be neither a folder nor a hub id is refused before anything heavy is imported."""
    return click.argument("model", callback=exists)(command)


def exists(ctx: click.Context, option: click.Parameter, model: str | None) -> str | None:
    """Callback of an option or argument that names a model."""
    from quamba.formats import find

    if model is not None:
        find(model)
    return model


strict_option = click.option("--strict", is_flag=True, help="Refuse a checkpoint that needs repairs.")


def model_options(command: Callable) -> Callable:
    """--device, --dtype, --tokenizer, --backend, --strict, --verify."""
    for option in (
        click.option("--verify", is_flag=True, help="Check the hashes of an artifact's files."),
        strict_option,
        click.option("--backend", default="auto", show_default=True, help="Kernels: auto, reference or cpu."),
        click.option("--tokenizer", metavar="T", help="Tokenizer folder or hub id; the model's own by default."),
        click.option("--dtype", default="auto", show_default=True, help="Of float parts: float32, float16, bfloat16."),
        click.option("--device", metavar="D", help="cpu, cuda, cuda:1, ...; cpu by default."),
    ):
        command = option(command)
    return command


def output_option(command: Callable) -> Callable:
    """--output FILE, for the results as JSON."""
    kind = click.Path(dir_okay=False, path_type=Path)
    text = "Also write the results as JSON."
    return click.option("--output", type=kind, metavar="FILE", callback=_writable, help=text)(command)


def _writable(ctx: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """Refuse a place that can't be written to before the work, not after it."""
    folder = None if path is None else path.absolute().parent
    if folder is not None and not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise click.BadParameter(f"can't write to {folder}")
    return path


@contextlib.contextmanager
def running_on(backend: str, device: str | None) -> Iterator[None]:
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
        click.echo(f"running on {quamba_kernels.describe(place)}", err=True)
        yield
    finally:
        context.__exit__(None, None, None)


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int, str], None]]:
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
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=text)


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Write results where --output says; nothing without it."""
    if path is None:
        return
    try:
        path.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise QuambaError(f"can't write {path}: {error.strerror}") from error


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:,.1f} kB"
