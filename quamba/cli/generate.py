"""quamba generate"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from quamba.cli.common import model_argument, model_options, output_option, progress_bar, running_on, write_json
from quamba.errors import DataError

# Longer prompts are fed in pieces of this many tokens, with a bar.
PREFILL = 512


@click.command("generate")
@model_argument
@click.option("--prompt", required=True, help="Text to continue; - reads it from standard input.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Sample; higher is wilder.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Sample from the most likely mass P.")
@click.option("--top-k", type=click.IntRange(min=1), help="Sample from the K most likely tokens.")
@click.option("--num-beams", type=click.IntRange(min=1), default=1, show_default=True, help="Beam search.")
@click.option("--seed", type=int, default=0, show_default=True, help="For sampling.")
@model_options
@output_option
def generate_command(
    model: str,
    prompt: str,
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
) -> None:
    """Continue a prompt, printing as it goes.

    Greedy unless --temperature, --top-p or --top-k asks for sampling, or --num-beams for a beam search (which prints at
    the end).

    \b
    quamba generate mamba1-nano --prompt "The old man" --temperature 0.8 --top-p 0.95
    """
    import torch
    from transformers import TextStreamer

    from quamba.formats import load_tokenizer
    from quamba.model import QuambaLMHeadModel

    text = sys.stdin.read() if prompt == "-" else prompt
    words = load_tokenizer(model, tokenizer)
    with running_on(backend, device):
        network = QuambaLMHeadModel.from_pretrained(model, dtype=dtype, device=device, strict=strict, verify=verify)
        ids = words(text, return_tensors="pt")["input_ids"].to(network.device)
        if ids.numel() == 0:
            raise DataError("the prompt is empty: give --prompt some text")
        if int(ids.max()) >= network.config.vocab_size:
            raise DataError(
                "the tokenizer is larger than the model's vocabulary: it belongs to another model (--tokenizer)"
            )
        options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        options = {key: value for key, value in options.items() if value is not None}
        if options:  # transformers would also keep to the 50 most likely tokens
            options = {"top_k": 0, "top_p": 1.0} | options
        options["do_sample"] = bool(options)
        if num_beams == 1:
            options["streamer"] = TextStreamer(words, skip_prompt=False, clean_up_tokenization_spaces=False)
            if ids.shape[1] > PREFILL:
                options["past_key_values"] = prefill(network, ids)
        torch.manual_seed(seed)
        started = time.monotonic()
        out = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
            **options,
        )
        seconds = time.monotonic() - started
    whole = words.decode(out[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if num_beams > 1:
        click.echo(whole)
    new = out.shape[1] - ids.shape[1]
    click.echo(f"{new} tokens in {seconds:.1f} s, {new / seconds:.1f} tokens/s", err=True)
    results = {"prompt": text, "text": whole, "new_tokens": new, "seconds": seconds, "tokens_per_s": new / seconds}
    write_json(output, results)


def prefill(network: Any, ids: Any) -> Any:
    """A state that has read all of `ids [1, L]` but its last token, piece by piece."""
    state = network.new_state()
    pieces = ids[:, :-1].split(PREFILL, dim=1)
    with progress_bar("reading the prompt") as progress:
        for i, piece in enumerate(pieces, 1):
            network(piece, past_key_values=state, logits_to_keep=1)
            progress(i, len(pieces), f"reading the prompt: {min(i * PREFILL, ids.shape[1])}/{ids.shape[1]} tokens")
    return state
