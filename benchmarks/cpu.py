"""Speed and memory on a CPU: ours, transformers' and llama.cpp's, in turns in one run, against what the machine can do.

    python benchmarks/cpu.py [--quick] [--models NAMES] [--engines NAMES] [--formats NAMES] [--threads 2,1] [--rounds N]
                             [--prompt 512,4096] [--decode 128] [--json FILE] [--markdown FILE] [--work FOLDER]

Every engine and format is a process of its own, which computes only when it is asked, with its threads pinned to cores.
In each round all of them have a turn; ratios are taken inside a round. Weights are random, but for the bundled models.
llama.cpp needs llama-cpp-python, built natively, and gguf; without them its rows are reported as missing. All that is
written needs about 25 GB for mamba-1.4b, less for the others; --work keeps it for the next run.

--json: rows of {model, format, engine, threads, phase, tokens_per_s, spread, ratio_to, ratio, ...}; a measurement has a row
for each thing it is compared with. Phases that aren't tokens/s have `value` and `unit`, and `ratio` is the quotient of
the values. Spread: lowest and highest round; a number: the median.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("llama_speed.py")


@dataclass(frozen=True)
class Model:
    """shape: of the random weights, None for a bundled model; rounds: at most; slow: (prompt, decoded tokens) at most of
    transformers, whose scan is a loop in Python."""

    family: str
    shape: dict[str, int] | None
    rounds: int = 7
    slow: tuple[int, int] = (512, 32)


MODELS = {
    "mamba1-nano": Model("mamba1", None, slow=(512, 128)),
    "mamba2-nano": Model("mamba2", None, slow=(512, 128)),
    "mamba-130m": Model("mamba1", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}),
    "mamba2-130m": Model("mamba2", {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50288}),
    "mamba-370m": Model("mamba1", {"hidden_size": 1024, "num_hidden_layers": 48, "vocab_size": 50280}, 5, (128, 16)),
    "mamba-1.4b": Model("mamba1", {"hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 50280}, 3, (64, 8)),
}


@dataclass(frozen=True)
class Format:
    """source: the file it reads, by default its own; dtype: that the engine is asked for; recipe: preset and, unless it is
    the preset's own, whether embedding and head are quantized; against: what its ratios are taken to."""

    engine: str
    name: str
    source: str = ""
    dtype: str = ""
    recipe: tuple[str, bool | None] | None = None
    against: tuple[str, ...] = ()
    families: tuple[str, ...] = ("mamba1", "mamba2")

    @property
    def key(self) -> str:
        return f"{self.engine} {self.name}"

    @property
    def file(self) -> str:
        return self.source or self.name


WHOLE = "W8A8+head"  # head and embedding in int8, too; Mamba2's published layout is this one
FLOAT = "quamba float32"
FORMATS = [
    Format("quamba", "float32", dtype="float32", against=("transformers float32",)),
    Format("quamba", "bf16", dtype="bfloat16", against=("transformers bf16", "llama.cpp F16")),
    Format("quamba", "W8A8", recipe=("w8a8", False), against=("llama.cpp Q8_0", FLOAT), families=("mamba1",)),
    Format("quamba", WHOLE, recipe=("w8a8", True), against=("llama.cpp Q8_0", FLOAT)),
    Format("quamba", "W4A8", recipe=("w4a8", None), against=("llama.cpp Q4_0", "llama.cpp Q4_K_M", FLOAT)),
    Format("quamba", "W4A16", recipe=("w4a16", None), against=("llama.cpp Q4_0", "llama.cpp Q4_K_M", FLOAT)),
    Format("transformers", "float32", dtype="float32"),
    Format("transformers", "bf16", dtype="bfloat16"),
    *[Format("llama.cpp", kind) for kind in ("F16", "Q8_0", "Q4_0", "Q4_K_M")],
]
INTEGER = (WHOLE, "W4A8")  # all large products are calls of the C++ library
STARTS = {"first token": "s", "first token and imports": "s", "peak memory": "bytes"}
UNITS = STARTS | {"load": "s", "file": "s", "outside C++": "share"}
FLAT = ("mamba-130m", f"quamba {WHOLE}", (2048, 8192))
NEEDS = {"llama.cpp": ("llama_cpp", "gguf"), "transformers": (), "quamba": ()}


@dataclass(frozen=True)
class Bar:
    """What a number has to reach at the most threads: a row's `field`, at least or at most `limit`."""

    text: str
    model: str
    format: str
    phase: str
    field: str
    limit: float
    against: str | None = None
    at_most: bool = False


BARS = [
    Bar("Mamba1 W8A8 prefill / Q8_0", "mamba-130m", WHOLE, "prefill 512", "ratio", 9, "llama.cpp Q8_0"),
    Bar("Mamba1 W8A8 decode / Q8_0", "mamba-130m", WHOLE, "decode 128", "ratio", 2, "llama.cpp Q8_0"),
    Bar("Mamba2 W8A8 prefill / Q8_0", "mamba2-130m", WHOLE, "prefill 512", "ratio", 4, "llama.cpp Q8_0"),
    Bar("Mamba2 W8A8 decode / Q8_0", "mamba2-130m", WHOLE, "decode 128", "ratio", 2, "llama.cpp Q8_0"),
    Bar("Mamba1 W4A8 decode / Q4_0", "mamba-130m", "W4A8", "decode 128", "ratio", 2, "llama.cpp Q4_0"),
    Bar("Mamba2 W4A8 decode / Q4_0", "mamba2-130m", "W4A8", "decode 128", "ratio", 2, "llama.cpp Q4_0"),
    Bar("1.4b W8A8 decode, % of read bandwidth", "mamba-1.4b", WHOLE, "decode 128", "percent", 75),
    Bar("prefill, cost a token at 8192 / at 512", "mamba-130m", WHOLE, "prefill 8192", "cost", 1.1, at_most=True),
    Bar("loading W8A8 1.4b / reading its file", "mamba-1.4b", WHOLE, "load", "ratio", 2, "file", at_most=True),
    Bar("time outside C++ of a decoded token", "mamba-130m", WHOLE, "outside C++", "value", 0.15, at_most=True),
]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--quick", action="store_true", help="the 130m shapes, W8A8 and Q8_0, 2 threads: two minutes")
    parser.add_argument("--models", type=names, help=", ".join(MODELS))
    parser.add_argument("--engines", type=names, help=", ".join(NEEDS))
    parser.add_argument("--formats", type=names, help=", ".join(FORMAT_NAMES))
    parser.add_argument("--threads", type=numbers)
    parser.add_argument("--rounds", type=int, help="default: 3 to 7, by model")
    parser.add_argument("--prompt", type=numbers, help="tokens; all after the first in two rounds only")
    parser.add_argument("--decode", type=int, default=128, help="tokens")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--work", type=Path, help="folder for models, kept")
    options = parser.parse_args()
    quick = options.quick
    options.models = options.models or (["mamba-130m", "mamba2-130m"] if quick else list(MODELS))
    options.formats = options.formats or ([WHOLE, "Q8_0"] if quick else FORMAT_NAMES)
    options.engines = options.engines or list(NEEDS)
    options.threads = sorted(options.threads or ([2] if quick else [2, 1]), reverse=True)
    options.rounds = options.rounds or (3 if quick else None)
    options.prompt = options.prompt or ([512] if quick else [512, 4096])
    for chosen, known in ((options.models, MODELS), (options.formats, FORMAT_NAMES), (options.engines, NEEDS)):
        if unknown := [name for name in chosen if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    cores = physical_cores()
    if options.threads[0] > len(cores):
        parser.error(f"{options.threads[0]} threads, but this process has {len(cores)} cores")
    options.cores = cores[: options.threads[0]]
    return options


FORMAT_NAMES = list(dict.fromkeys(format.name for format in FORMATS))


def physical_cores() -> list[int]:
    """One allowed CPU of each core."""
    chosen: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        file = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        chosen.setdefault(file.read_text() if file.exists() else str(cpu), cpu)
    return sorted(chosen.values())


def available_memory() -> float:
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


class Missing(Exception):
    """An engine or format that can't be measured; says why."""


class Process:
    """A worker: one request, one answer."""

    def __init__(self, cores: list[int], threads: int):
        places = {"OMP_PLACES": ",".join(f"{{{core}}}" for core in cores), "OMP_PROC_BIND": "true"}
        places |= {"GOMP_CPU_AFFINITY": " ".join(map(str, cores)), "OMP_NUM_THREADS": str(threads)}
        self.spawned = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | places | {"OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def ask(self, do: str, **task: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        line = ""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do} | task) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended ({self.process.wait()})"}
        if "error" in answer:
            raise Missing(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


class Bench:
    """One model: its processes, and samples[format's key, threads, phase][round]."""

    def __init__(self, name: str, options: argparse.Namespace, work: Path, missing: dict[str, str]):
        self.name, self.model, self.options, self.missing = name, MODELS[name], options, missing
        self.most = options.threads[0]
        self.samples: dict[tuple[str, int, str], dict[int, float]] = defaultdict(dict)
        self.tokens: dict[tuple[str, str], int] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.running: dict[str, Process] = {}
        self.formats = [
            f
            for f in FORMATS
            if f.name in options.formats and f.engine in options.engines and self.model.family in f.families
        ]
        self.formats = [f for f in self.formats if f.engine not in missing]
        self.made = self.make(work / name)
        say(f"{name}: measuring")
        for f in self.formats:
            if f.file in self.made["failed"]:
                self.tell(f, self.made["failed"][f.file])
        self.formats = [f for f in self.formats if f.file in self.made["paths"]]
        needed = sum(1.2 * self.made["sizes"][f.file] + 5e8 for f in self.formats)
        self.resident = needed < 0.7 * available_memory()

    def make(self, folder: Path) -> dict[str, Any]:
        say(f"{self.name}: writing its files")
        recipes = {f.file: dict(zip(("preset", "vocabulary"), f.recipe)) for f in self.formats if f.recipe}
        gguf = [f.name for f in self.formats if f.engine == "llama.cpp"]
        wanted = {"formats": [f.file for f in self.formats], "recipes": recipes, "gguf": gguf, "model": self.name}
        wanted |= {"family": self.model.family, "shape": self.model.shape, "folder": str(folder)}
        process = Process(self.options.cores, self.most)
        with contextlib.closing(process):
            return process.ask("make", threads=self.most, **wanted)

    def sizes(self, format: Format, prompt: int) -> tuple[int, int]:
        """Tokens of prompt and of decoding that this format is given."""
        most = self.model.slow if format.engine == "transformers" else (prompt, self.options.decode)
        return min(prompt, most[0]), min(self.options.decode, most[1])

    def rounds(self, prompt: int) -> int:
        rounds = self.options.rounds or self.model.rounds
        return rounds if prompt == self.options.prompt[0] else min(2, rounds)

    def run(self) -> None:
        for threads in self.options.threads:
            for turn in range(self.rounds(self.options.prompt[0])):
                shift = turn % max(1, len(self.formats))
                for format in self.formats[shift:] + self.formats[:shift]:
                    with self.noted(format):
                        self.turn(format, threads, turn)
        self.close()

    def tell(self, format: Format, why: str) -> None:
        self.missing[f"{self.name}, {format.key}"] = why
        say(f"MISSING {self.name}, {format.key}: {why}")

    @contextlib.contextmanager
    def noted(self, format: Format) -> Iterator[None]:
        try:
            yield
        except Missing as error:
            self.tell(format, str(error))
            self.formats = [f for f in self.formats if f is not format]
            self.stop(format)

    def process(self, format: Format) -> Process:
        if format.key not in self.running:
            longest = max(*self.options.prompt, *FLAT[2]) + self.options.decode + 64
            prompt, _ = self.sizes(format, self.options.prompt[0])
            process = self.running[format.key] = Process(self.options.cores, self.most)
            task = {"engine": format.engine, "path": self.made["paths"][format.file], "dtype": format.dtype}
            task |= {"vocabulary": self.made["vocabulary"], "longest": longest, "prompt": prompt, "threads": self.most}
            facts = self.facts[format.key] = process.ask("start", spawned=process.spawned, **task)
            for phase in STARTS:
                if (key := phase.replace(" ", "_")) in facts:
                    self.add(format, self.most, phase, len(self.samples[format.key, self.most, phase]), facts[key])
        return self.running[format.key]

    def stop(self, format: Format) -> None:
        if process := self.running.pop(format.key, None):
            process.close()

    def close(self) -> None:
        for format in FORMATS:
            self.stop(format)

    def add(self, format: Format, threads: int, phase: str, turn: int, value: float, tokens: int = 0) -> None:
        self.tokens[format.key, phase] = tokens
        self.samples[format.key, threads, phase][turn] = value

    def turn(self, format: Format, threads: int, turn: int) -> None:
        """All that one format measures in one round."""
        process, first = self.process(format), self.options.prompt[0]
        prompts = list(self.options.prompt if threads == self.most and format.engine != "transformers" else [first])
        if (self.name, format.key) == FLAT[:2] and threads == self.most and not self.options.quick:
            prompts += [length for length in FLAT[2] if length not in prompts]
        for length in prompts:
            if turn < self.rounds(length):
                prompt, decode = self.sizes(format, length)
                found = process.ask("run", threads=threads, prompt=prompt, decode=decode if length == first else 0)
                self.add(format, threads, f"prefill {length}", turn, prompt / found["prefill"], prompt)
                if length == first:
                    self.add(format, threads, f"decode {self.options.decode}", turn, decode / found["decode"], decode)
        if not (self.options.quick and turn):
            self.rest(process, format, threads, turn)
        if not self.resident:
            self.stop(format)

    def rest(self, process: Process, format: Format, threads: int, turn: int) -> None:
        """What a quick run measures in its first round only."""
        _, decode = self.sizes(format, self.options.prompt[0])
        seconds = process.ask("generate", threads=threads, decode=decode)["generate"]
        self.add(format, threads, f"generate {self.options.decode}", turn, decode / seconds, decode)
        if format.engine == "quamba" and format.name in INTEGER and threads == self.most:
            if found := process.ask("outside", threads=threads, prompt=16, decode=min(decode, 32)):
                self.add(format, threads, "outside C++", turn, found["outside"])
            found = process.ask("reload", threads=threads)
            self.add(format, threads, "load", turn, found["load"])
            self.add(format, threads, "file", turn, found["file"])


def rows_of(bench: Bench, probes: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (key, threads, phase), found in bench.samples.items():
        format = next(f for f in FORMATS if f.key == key)
        samples = kept(found, phase)
        row: dict[str, Any] = {"model": bench.name, "format": format.name, "engine": format.engine, "threads": threads}
        middle, spread = statistics.median(samples.values()), [min(samples.values()), max(samples.values())]
        row |= {"phase": phase, "tokens_per_s": None if phase in UNITS else middle, "spread": spread}
        row |= {"ratio_to": None, "ratio": None, "ratio_spread": None, "rounds": len(samples)}
        row |= {"discarded": len(found) - len(samples)}
        if phase in UNITS:
            row |= {"value": middle, "unit": UNITS[phase]}
        else:
            row["tokens"] = bench.tokens[key, phase]
        kind, peaks = phase.split()[0], probes[threads]
        if kind == "decode":
            row["gb_per_s"] = bench.facts[key]["bytes"] * middle / 1e9
            row["percent"] = 100 * row["gb_per_s"] / peaks["read"]
        if kind == "prefill" and format.engine == "quamba" and format.recipe:
            row["percent"] = 100 * 2 * bench.made["multiply_adds"] * middle / 1e9 / peaks["peak"]
        if kind == "prefill" and (base := bench.samples.get((key, threads, f"prefill {bench.options.prompt[0]}"))):
            costs = quotients(base, samples)
            row["cost"] = statistics.median(costs) if costs else None
        compared = []
        for other in ["file"] if phase == "load" else [] if phase in ("file", "outside C++") else format.against:
            place = (key, threads, "file") if other == "file" else (other, threads, phase)
            ratios = quotients(samples, kept(bench.samples.get(place, {}), phase))
            if ratios:
                ratio = {"ratio_to": other, "ratio": statistics.median(ratios)}
                compared.append(row | ratio | {"ratio_spread": [min(ratios), max(ratios)]})
        rows += compared or [row]
    return rows


def kept(samples: dict[int, float], phase: str) -> dict[int, float]:
    """Without rounds at less than a third of the fastest: threads that wait for each other on one core, not arithmetic.
    All stay when that would be half of them or more: then the fastest is no measure."""
    if phase in UNITS:
        return samples
    fast = {turn: rate for turn, rate in samples.items() if rate > max(samples.values()) / 3}
    return fast if 2 * len(fast) > len(samples) else samples


def quotients(a: dict[int, float], b: dict[int, float]) -> list[float]:
    return [a[turn] / b[turn] for turn in a if b.get(turn)]


def judged(bar: Bar, rows: list[dict[str, Any]], threads: int) -> list[str]:
    wanted = {"model": bar.model, "format": bar.format, "engine": "quamba", "phase": bar.phase, "threads": threads}
    if bar.against:
        wanted["ratio_to"] = bar.against
    number = next((row.get(bar.field) for row in rows if all(row[k] == v for k, v in wanted.items())), None)
    limit = f"{'<=' if bar.at_most else '>='} {bar.limit:g}"
    if number is None:
        return [bar.text, limit, "", "not measured"]
    met = number <= bar.limit if bar.at_most else number >= bar.limit
    return [bar.text, limit, f"{number:.3g}", "met" if met else "MISSED"]


def report(
    facts: dict[str, str], rows: list[dict[str, Any]], probes: dict[int, dict[str, Any]], missing: dict[str, str]
) -> str:
    lines = ["# Speed on a CPU", "", *[f"* {key}: {value}" for key, value in facts.items()]]
    for threads, peaks in probes.items():
        lines.append(
            f"* probe, {threads} thread{'s' * (threads > 1)}: {peaks['read']:.1f} GB/s read, {peaks['peak']:.0f}e9 "
            f"operations/s ({peaks['what']}; by {peaks['by']})"
        )
    rates = [row["spread"] for row in rows if row["tokens_per_s"]]
    if wild := [spread for spread in rates if spread[1] > 2 * spread[0]]:
        lines.append(f"* DISTURBED: in {len(wild)} of {len(rates)} rows the fastest round is over twice the slowest")
    lines += [f"* MISSING {name}: {why}" for name, why in missing.items()]
    lines += ["", *table([["bar", "wanted", "measured", ""], *[judged(bar, rows, max(probes)) for bar in BARS]])]
    for model, threads in dict.fromkeys((row["model"], row["threads"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["threads"]) == (model, threads)]
        lines += ["", f"## {model}, {threads} thread{'s' * (threads > 1)}", "", "Tokens/s:", "", *speeds(mine)]
        if values := [row for row in mine if row["phase"] in UNITS]:
            lines += ["", "From start to first logits, peak memory then, loading again:", "", *values_of(values)]
        if ratios := [row for row in mine if row["ratio_to"] and row["phase"] not in UNITS]:
            lines += ["", "Ratios:", "", *ratios_of(ratios)]
    return "\n".join(lines) + "\n\n" + NOTES


NOTES = """Numbers are medians, in brackets the lowest and highest round; ratios are medians over rounds of the quotient
inside the round. A number followed by @ N comes from N tokens. prefill: a prompt from an empty state; decode: the tokens
after it, one call of the model each; generate: greedy, by the engine's own means. GB/s: bytes of the weights read for a
token (blocks and head, not the state) times tokens/s, and that as percent of the read probe. % of peak: multiplications
and additions of the blocks' projections, of the integer peak. Peak memory counts pages of mapped files. First token:
loading and the first prompt, files in the page cache, without and with the start of Python and the imports. Outside C++:
the share of a decoded token not spent inside calls of the C++ library; torch's lookup of the embedding is outside.
W8A8+head: embedding and head are int8, too. Float parts of quantized models of ours are float16.
"""


def pivot(rows: list[dict[str, Any]], heads: list[str], cell: Any) -> list[list[str]]:
    """A line for each engine and format, a column for each phase."""
    names = list(dict.fromkeys(f"{row['engine']} {row['format']}" for row in rows))
    found = {(f"{row['engine']} {row['format']}", row["phase"]): row for row in rows}
    return [["", *heads]] + [[n, *[cell(found[n, h]) if (n, h) in found else "" for h in heads]] for n in names]


def speeds(rows: list[dict[str, Any]]) -> list[str]:
    rows = [row for row in rows if row["phase"] not in UNITS]
    heads = list(dict.fromkeys(row["phase"] for row in rows))

    def cell(row: dict[str, Any]) -> str:
        text = f"{row['tokens_per_s']:.4g} ({row['spread'][0]:.4g} to {row['spread'][1]:.4g})"
        text += f" @ {row['tokens']}" if str(row["tokens"]) != row["phase"].split()[1] else ""
        text += f", {row['discarded']} discarded" if row["discarded"] else ""
        if "gb_per_s" in row:
            return f"{text}; {row['gb_per_s']:.1f} GB/s, {row['percent']:.0f} %"
        return text + (f"; {row['percent']:.0f} % of peak" if "percent" in row else "")

    return table(pivot(rows, heads, cell))


def values_of(rows: list[dict[str, Any]]) -> list[str]:
    def cell(row: dict[str, Any]) -> str:
        if row["unit"] == "bytes":
            return f"{row['value'] / 1e6:.0f} MB"
        if row["unit"] == "share":
            return f"{100 * row['value']:.0f} %"
        return f"{row['value']:.3g} s" + (f" ({row['ratio']:.2f} x file)" if row["ratio_to"] == "file" else "")

    heads = [phase for phase in UNITS if any(row["phase"] == phase for row in rows)]
    return table(pivot(rows, heads, cell))


def ratios_of(rows: list[dict[str, Any]]) -> list[str]:
    heads = list(dict.fromkeys(row["phase"] for row in rows))
    rows = [row | {"format": f"{row['format']} / {row['ratio_to']}"} for row in rows]
    return table(
        pivot(rows, heads, lambda r: f"{r['ratio']:.2f} ({r['ratio_spread'][0]:.2f} to {r['ratio_spread'][1]:.2f})")
    )


def table(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def machine(options: argparse.Namespace) -> dict[str, str]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    versions = [f"Python {platform.python_version()}"]
    for package in ("torch", "transformers", "llama-cpp-python", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": f"{cpu}, {os.cpu_count()} CPUs seen, threads pinned to {', '.join(map(str, options.cores))}",
        "versions": ", ".join(versions),
        "load average before": f"{os.getloadavg()[0]:.2f}",
    }


def probe(options: argparse.Namespace, work: Path, known: dict[int, dict[str, Any]]) -> None:
    """The best of all probes of the run."""
    for threads in options.threads:
        with contextlib.closing(Process(options.cores, threads)) as process:
            found = process.ask("probe", threads=threads, folder=str(work))
        before = known.setdefault(threads, found)
        known[threads] = found | {key: max(found[key], before[key]) for key in ("read", "peak")}


def absent(engines: list[str]) -> dict[str, str]:
    """Why engines can't be measured here."""
    missing = {}
    for engine in engines:
        if lacking := [name for name in NEEDS[engine] if importlib.util.find_spec(name) is None]:
            missing[engine] = f"not installed: {', '.join(lacking)} (pip install llama-cpp-python gguf)"
            say(f"MISSING {engine}: {missing[engine]}")
    return missing


def main() -> None:
    options, started = arguments(), time.monotonic()
    missing = absent(options.engines)
    facts, rows, probes = machine(options), [], {}
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quamba-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        probe(options, work, probes)
        for name in options.models:
            try:
                bench = Bench(name, options, work, missing)
            except Missing as error:
                missing[name] = str(error)
                continue
            stack.callback(bench.close)
            bench.run()
            probe(options, work, probes)
            rows += rows_of(bench, probes)
            for key, found in bench.facts.items():
                if "kernels" in found:
                    facts[f"kernels of {key.split()[0]}"] = found["kernels"]
            facts["seconds taken"] = f"{time.monotonic() - started:.0f}"
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            if options.markdown:
                options.markdown.write_text(report(facts, rows, probes, missing), encoding="utf-8")
    print(report(facts, rows, probes, missing))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
