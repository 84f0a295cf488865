"""What each format costs in accuracy and buys in bytes: ours, the published recipes, naive rounding, llama.cpp.

    python benchmarks/accuracy.py --data DIR [--model NAME ...] [--only TEXT ...] [--out FILE]
    python benchmarks/accuracy.py --ablation [--model NAME ...] [--out FILE]

DIR holds wikitext2_test.txt, lambada_openai_test.jsonl, piqa_valid.jsonl and hellaswag_val_1000.jsonl, all used whole; the
novels are the bundled sample. Everything that isn't integer is computed in float32. Rows that FILE.json has are kept, so a
run that was stopped goes on; FILE.md is the table. The llama.cpp rows need the packages llama-cpp-python and gguf, and
are marked missing without them. --ablation takes the bundled wikitext sample.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

TASKS = {"lambada_openai": "lambada_openai_test", "piqa": "piqa_valid", "hellaswag": "hellaswag_val_1000"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="bundled name; both by default")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--only", action="append", help="rows whose name contains this text, or (=TEXT) is it")
    parser.add_argument("--samples", type=int, help="calibration windows; by default each recipe's own")
    parser.add_argument("--scratch", type=Path, help="keep quantized models and logits (13 GB) here for the next run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without suffix; default: print only")
    options = parser.parse_args()
    if not options.ablation and options.data is None:
        parser.error("--data DIR is needed")
    return options


def recipes(family: str) -> dict[str, Any]:
    """Row -> recipe of the main table."""
    from quamba.plan import SiteSpec, WeightSpec
    from quamba.recipe import Recipe

    def ours(name: str, **changes: Any) -> Any:
        return dataclasses.replace(Recipe.find(name, family), **changes)

    vocabulary = {"embedding": WeightSpec(8), "lm_head": WeightSpec(8)}
    token = SiteSpec(8, "token")
    w8a8 = ours("w8a8")
    static = SiteSpec(8, "static")
    naive = dataclasses.replace(
        w8a8,
        weights=dict.fromkeys(w8a8.weights, WeightSpec(8, "tensor")),
        sites=dict.fromkeys(w8a8.sites, static),
        rotate=(),
        **vocabulary,
        final_norm=static,
    )
    w4a16 = ours("w4a16")
    g128 = WeightSpec(4, group=128, group_scale="float")
    rtn = dataclasses.replace(
        w4a16,
        weights={name: g128 if spec.bits == 4 else spec for name, spec in w4a16.weights.items()},
        rotate=(),
        clip="absmax",
        gptq=dataclasses.replace(w4a16.gptq, weights=()),
    )
    int4 = {"embedding": WeightSpec(4), "lm_head": WeightSpec(4)}
    published = {
        "mamba1": ("quamba1-w8a8", "quamba2-w4a8-mamba1", "quamba2-w4a16-mamba1"),
        "mamba2": ("quamba2-w8a8", "quamba2-w4a8", "quamba2-w4a16"),
    }[family]
    found = {
        "naive W8A8: static minmax, per tensor": naive,
        "naive W4A16: to nearest, groups of 128": rtn,
        **{name: Recipe.find(name, family) for name in published},
        "w8a8": w8a8,
        "w4a8": ours("w4a8"),
        "w4a16": w4a16,
        "w4a8, int4 vocabulary": ours("w4a8", **int4),
        "w4a16, int4 vocabulary": ours("w4a16", **int4),
    }
    if w8a8.embedding.is_float:
        found["w8a8, int8 vocabulary"] = dataclasses.replace(w8a8, **vocabulary, final_norm=token)
    return found


def ablations(family: str) -> dict[str, Any]:
    """Row -> recipe: each of our defaults with one ingredient changed. Names say what changed."""
    from quamba.plan import SiteSpec, WeightSpec
    from quamba.recipe import Recipe

    def of(name: str, **changes: Any) -> Any:
        return dataclasses.replace(Recipe.find(name, family), **changes)

    def int4(name: str, **spec: Any) -> Any:
        weights = Recipe.find(name, family).weights
        return {"weights": {n: WeightSpec(4, **spec) if w.bits == 4 else w for n, w in weights.items()}}

    def sites(name: str, **changed: Any) -> Any:
        return {"sites": Recipe.find(name, family).sites | changed}

    static = SiteSpec(8, "static")
    no_gptq = {"gptq": dataclasses.replace(Recipe.find("w4a16", family).gptq, weights=())}
    inputs = {"mixer_in": static, "out_proj_in": static}
    found = {
        "w8a8": of("w8a8"),
        "w8a8, no online Hadamard": of("w8a8", rotate=()),
        "w8a8, residual stream turned": of("w8a8", rotate_residual=True),
        "w8a8, static scales into projections, minmax": of("w8a8", **sites("w8a8", **inputs)),
        "w8a8, static scales into projections, mse": of(
            "w8a8", **sites("w8a8", **inputs), observers={"mixer_in": "mse", "out_proj_in": "mse"}
        ),
        "w8a8, static and no online Hadamard": of("w8a8", **sites("w8a8", **inputs), rotate=()),
        "w8a8, x per tensor": of("w8a8", **sites("w8a8", x=static)),
        "w8a8, x per tensor, 99.95th percentile": of("w8a8", **sites("w8a8", x=static), observers={"x": "percentile"}),
        "w8a8, channel scales by mse": of("w8a8", observer="mse"),
        "w8a8, clipping searched": of("w8a8", clip="search"),
        "w8a8, GPTQ": Recipe.find("w8a8", family).with_switches(gptq=True),
        "w8a8, calibrated on the float model": of("w8a8", propagate="float"),
    }
    if family == "mamba2":
        found["w8a8, x in 4 x 4 groups, sorted"] = Recipe.find("w8a8", family).with_switches(group_heads=True)
        grouped = {"x": SiteSpec(8, "static", "group")}
        found["w8a8, x in 4 x 4 groups, unsorted"] = of("w8a8", **sites("w8a8", **grouped))
    found |= {
        "w4a16": of("w4a16"),
        "w4a16, to nearest": of("w4a16", **no_gptq),
        "w4a16, to nearest, absmax": of("w4a16", **no_gptq, clip="absmax"),
        "w4a16, absmax": of("w4a16", clip="absmax"),
        "w4a16, GPTQ in order of activations": of(
            "w4a16", gptq=dataclasses.replace(Recipe.find("w4a16", family).gptq, act_order=True)
        ),
        "w4a16, no online Hadamard": of("w4a16", rotate=()),
        "w4a16, residual stream turned": of("w4a16", rotate_residual=True),
        "w4a16, groups of 64": of("w4a16", **int4("w4a16", group=64)),
        "w4a16, groups of 128": of("w4a16", **int4("w4a16", group=128)),
        "w4a16, groups of 32, float scales": of("w4a16", **int4("w4a16", group_scale="float")),
        "w4a16, groups of 128, float scales": of("w4a16", **int4("w4a16", group=128, group_scale="float")),
        "w4a16, vocabulary float": of("w4a16", embedding=WeightSpec(), lm_head=WeightSpec()),
        "w4a16, vocabulary int4": of("w4a16", embedding=WeightSpec(4), lm_head=WeightSpec(4)),
        "w4a8": of("w4a8"),
        "w4a8, residual stream turned": of("w4a8", rotate_residual=True),
        "w4a8, no online Hadamard": of("w4a8", rotate=()),
    }
    # What W4A8 loses against W4A16, site by site: the sites made integer one group at a time.
    eight = Recipe.find("w4a8", family)
    for name, group in {
        "projections": ("mixer_in", "out_proj_in"),
        "mixer_in": ("mixer_in",),
        "out_proj_in": ("out_proj_in",),
        "conv_in": ("conv_in",),
        "x": ("x",),
        "z": ("z",),
        "B and C": ("B", "C"),
    }.items():
        chosen = {site: eight.sites[site] for site in group if site in eight.sites}
        if chosen:
            weights = {n: w for n, w in eight.weights.items() if n != "conv1d" or "conv_in" in chosen}
            found[f"w4a8, only {name} integer"] = dataclasses.replace(
                eight, sites=chosen, weights=weights, final_norm=SiteSpec()
            )
    found["w4a8, only the head's input integer"] = dataclasses.replace(
        eight, sites={}, weights={n: w for n, w in eight.weights.items() if n != "conv1d"}
    )
    return found


class Bench:
    """One model, its float self, and the texts and tasks it is judged by."""

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path):
        from quamba import QuambaLMHeadModel
        from quamba.evaluation import encode_text
        from quamba.formats import load_tokenizer

        self.name, self.scratch = name, scratch
        self.float = QuambaLMHeadModel.from_pretrained(name, dtype="float32")
        self.tokenizer = load_tokenizer(name)
        self.small, self.samples = options.ablation, options.samples
        sources: list[Any] = ["wikitext"] if self.small else [options.data / "wikitext2_test.txt", "novels"]
        self.ids = {Path(source).stem: encode_text(self.tokenizer, source) for source in sources}
        self.tasks: dict[str, Any] = {}
        if not self.small:
            self.data = rows_for_lm_eval(options.data, scratch / "data")

    def quantized(self, row: str, recipe: Any) -> tuple[Any, dict[str, Any]]:
        """The quantized model, and its bytes and the seconds that quantizing took; once it is made, only loaded."""
        import quamba
        from quamba.formats import bits, open_checkpoint

        out, seconds = self.scratch / f"{row.replace('/', ' ')}", {}
        if not (out / "config.json").exists():
            started = time.monotonic()
            quamba.quantize(self.name, recipe, out=out, overwrite=True, dtype="float16", samples=self.samples)
            seconds = {"seconds": round(time.monotonic() - started, 1)}
        size = {"bytes": sum(file.stat().st_size for file in out.glob("*.safetensors"))}
        model = quamba.QuambaLMHeadModel.from_pretrained(out, dtype="float32")
        return model, size | bits(open_checkpoint(str(out))) | seconds

    def texts(self, model: Any) -> dict[str, Any]:
        from quamba.evaluation import compare

        row: dict[str, Any] = {}
        for text, ids in self.ids.items():
            with Remembered(self.float, self.scratch / f"{text}.logits") as reference:
                found = compare(model, reference, ids)
            row |= {
                f"{text}: perplexity": found.score.perplexity,
                f"{text}: perplexity, change": found.score.perplexity / found.reference_score.perplexity - 1,
                f"{text}: KL": found.mean_kl,
                f"{text}: KL stderr": found.mean_kl_stderr,
                f"{text}: KL, 99.9th percentile": found.p999_kl,
                f"{text}: top-1 agreement": found.top1_agreement,
            }
        return row

    def harness(self, model: Any) -> dict[str, Any]:
        """LAMBADA's log-likelihood a word; mean absolute change of every choice's log-likelihood of the others."""
        from quamba.evaluation import run_tasks

        def run(model: Any) -> dict[str, Any]:
            found = run_tasks(model, self.tokenizer, list(TASKS), data=self.data, batch_size=32)
            return {task.task: task for task in found}

        if not self.tasks:
            self.tasks = run(self.float)
        found = self.tasks if model is self.float else run(model)
        row = {"LAMBADA: log-likelihood a word": found["lambada_openai"].metrics["loglikelihood_per_word"].value}
        for task in ("piqa", "hellaswag"):
            pairs = zip(found[task].choices, self.tasks[task].choices, strict=True)
            changes = [abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True)]
            row[f"{task}: change of a choice's log-likelihood"] = sum(changes) / len(changes)
        return row


class Remembered:
    """A model whose logits are written to a file the first time it reads a text, and come from there afterwards."""

    def __init__(self, model: Any, file: Path):
        self.model, self.file, self.position = model, file, 0
        self.config, self.device, self.name_or_path = model.config, model.device, model.name_or_path
        self.part = file.with_suffix(".part")

    def __enter__(self) -> Remembered:
        self.stream = None if self.file.exists() else self.part.open("wb")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.stream is not None:
            self.stream.close()
            self.part.unlink() if error[0] else self.part.rename(self.file)

    def __call__(self, input_ids: Any) -> Any:
        import torch

        shape = torch.Size((*input_ids.shape, self.config.vocab_size))
        if self.stream is None:
            whole = torch.from_file(str(self.file), size=self.file.stat().st_size // 4, dtype=torch.float32)
            logits = whole[self.position : self.position + shape.numel()].view(shape)
        else:
            logits = self.model(input_ids=input_ids).logits
            self.stream.write(logits.contiguous().numpy().tobytes())
        self.position += shape.numel()
        return SimpleNamespace(logits=logits)


def rows_for_lm_eval(data: Path, folder: Path) -> Path:
    """A folder of task files with the columns that lm-eval's tasks read."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, name in TASKS.items():
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() if line]
        if task == "piqa" and "query" in rows[0]:
            rows = [
                {
                    "goal": row["query"].removeprefix("Question: "),
                    "sol1": row["choices"][0],
                    "sol2": row["choices"][1],
                    "label": row["gold"],
                }
                for row in rows
            ]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


Row = Callable[[], tuple[Any, dict[str, Any]]]


def candidates(bench: Bench) -> dict[str, Row]:
    """Row -> function that gives the model and its size."""
    family = bench.float.config.blocks[0]["mixer"]
    chosen = ablations(family) if bench.small else recipes(family)
    rows: dict[str, Row] = {name: partial(bench.quantized, name, recipe) for name, recipe in chosen.items()}
    if bench.small:
        return rows
    rows |= {f"llama.cpp {kind}": partial(llama, bench, kind) for kind in ("Q4_0", "Q4_K_M", "Q8_0")}
    rows["llama.cpp Q4_0, vocabulary Q8_0"] = partial(llama, bench, "Q4_0", "Q8_0")
    return {"float": lambda: (bench.float, float_size(bench.name))} | rows


def float_size(name: str) -> dict[str, Any]:
    from quamba import bundled
    from quamba.formats import bits, open_checkpoint

    files = bundled.model_path(name).glob("*.safetensors")
    return {"bytes": sum(file.stat().st_size for file in files)} | bits(open_checkpoint(name))


def llama(bench: Bench, kind: str, vocabulary: str | None = None) -> tuple[Any, dict[str, Any]]:
    sys.path.insert(0, str(Path(__file__).parent))
    import llama_reference as reference

    source, target = bench.scratch / "float.gguf", bench.scratch / f"{kind}.gguf"
    if not source.exists():
        reference.write_gguf(bench.name, source)
    reference.quantize_gguf(source, target, kind, vocabulary=vocabulary)
    return reference.LlamaModel(target), reference.bits(target)


def main() -> None:
    options = arguments()
    import torch

    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    if options.out and options.out.with_suffix(".json").exists():
        rows = json.loads(options.out.with_suffix(".json").read_text())["rows"]
    for name in options.model or ["mamba1-nano", "mamba2-nano"]:
        with scratch_folder(options.scratch, name) as folder, torch.inference_mode():
            bench = Bench(name, options, folder)
            for judge in [bench.texts] if bench.small else [bench.texts, bench.harness]:
                for label, make in candidates(bench).items():
                    if not options.only or any(text in label or text == f"={label}" for text in options.only):
                        fill(rows, name, label, judge, make)
                        write(options, rows)
    if not options.out:
        print(markdown(options, rows))


def scratch_folder(folder: Path | None, name: str) -> Any:
    if folder is None:
        return tempfile_folder()
    (folder / name).mkdir(parents=True, exist_ok=True)
    return contextlib.nullcontext(folder / name)


@contextlib.contextmanager
def tempfile_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def fill(rows: list[dict[str, Any]], name: str, label: str, judge: Callable[[Any], dict[str, Any]], make: Row) -> None:
    """Measure what the row lacks of this judge's columns."""
    row = next((row for row in rows if row["model"] == name and row["row"] == label), None)
    if row is None:
        row = {"model": name, "row": label}
        rows.append(row)
    if judge.__name__ in row.get("done", []):
        return
    started = time.monotonic()
    try:
        model, size = make()
    except ImportError as error:
        row["missing"] = str(error)
        return
    row.pop("missing", None)
    row |= size | judge(model)
    row["done"] = [*row.get("done", []), judge.__name__]
    print(f"{name} | {label} | {time.monotonic() - started:.0f} s | {brief(row)}", file=sys.stderr, flush=True)


def brief(row: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.5g}" for key, value in row.items() if "KL" in key or "perplexity" in key) or str(
        row
    )


def write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if options.out is None:
        return
    data = {"machine": machine(options), "rows": rows}
    options.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    options.out.with_suffix(".md").write_text(markdown(options, rows), encoding="utf-8")


def machine(options: argparse.Namespace) -> dict[str, str]:
    from w8a8 import machine  # the other benchmark's

    samples = f"{options.samples} windows" if options.samples else "as the recipes say"
    return machine(options.threads) | {"calibration": f"{samples}, bundled text"}


COLUMNS = {
    "bytes": ("MB", lambda v: f"{v / 1e6:.2f}"),
    "body_bits": ("body, bits", lambda v: f"{v:.2f}"),
    "vocabulary_bits": ("vocabulary, bits", lambda v: f"{v:.2f}"),
    "perplexity": ("perplexity", lambda v: f"{v:.3f}"),
    "perplexity, change": ("change", lambda v: f"{100 * v:+.2f} %"),
    "KL": ("KL", lambda v: f"{v:.5f}"),
    "KL, 99.9th percentile": ("KL, 99.9 %", lambda v: f"{v:.4f}"),
    "top-1 agreement": ("top-1", lambda v: f"{100 * v:.2f} %"),
    "LAMBADA: log-likelihood a word": ("LAMBADA", lambda v: f"{v:.3f}"),
    "piqa: change of a choice's log-likelihood": ("PIQA, change", lambda v: f"{v:.3f}"),
    "hellaswag: change of a choice's log-likelihood": ("HellaSwag, change", lambda v: f"{v:.3f}"),
}


def markdown(options: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    title = "What each ingredient buys" if options.ablation else "Accuracy and bytes of each format"
    lines = [f"# {title}", "", *[f"* {key}: {value}" for key, value in machine(options).items()], ""]
    for model in dict.fromkeys(row["model"] for row in rows):
        chosen = [row for row in rows if row["model"] == model]
        texts = list(dict.fromkeys(key.split(":")[0] for row in chosen for key in row if key.endswith(": perplexity")))
        lines += [f"## {model}", ""]
        header, keys = [], []
        for key, (name, _) in COLUMNS.items():
            for full in [f"{text}: {key}" for text in texts] if key in TEXT_KEYS else [key]:
                if any(full in row for row in chosen):
                    header.append(f"{full.split(':')[0]}: {name}" if key in TEXT_KEYS else name)
                    keys.append((full, key))
        lines += ["| | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
        for row in chosen:
            cells = [COLUMNS[key][1](row[full]) if full in row else row.get("missing", "") for full, key in keys]
            lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
        lines.append("")
    if not options.ablation:
        lines += [
            "bytes: ours and the published recipes' count our safetensors files (a scale that holds for a part of the rows",
            "is stored once a row there), llama.cpp's its tensors without the file's metadata. Empty cells: not measured.",
            "",
        ]
    return "\n".join(lines)


TEXT_KEYS = ("perplexity", "perplexity, change", "KL", "KL, 99.9th percentile", "top-1 agreement")


if __name__ == "__main__":
    main()
