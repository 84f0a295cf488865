"""What W8A8 costs and buys: size, perplexity, KL and tokens/s of float and W8A8, transformers beside ours in one run.

    python benchmarks/w8a8.py [MODEL] [--data DIR] [--threads N] [--rounds N] [--out FILE]

Float32 for everything that isn't integer. Texts: the bundled samples; with --data also the whole wikitext2_test.txt,
wikitext2_raw_test.txt and lambada_openai_test.jsonl of that folder, for ours only. Writes FILE.md and FILE.json.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from pathlib import Path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="mamba1-nano")
    parser.add_argument("--data", type=Path, help="folder with wikitext2_test.txt, lambada_openai_test.jsonl, ...")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="without suffix; default: print only")
    return parser.parse_args()


def pin(threads: int) -> None:
    """Before torch is imported: one thread a core, none of them moving."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}


def machine(threads: int) -> dict[str, str]:
    import torch
    import transformers

    import quamba
    import quamba_kernels

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu}, {os.cpu_count()} cores seen, {threads} threads used",
        "kernels": quamba_kernels.describe(),
        "versions": f"quamba {quamba.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
    }


def main() -> None:
    options = arguments()
    pin(options.threads)
    import torch
    from transformers import AutoModelForCausalLM

    import quamba
    from quamba import QuambaLMHeadModel
    from quamba.evaluation import compare, encode_text, score_text
    from quamba.evaluation.speed import measure_speed
    from quamba.formats import load_tokenizer, locate

    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model)
    folder = tempfile.TemporaryDirectory()
    out = Path(folder.name) / "quantized"
    started = time.monotonic()
    quantized = quamba.quantize(options.model, "w8a8", out=out, dtype="float32")
    seconds = time.monotonic() - started
    models = {
        "transformers float32": AutoModelForCausalLM.from_pretrained(locate(options.model).path, dtype=torch.float32),
        "quamba float32": QuambaLMHeadModel.from_pretrained(options.model, dtype="float32"),
        "quamba W8A8": quantized,
    }
    reference = models["quamba float32"]
    size = {name: sum(p.numel() * p.element_size() for p in set(model.parameters())) for name, model in models.items()}

    sources: list = ["wikitext", "novels"]
    if options.data:
        sources += [options.data / "wikitext2_test.txt", options.data / "wikitext2_raw_test.txt"]
    rows = {name: {"model": name, "bytes": size[name]} for name in models}
    for source in sources:
        name, ids = Path(source).stem, encode_text(tokenizer, source)
        say(name)
        if isinstance(source, str):
            rows["transformers float32"][f"{name} perplexity"] = score_text(
                models["transformers float32"], ids
            ).perplexity
        found = compare(quantized, reference, ids)
        rows["quamba float32"][f"{name} perplexity"] = found.reference_score.perplexity
        rows["quamba W8A8"] |= {
            f"{name} perplexity": found.score.perplexity,
            f"{name} KL": found.mean_kl,
            f"{name} KL, 99.9th percentile": found.p999_kl,
            f"{name} top-1 agreement": found.top1_agreement,
        }
    if options.data:
        lambada(options.data / "lambada_openai_test.jsonl", models, tokenizer, rows)

    say("speed")
    ids = torch.randint(1, reference.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        speeds = measure_speed(list(models.values()), ids, options.new_tokens, options.rounds)
    base = speeds[0]
    for row, speed in zip(rows.values(), speeds, strict=True):
        row |= {
            "prefill tokens/s": speed.prefill,
            "prefill range": speed.prefill_range,
            "prefill ratio": speed.prefill / base.prefill,
            "decode tokens/s": speed.decode,
            "decode range": speed.decode_range,
            "decode ratio": speed.decode / base.decode,
        }
    facts = machine(options.threads) | {
        "model": f"{locate(options.model).name}, prompt {options.prompt}, {options.new_tokens} new tokens, batch 1, "
        f"median (range) of {options.rounds} interleaved rounds",
        "quantization": f"{seconds:.1f} s with the default calibration",
    }
    report = markdown(facts, list(rows.values()))
    print(report)
    if options.out:
        options.out.with_suffix(".md").write_text(report, encoding="utf-8")
        data = {"machine": facts, "rows": list(rows.values())}
        options.out.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def lambada(file: Path, models: dict, tokenizer, rows: dict) -> None:
    """Mean log-likelihood of the target word, through lm-eval, for each model; and the paired difference to float."""
    from quamba.evaluation import run_tasks

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "lambada_openai.jsonl").write_bytes(file.read_bytes())
        for label, model in models.items():
            if label.startswith("transformers"):
                continue
            say(f"{label}: lambada_openai")
            found = run_tasks(model, tokenizer, ["lambada_openai"], data=folder, batch_size=16)
            rows[label] |= lambada_row(found)


def lambada_row(found) -> dict:
    metric = found[0].metrics["loglikelihood_per_word"]
    return {"LAMBADA log-likelihood a word": metric.value, "LAMBADA stderr": metric.stderr}


def markdown(facts: dict[str, str], rows: list[dict]) -> str:
    keys = [key for row in rows for key in row if not key.endswith("range")]
    keys = list(dict.fromkeys(keys))
    lines = ["# Float and W8A8", "", *[f"* {key}: {value}" for key, value in facts.items()], ""]
    lines += ["| | " + " | ".join(str(row["model"]) for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for key in keys[1:]:
        lines.append(f"| {key} | " + " | ".join(cell(row, key) for row in rows) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict, key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if key == "bytes":
        return f"{value / 1e6:.2f} MB"
    spread = row.get(key.split()[0] + " range") if key.endswith("tokens/s") else None
    digits = max(0, 4 - int(math.log10(abs(value)))) if value else 0
    text = f"{value:.{0 if spread else min(digits, 5)}f}"
    return text + (f" ({spread[0]:.0f} to {spread[1]:.0f})" if spread else "")


def say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
