"""Results of one model, or of several side by side: a table for people and a dict for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quamba.evaluation.divergence import Divergence
from quamba.evaluation.harness import TaskResult
from quamba.evaluation.text import TextScore
from quamba.evaluation.uncertainty import Difference, difference

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ModelResults:
    """What was measured of one model: texts by name, tasks in order, and its divergence from the reference on each text.
    `lm_eval`: what lm-eval's `simple_evaluate` returned."""

    name: str
    texts: dict[str, TextScore] = field(default_factory=dict)
    tasks: list[TaskResult] = field(default_factory=list)
    divergences: dict[str, Divergence] = field(default_factory=dict)
    lm_eval: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Row:
    """One line: a metric of one model, and how it differs from the reference's; `relative`: as a share of that."""

    metric: str
    model: str
    value: float
    stderr: float | None
    difference: Difference | None = None
    relative: bool = False


def rows(models: list[ModelResults], reference: str | None = None) -> list[Row]:
    """The lines of the table, metric after metric. The reference is one of the models."""
    other = next((model for model in models if model.name == reference), None)
    found = []
    for text in models[0].texts:
        for model in models:
            score, divergence = model.texts[text], model.divergences.get(text)
            change = None if divergence is None else divergence.change
            error = score.perplexity_stderr
            found.append(Row(f"{text}: perplexity", model.name, score.perplexity, error, change, True))
        compared = [model for model in models if text in model.divergences]
        for title, key, key_stderr in (
            (f"KL to {reference}, mean, nats", "mean_kl", "mean_kl_stderr"),
            ("KL, 99.9th percentile", "p999_kl", "p999_kl_stderr"),
            ("top-1 agreement", "top1_agreement", "top1_stderr"),
        ):
            for model in compared:
                d = model.divergences[text]
                found.append(Row(f"{text}: {title}", model.name, getattr(d, key), getattr(d, key_stderr)))
    for i, task in enumerate(models[0].tasks):
        for name in task.metrics:
            for model in models:
                metric = model.tasks[i].metrics[name]
                change = None if other is None or model is other else difference(metric, other.tasks[i].metrics[name])
                title = f"{task.task} ({task.data}, {task.samples}): {name}"
                found.append(Row(title, model.name, metric.value, metric.stderr, change))
    return found


def number(value: float, stderr: float | None, sign: str = "") -> str:
    """value ± stderr, both with as many digits as the smaller one needs for two."""
    digits = 4 if abs(value) < 100 else 2
    smallest = min((abs(x) for x in (value, stderr) if x), default=1.0)
    if smallest < 0.01:
        digits = min(7, 1 - math.floor(math.log10(smallest)))
    return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def _change(row: Row) -> str:
    change = row.difference
    if change is None:
        return ""
    if not row.relative:
        return number(change.value, change.stderr, "+")
    return f"{100 * change.value:+.2f}" + ("" if change.stderr is None else f" ± {100 * change.stderr:.2f}") + " %"


def _p(row: Row) -> str:
    p = row.difference.p if row.difference is not None else None
    if p is None:
        return ""
    return f"{p:.2g}" if p >= 0.0001 else "< 0.0001"


def results_table(models: list[ModelResults], reference: str | None = None) -> Table:
    """A rich table: metric, model, value ± standard error, and with a reference the paired difference and its p value."""
    from rich import box
    from rich.table import Table

    if len(models) == 1:
        table = Table("", models[0].name, box=box.SIMPLE_HEAD)
        for row in rows(models):
            table.add_row(row.metric, number(row.value, row.stderr))
        return table
    table = Table("", "model", "value", box=box.SIMPLE_HEAD)
    if reference is not None:
        table.add_column("difference")
        table.add_column("p")
        table.caption = f"difference: to {reference}, row by row; p: that it is chance"
        table.caption_justify = "left"
    before = None
    for row in rows(models, reference):
        cells = [row.metric if row.metric != before else "", row.model, number(row.value, row.stderr)]
        table.add_row(*cells, *([_change(row), _p(row)] if reference is not None else []))
        before = row.metric
    return table


def results_dict(models: list[ModelResults], reference: str | None = None) -> dict[str, Any]:
    """The same as plain data; docs/evaluation.md describes it. A value that isn't finite is null."""
    other = next((model for model in models if model.name == reference), None)
    first = {name: _divergence(found) for name, found in models[0].divergences.items()}
    return {"reference": reference, "models": [_model(model, other) for model in models], "divergence": first}


def _model(model: ModelResults, other: ModelResults | None) -> dict[str, Any]:
    compared = other if other is not model else None
    texts: dict[str, dict[str, Any]] = {}
    tasks = []
    for name, score in model.texts.items():
        texts[name] = {
            "perplexity": _finite(score.perplexity),
            "perplexity_stderr": _finite(score.perplexity_stderr),
            "nll": _finite(score.mean),
            "nll_stderr": _finite(score.stderr),
            "tokens": score.tokens,
        }
        if name in model.divergences:
            texts[name] |= {"divergence": _divergence(model.divergences[name])}
    for i, task in enumerate(model.tasks):
        metrics: dict[str, Any] = {}
        for name, metric in task.metrics.items():
            metrics[name] = {"value": _finite(metric.value), "stderr": _finite(metric.stderr)}
            if compared is not None:
                metrics[name]["difference"] = _difference(difference(metric, compared.tasks[i].metrics[name]))
        tasks.append({"task": task.task, "data": task.data, "samples": task.samples, "metrics": metrics})
    return {"name": model.name, "texts": texts, "tasks": tasks}


def _divergence(found: Divergence) -> dict[str, Any]:
    names = ("mean_kl", "mean_kl_stderr", "p999_kl", "p999_kl_stderr", "top1_agreement", "top1_stderr", "tokens")
    return {name: getattr(found, name) for name in names} | {"perplexity_change": _difference(found.change)}


def _difference(found: Difference) -> dict[str, Any]:
    return {"value": _finite(found.value), "stderr": _finite(found.stderr), "p": found.p, "test": found.test or None}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
