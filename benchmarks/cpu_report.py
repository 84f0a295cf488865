"""From samples to rows, and from rows to a page."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from cpu_formats import BARS, FORMATS, UNITS, Bar

if TYPE_CHECKING:
    from cpu import Bench


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
            costs = quotients(kept(base, phase), samples)
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
the share of a decoded token not spent inside the one call of the C++ library that replays it.
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
