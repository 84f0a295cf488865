"""What `quamba eval --output` has written, as a model card shows it: a Markdown table, and the hub's `model-index`."""

from __future__ import annotations

import math
from typing import Any

from quamba.errors import DataError

_DIVERGENCE = {
    "mean_kl": "KL to {}, mean, nats a token",
    "p999_kl": "KL to {}, 99.9th percentile",
    "top1_agreement": "same top token as {}",
}


def results_table(results: dict[str, Any]) -> str:
    """A Markdown table: a line a metric, the first model beside the second. Raises DataError for other JSON."""
    try:
        models = results["models"]
        names = [model["name"] for model in models]
        lines = _text_lines(models) + _divergence_lines(results, names) + _task_lines(models)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"these are no results of `quamba eval --output`: {type(error).__name__} {error}") from error
    head = ["", *names]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def model_index(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The first model's measurements in the form of the hub's metadata."""
    model = results["models"][0]
    found = [
        _entry(f"{task['task']} ({task['data']}, {task['samples']} rows)", task["task"], name, metric["value"])
        for task in model["tasks"]
        for name, metric in task["metrics"].items()
        if metric["value"] is not None
    ]
    found += [
        _entry(text, text, "perplexity", score["perplexity"])
        for text, score in model["texts"].items()
        if score["perplexity"] is not None
    ]
    return [{"name": model["name"], "results": found}] if found else []


def _entry(dataset: str, kind: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": dataset, "type": kind},
        "metrics": [{"type": metric, "value": value}],
    }


def _text_lines(models: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [f"{text}: perplexity", *(_number(m["texts"][text]["perplexity"]) for m in models)]
        for text in models[0]["texts"]
    ]


def _divergence_lines(results: dict[str, Any], names: list[str]) -> list[list[str]]:
    lines = []
    for text, values in (results.get("divergence") or {}).items():
        for key, said in _DIVERGENCE.items():
            if key in values:
                lines.append([f"{text}: {said.format(names[-1])}", _number(values[key]), *[""] * (len(names) - 1)])
    return lines


def _task_lines(models: list[dict[str, Any]]) -> list[list[str]]:
    lines = []
    for i, task in enumerate(models[0]["tasks"]):
        for metric in task["metrics"]:
            values = [model["tasks"][i]["metrics"][metric] for model in models]
            cells = [_number(value["value"], value["stderr"]) for value in values]
            lines.append([f"{task['task']} ({task['data']}, {task['samples']} rows): {metric}", *cells])
    return lines


def _number(value: float | None, error: float | None = None) -> str:
    """Four significant digits, the error to as many places."""
    if value is None:
        return ""
    places = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")
