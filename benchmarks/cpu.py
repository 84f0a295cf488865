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
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu_formats import FLAT, FORMAT_NAMES, FORMATS, INTEGER, MODELS, NEEDS, STARTS, WHOLE, Format
from cpu_report import report, rows_of

WORKER = Path(__file__).with_name("cpu_worker.py")


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
    parser.add_argument(
        "--prompt", type=numbers, help="tokens; the later ones twice, at the most threads, not of transformers"
    )
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
        return min(prompt, most[0]) // format.fewer, min(self.options.decode, most[1]) // format.fewer

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
