"""From rows to a page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpu_shapes import BARS, PAPER, Bar

Row = dict[str, Any]
PAPERS = {"prefill": 1.4, "decode": 3.0}  # Quamba2 (arXiv 2503.22879): Mamba2-8B, batch 1, speed-ups over float16


def report(facts: dict[str, str], rows: list[Row]) -> str:
    lines = ["# Speed on a GPU", "", *[f"* {name}: {value}" for name, value in facts.items()]]
    lines += [f"* {text}" for text in probes(rows)]
    steps = [row for row in rows if row["kind"] == "step"]
    for how in dict.fromkeys(row["how"] for row in steps if row["how"] != "graph"):
        lines.append(f"* NOT CAPTURED, {sum(row['how'] == how for row in steps)} rows: {how}")
    lines += ["", *table([["bar", "wanted", "measured", ""], *[judged(bar, rows) for bar in BARS]]), "", *paper(rows)]
    for model in dict.fromkeys(row["model"] for row in steps):
        mine = [row for row in steps if row["model"] == model]
        lines += ["", f"## {model}", "", "Tokens/s:", "", *pivot(mine, speed)]
        lines += ["", "Launches, and memory in use:", "", *pivot(mine, overhead)]
    if found := [row for row in rows if row["kind"] == "product" and "ms" in row]:
        lines += ["", "## Products", "", *products(found)]
    if found := [row for row in rows if row["kind"] == "scan" and "ms" in row]:
        lines += ["", "## Scans", "", *scans(found)]
    lines += ["", "## Missing", "", *missing(rows)]
    return "\n".join(lines) + "\n\n" + NOTES


NOTES = """Numbers are medians, in brackets the lowest and highest round; ratios are medians over rounds of the quotient inside
the round: the time of float16 with a float32 state over a row's own. float16 is the same path with float weights. Both
run as graphs where nothing else is said, without sampling. Weights are random. TB/s: bytes of the weights that a step reads
(blocks and head), of the states, read and written, and of the logits, over the time. TOP/s: multiplications and additions of
the projections and the head over the time. The floor is the longer of two times: those bytes at the rate of the fastest copy
(bytes read and written), those operations at the rate of the fastest product of that type in the same run; of weights that a
cache holds (60 MB on an H200) it is no floor. Launches: a graph of as many empty kernels takes so long. Memory: weights,
states and what a step allocates beside them, not the other formats that are loaded at the same time. Prompts are read in
chunks of at most 2048 tokens, with float32 states, and give the logits of their last token.
"""


def probes(rows: list[Row]) -> list[str]:
    texts = []
    for row in rows:
        if row["kind"] == "probe":
            unit = "TB/s" if row["what"] == "bytes" else "TOP/s"
            text = "MISSING: " + row.get("problem", "") if row["rate"] is None else f"{row['rate'] / 1e12:.4g} {unit}"
            texts.append(f"probe, {row['by']}: {text}")
    return texts


def judged(bar: Bar, rows: list[Row]) -> list[str]:
    found = [row for row in rows if all(row.get(key) == value for key, value in bar.where.items())]
    number = next((row[bar.field] for row in found if row.get(bar.field) is not None), None)
    if number is None:
        return [bar.text, f">= {bar.limit:g}", "", "not measured"]
    return [bar.text, f">= {bar.limit:g}", f"{number:.3g}", "met" if number >= bar.limit else "MISSED"]


def paper(rows: list[Row]) -> list[str]:
    """The published workload beside what the paper reports."""
    head = ["", "prefill of 1024 / float16", "decode / float16"]
    lines = [head, ["the paper", *[f"{PAPERS[phase]:g}" for phase in ("prefill", "decode")]]]
    sizes = {"prefill": (1024, 1), "decode": (1, 1)}
    for name in ("W8A8", "W4A8", "W4A16"):
        cells = []
        for phase, (tokens, batch) in sizes.items():
            where = {"kind": "step", "model": PAPER, "format": name, "state": "float32", "phase": phase}
            where |= {"tokens": tokens, "batch": batch}
            found = [row for row in rows if all(row.get(key) == value for key, value in where.items())]
            cells.append(f"{found[0]['ratio']:.2f}" if found and found[0]["ratio"] else "not measured")
        lines.append([f"ours, {name}", *cells])
    return [
        "Mamba2-8B, one sequence of 1024 tokens, on the GPU named above (the paper's is another one):",
        "",
        *table(lines),
    ]


def label(row: Row) -> str:
    return row["format"] + (f", {row['state']} state" if row["state"] != "float32" else "")


def head(row: Row) -> str:
    return f"decode, batch {row['batch']}" if row["phase"] == "decode" else f"prefill {row['tokens']}"


def pivot(rows: list[Row], cell: Callable[[Row], str]) -> list[str]:
    """A line for each format, a column for each size."""
    order = sorted(rows, key=lambda row: (row["phase"], row["batch"], row["tokens"]))
    heads, names = list(dict.fromkeys(map(head, order))), list(dict.fromkeys(map(label, rows)))
    found = {(label(row), head(row)): cell(row) for row in rows}
    return table([["", *heads], *[[name, *[found.get((name, h), "") for h in heads]] for name in names]])


def speed(row: Row) -> str:
    text = f"{row['tokens_per_s']:.4g} ({row['spread'][0]:.4g} to {row['spread'][1]:.4g})"
    text += f"; {row['ratio']:.2f} x" if row["ratio"] else ""
    text += f"; {row['top_per_s']:.3g} TOP/s" if row["floor_by"] == "operations" else f"; {row['tb_per_s']:.3g} TB/s"
    text += f", {row['percent']:.0f} %" if row["percent"] else ""
    return text + ("" if row["how"] == "graph" else "; no graph")


def overhead(row: Row) -> str:
    text = "" if row["launches"] is None else f"{row['launches']} launches, "
    text += "" if row["launch_ms"] is None else f"{row['launch_ms']:.3g} of "
    return text + f"{row['ms']:.3g} ms; {row['memory'] / 1e9:.3g} GB"


def timing(row: Row) -> str:
    return f"{row['ms']:.4g} ({row['spread'][0]:.4g} to {row['spread'][1]:.4g})"


def percent(row: Row) -> str:
    return f"{row['percent']:.0f} % ({row['floor_by']})" if row["percent"] else ""


def products(rows: list[Row]) -> list[str]:
    lines = [["rows x outputs x inputs", "by", "ms", "TOP/s", "TB/s", "of the floor", "torch float16's time / its own"]]
    for row in rows:
        size = f"{row['rows']} x {row['outputs']} x {row['inputs']}"
        rates = [f"{row['top_per_s']:.4g}", f"{row['tb_per_s']:.3g}"]
        lines.append(
            [size, row["by"], timing(row), *rates, percent(row), f"{row['ratio']:.2f}" if row["ratio"] else ""]
        )
    return table(lines)


def scans(rows: list[Row]) -> list[str]:
    lines = [["", "by", "ms", "TB/s", "of the floor", "mamba-ssm's time / its own"]]
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        lines.append([row["case"], row["by"], timing(row), f"{row['tb_per_s']:.3g}", percent(row), ratio])
    return table(lines)


def missing(rows: list[Row]) -> list[str]:
    """What wasn't measured and why: rows of that kind, and single calls that failed."""
    texts = [f"{row['what']}: {row['why']}" for row in rows if row["kind"] == "missing"]
    for row in rows:
        if row["kind"] in ("product", "scan") and "problem" in row:
            what = row.get("case") or f"product {row['rows']} x {row['outputs']} x {row['inputs']}"
            texts.append(f"{what}, {row['by']}: {row['problem']}")
    return [f"* {text}" for text in texts] or ["Nothing."]


def table(cells: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
