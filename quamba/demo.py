"""`make demo`: quantize the bundled models, measure them beside their float selves, let them write, print two tables."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import quamba_kernels
from quamba import QuambaLMHeadModel, bundled, quantize
from quamba.cli.common import progress_bar, size
from quamba.evaluation import difference, encode_text, evaluate, measure_speed
from quamba.formats import bits, load_tokenizer, open_checkpoint

SHOWN = (("mamba1-nano", "w8a8"), ("mamba2-nano", "w4a8"))
PROMPT = "The old man went to the window and"


def main() -> None:
    """Runs in a few minutes on two cores; leaves nothing behind."""
    click.echo(f"two really trained models of 4.5 million parameters, on {quamba_kernels.describe()}")
    for model, preset in SHOWN:
        show(model, preset)
    click.echo("\n(the models saw the novels in training; they are far too small for LAMBADA accuracy)")


def show(model: str, preset: str) -> None:
    """Quantize one model, and print what it costs and buys."""
    name = preset.upper()
    tokenizer = load_tokenizer(model)
    with tempfile.TemporaryDirectory() as folder, progress_bar("quantizing") as progress:
        out = Path(folder) / f"{model}-{preset}"
        quantize(model, preset, out=out, progress=progress)
        bytes_on_disk = [_weights(bundled.model_path(model)), _weights(out)]
        shares = [bits(open_checkpoint(place)) for place in (model, str(out))]
        # float16 parts are computed in float32: few CPUs have half precision units.
        models = {
            name: QuambaLMHeadModel.from_pretrained(out, dtype="float32"),
            "float": QuambaLMHeadModel.from_pretrained(model, dtype="float32"),
        }
        texts = {text: encode_text(tokenizer, text) for text in ("wikitext", "novels")}
        task = ["lambada_openai"]
        results = evaluate(
            models, tokenizer, task, texts, reference="float", batch_size=16, data="bundled", progress=progress
        )
        prompt = texts["novels"][None, :512]
        quick, slow = measure_speed(list(models.values()), prompt, new_tokens=64, rounds=3, progress=progress)
        paragraph = _write(models[name], tokenizer)

    table = Table(model, "float", name, "", box=box.SIMPLE_HEAD)
    before, after = bytes_on_disk
    table.add_row("weights on disk", size(before), size(after), f"{before / after:.2f}x smaller")
    for part in ("body", "vocabulary"):
        said = "blocks" if part == "body" else part
        table.add_row(f"  {said}, bits a weight", *(f"{share[f'{part}_bits']:.2f}" for share in shares), "")
    for text in texts:
        q, f, d = results[0].texts[text], results[1].texts[text], results[0].divergences[text]
        change = f"{100 * (q.perplexity / f.perplexity - 1):+.2f} %"
        table.add_row(f"{text}: perplexity", f"{f.perplexity:.3f}", f"{q.perplexity:.3f}", change)
        table.add_row("  KL to float, nats a token", "", f"{d.mean_kl:.5f}", f"99.9 % of tokens up to {d.p999_kl:.4f}")
        table.add_row("  same most likely token", "", f"{100 * d.top1_agreement:.2f} %", "")
    _lambada(table, results[1].tasks[0], results[0].tasks[0])
    for what, key in (("reading a prompt of 512", "prefill"), ("writing", "decode")):
        f, q = getattr(slow, key), getattr(quick, key)
        table.add_row(f"{what}, tokens/s", f"{f:,.0f}", f"{q:,.0f}", f"{q / f:.2f}x")
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    click.echo(f"{model} in {name} writes:\n{paragraph}")


def _weights(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _lambada(table: Table, before: Any, after: Any) -> None:
    for metric, title in (("loglikelihood_per_word", "log-likelihood of the last word"), ("acc", "accuracy")):
        cells = []
        for task in (before, after):
            found = task.metrics[metric]
            cells.append(f"{found.value:.3f}" + ("" if found.stderr is None else f" ± {found.stderr:.3f}"))
        note = ""
        if metric == "loglikelihood_per_word":
            change = difference(after.metrics[metric], before.metrics[metric])
            note = f"{change.value:+.4f} ± {change.stderr:.4f} (paired, p {change.p:.2g})"
        table.add_row(f"LAMBADA, {after.samples} rows: {title}", *cells, note)


def _write(model: Any, tokenizer: Any) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=100,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(out[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
