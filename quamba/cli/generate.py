"""quamba generate"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click

from quamba.cli.common import (
    model_argument,
    model_options,
    note,
    progress_bar,
    report,
    results_options,
    running_on,
)

HELP = "/reset starts over, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@click.command("generate")
@model_argument
@click.option("--prompt", help="Text to continue; - reads it from standard input. Without: one line after the other.")
@click.option("--chat", is_flag=True, help="Talk, by the tokenizer's chat template.")
@click.option("--system", metavar="TEXT", help="What a chat begins with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True, help="End after these.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Sample; higher is wilder.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the most likely mass P.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens.")
@click.option("--num-beams", type=click.IntRange(min=1), default=1, show_default=True, help="Beam search.")
@click.option("--seed", type=int, default=0, show_default=True, help="For sampling.")
@model_options
@results_options
def generate_command(
    model: str,
    prompt: str | None,
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    num_beams: int,
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
    """Continue a prompt, printing as it goes; or talk.

    Greedy unless --temperature, --top-p or --top-k asks for sampling, or --num-beams for a beam search (which prints at
    the end).

    \b
    quamba generate mamba1-nano --prompt "The old man" --temperature 0.8 --top-p 0.95
    quamba generate path/to/instruct-model --chat

    Without --prompt the lines you type are continued one after the other. With --chat they are the turns of a
    conversation; a tokenizer without a chat template continues lines. Both read standard input where it is no terminal.
    """
    terminal = sys.stdin.isatty()
    if prompt is None and not chat and not terminal:
        raise click.UsageError(
            "Missing option '--prompt'. (- reads it from standard input; --chat reads turns from there)"
        )
    if system and not chat:
        raise click.UsageError("--system belongs to --chat")
    import torch

    from quamba.formats import load_tokenizer
    from quamba.model import QuambaLMHeadModel
    from quamba.writing import Chat, Writer, sampling

    text = sys.stdin.read() if prompt == "-" else prompt
    words = load_tokenizer(model, tokenizer)
    chat = chat and has_template(words)
    with running_on(backend, device):
        network = QuambaLMHeadModel.from_pretrained(model, dtype=dtype, device=device, strict=strict, verify=verify)
        options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams} | sampling(temperature, top_p, top_k)
        writer = Writer(network, words, options, partial(progress_bar, "reading the prompt"))
        torch.manual_seed(seed)
        results: dict[str, Any] = {}
        if text is not None:
            results = say(Chat(writer, system) if chat else writer, text, num_beams > 1, as_json)
            note(speed(results))
        else:
            begin: Callable[[], Any] = partial(Chat, writer, system) if chat else lambda: writer
            results["turns"] = converse(begin, terminal, num_beams > 1, as_json)
    report(results, lambda: None, output, as_json and text is not None)


def has_template(tokenizer: Any) -> bool:
    if not tokenizer.chat_template:
        note("this tokenizer has no chat template: every line is continued by itself")
    return bool(tokenizer.chat_template)


def say(speaker: Any, text: str, at_the_end: bool, as_json: bool) -> dict[str, Any]:
    """One text or turn, printed as it comes, or at the end, or as JSON by the caller."""
    from transformers import TextStreamer

    from quamba.writing import Chat

    talking = isinstance(speaker, Chat)
    words = (speaker.writer if talking else speaker).tokenizer
    options = {"clean_up_tokenization_spaces": False, "skip_special_tokens": talking}
    streamer = None if as_json or at_the_end else TextStreamer(words, skip_prompt=talking, **options)
    written = speaker.ask(text, streamer) if talking else speaker.write(speaker.encode(text), streamer)
    if at_the_end and not as_json:
        click.echo(written.reply if talking else written.text)
    return written.to_dict(text)


def speed(written: dict[str, Any]) -> str:
    return f"{written['new_tokens']} tokens in {written['seconds']:.1f} s, {written['tokens_per_s']:.1f} tokens/s"


def converse(begin: Callable[[], Any], terminal: bool, at_the_end: bool, as_json: bool) -> list[dict[str, Any]]:
    """Line after line; with --json an object a line."""
    speaker, turns = begin(), []
    if terminal:
        note(HELP)
    for line in lines(terminal):
        if line == "/reset":
            speaker = begin()
        elif line.strip():
            try:
                turns.append(say(speaker, line, at_the_end, as_json))
            except KeyboardInterrupt:
                click.echo()
                continue
            note(speed(turns[-1]), 1)
            if as_json:
                click.echo(json.dumps(turns[-1], allow_nan=False))
    return turns


def lines(terminal: bool) -> Iterator[str]:
    """What is typed, without the line's end, up to /exit or the end of the input."""
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() edits and remembers lines with it
    while True:
        try:
            line = input("> ") if terminal else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line == "/exit":
            return
        yield line
