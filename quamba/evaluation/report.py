"""Results of one model, or of two side by side: a table for people and a dict for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quamba.evaluation.divergence import Divergence
from quamba.evaluation.harness import TaskResult, mean_and_stderr
from quamba.evaluation.text import TextScore

if TYPE_CHECKING:
    from rich.table import Table


@dataclass
class ModelResults:
    """What was measured of one model: texts by name, and tasks in order."""

    name: str
    texts: dict[str, TextScore] = field(default_factory=dict)
    tasks: list[TaskResult] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One line: a metric, each model's (value, standard error), and the difference of the first from the last."""

    name: str
    values: list[tuple[float, float | None]]
    difference: str = ""


def rows(models: list[ModelResults], divergences: dict[str, Divergence] | None = None) -> list[Row]:
    """The lines of the table. With two models the second is the reference that the first is compared with."""
    found = []
    first, last = models[0], models[-1]
    for text in first.texts:
        scores = [model.texts[text] for model in models]
        change = scores[0].perplexity / scores[-1].perplexity - 1 if len(models) > 1 else None
        values = [(s.perplexity, s.perplexity_stderr) for s in scores]
        found.append(Row(f"{text}: perplexity", values, _percent(change)))
    for text, divergence in (divergences or {}).items():
        empty = (math.nan, None)
        kl, top = (divergence.mean_kl, divergence.mean_kl_stderr), (divergence.top1_agreement, None)
        found.append(Row(f"{text}: KL to {last.name}, mean, nats", [kl, empty]))
        found.append(Row(f"{text}: KL, 99.9th percentile", [(divergence.p999_kl, None), empty]))
        found.append(Row(f"{text}: top-1 agreement", [top, empty]))
    for i, task in enumerate(first.tasks):
        both = [model.tasks[i] for model in models]
        for metric in task.metrics:
            values = [(t.metrics[metric].value, t.metrics[metric].stderr) for t in both]
            difference = ""
            if len(both) > 1 and metric == "loglikelihood_per_word" and both[0].logliks:
                mean, error = paired_difference(both[0].logliks, both[-1].logliks)
                difference = f"{mean:+.4f} ± {error:.4f}"
            elif len(both) > 1:
                difference = f"{values[0][0] - values[-1][0]:+.4f}"
            found.append(Row(f"{task.task} ({task.data}, {task.samples}): {metric}", values, difference))
    return found


def paired_difference(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float]:
    """Mean of a - b over the same rows, and its standard error: much smaller than the errors of either mean."""
    return mean_and_stderr(x - y for x, y in zip(a, b, strict=True))


def _percent(change: float | None) -> str:
    return "" if change is None else f"{100 * change:+.2f} %"


def _number(value: float, stderr: float | None) -> str:
    if math.isnan(value):
        return ""
    digits = 4 if abs(value) < 100 else 2
    smallest = min((abs(x) for x in (value, stderr) if x), default=1.0)
    if smallest < 0.01:
        digits = min(7, 1 - math.floor(math.log10(smallest)))  # two digits of it
    return f"{value:.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def results_table(models: list[ModelResults], divergences: dict[str, Divergence] | None = None) -> Table:
    """A rich table: metric, each model's value ± standard error, difference."""
    from rich import box
    from rich.table import Table

    table = Table("", *[model.name for model in models], box=box.SIMPLE_HEAD)
    if len(models) > 1:
        table.add_column("difference")
    for row in rows(models, divergences):
        cells = [_number(*value) for value in row.values][: len(models)]
        table.add_row(row.name, *cells, *([row.difference] if len(models) > 1 else []))
    return table


def results_dict(models: list[ModelResults], divergences: dict[str, Divergence] | None = None) -> dict[str, Any]:
    """The same as plain data:

    {"models": [{"name", "texts": {name: {"perplexity", "perplexity_stderr", "nll", "nll_stderr", "tokens"}},
                 "tasks": [{"task", "data", "samples", "metrics": {name: {"value", "stderr"}}}]}],
     "divergence": {text: {"mean_kl", "mean_kl_stderr", "p999_kl", "top1_agreement", "tokens"}}}

    With two models the second is the reference. A value that isn't finite is null.
    """
    return {
        "models": [
            {
                "name": model.name,
                "texts": {
                    name: {
                        "perplexity": _finite(score.perplexity),
                        "perplexity_stderr": _finite(score.perplexity_stderr),
                        "nll": _finite(score.mean),
                        "nll_stderr": _finite(score.stderr),
                        "tokens": score.tokens,
                    }
                    for name, score in model.texts.items()
                },
                "tasks": [
                    {
                        "task": task.task,
                        "data": task.data,
                        "samples": task.samples,
                        "metrics": {
                            name: {"value": _finite(m.value), "stderr": _finite(m.stderr)}
                            for name, m in task.metrics.items()
                        },
                    }
                    for task in model.tasks
                ],
            }
            for model in models
        ],
        "divergence": {
            name: {key: getattr(d, key) for key in ("mean_kl", "mean_kl_stderr", "p999_kl", "top1_agreement", "tokens")}
            for name, d in (divergences or {}).items()
        },
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
