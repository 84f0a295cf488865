"""The standard error of a task's metric, and the difference between two models on the same rows.

A metric is a function of the rows' scores. To first order it is a mean: each row has a *contribution*, and the standard
error is that of the contributions' mean. For two models the contributions are subtracted row by row first, which is what
makes the error of a difference much smaller than that of either value.

| kind       | rows                           | metric                  | contribution of row i                 |
|------------|--------------------------------|-------------------------|---------------------------------------|
| mean       | x                              | mean x                  | x_i                                   |
| perplexity | log-likelihood l               | exp(-mean l)            | -metric * l_i                         |
| weighted   | log-likelihood l, words/bytes w| exp(-m), m = sum l/sum w| -metric * (l_i - m w_i) / mean w      |
| bits       | the same                       | -m / ln 2               | -(l_i - m w_i) / (mean w * ln 2)      |
| groups     | pseudo-values                  | anything else           | delete-a-group jackknife, 100 groups  |

Rows are taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from quamba.evaluation.significance import p_value

GROUPS = 100
"""Of the jackknife (Quenouille 1956): an aggregation such as BLEU takes too long to leave out every row."""


@dataclass(frozen=True)
class Metric:
    """A task's metric. stderr: None where there is none, of a single row. kind, rows: as in the table above; rows are in
    the data's order, and empty if not every row of the data has one."""

    value: float
    stderr: float | None
    kind: str = "mean"
    rows: tuple[Any, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Difference:
    """Of a metric between two models: value ± stderr, and the p value of `test` that it is chance."""

    value: float
    stderr: float | None
    p: float | None
    test: str


def mean_and_stderr(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and its standard error with the n - 1 correction (0 for one value)."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def contributions(value: float, kind: str, rows: Sequence[Any]) -> list[float]:
    """One number a row (see the table above), of a metric with this value."""
    if kind == "perplexity":
        return [-value * score for score in rows]
    if kind in ("weighted", "bits"):
        total = math.fsum(weight for _, weight in rows)
        mean = math.fsum(score for score, _ in rows) / total
        slope = (value if kind == "weighted" else 1 / math.log(2)) * len(rows) / total
        return [-slope * (score - mean * weight) for score, weight in rows]
    return [float(x) for x in rows]


def measured(value: float, kind: str, rows: Sequence[Any]) -> Metric:
    """A metric with its standard error."""
    error = mean_and_stderr(contributions(value, kind, rows))[1] if len(rows) > 1 else None
    return Metric(value, error, kind, tuple(rows))


def jackknife(aggregate: Callable[[list[Any]], float], rows: Sequence[Any]) -> list[float]:
    """Pseudo-values of an aggregation: its value over all rows and without each group, `GROUPS` groups or one a row."""
    groups = min(GROUPS, len(rows))
    whole = float(aggregate(list(rows)))
    without = (float(aggregate([x for i, x in enumerate(rows) if i % groups != g])) for g in range(groups))
    return [groups * whole - (groups - 1) * value for value in without]


def difference(a: Metric, b: Metric) -> Difference:
    """a - b. Without the rows of both, or of different kinds of data, neither error nor test."""
    change = a.value - b.value
    if a.kind != b.kind or len(a.rows) != len(b.rows) or len(a.rows) < 2:
        return Difference(change, None, None, "")
    pairs = zip(contributions(a.value, a.kind, a.rows), contributions(b.value, b.kind, b.rows), strict=True)
    error = mean_and_stderr(x - y for x, y in pairs)[1]
    weighted = a.kind in ("weighted", "bits")
    scores = [[row[0] if weighted else row for row in metric.rows] for metric in (a, b)]
    p, test = p_value(*scores)
    return Difference(change, error, p, f"{test}, of groups" if a.kind == "groups" else test)
