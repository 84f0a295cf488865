"""What `quamba eval --output` has written, as a model card shows it: a Markdown table, and the hub's `model-index`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quamba.errors import DataError

_DIVERGENCE = {
    ("mean_kl", "mean_kl_stderr"): "KL to {}, mean, nats a token",
    ("p999_kl", "p999_kl_stderr"): "KL to {}, 99.9th percentile",
    ("top1_agreement", "top1_stderr"): "same top token as {}",
}


def for_card(results: dict[str, Any], name: str) -> tuple[str, list[dict[str, Any]]]:
    """Table and index of the model called `name`, or evaluated in a folder of that name, beside the reference.

    Raises DataError for other JSON, and for the measurements of other models.
    """
    try:
        models, reference = {model["name"]: model for model in results["models"]}, results.get("reference")
        others = [model for model in models if model != reference]
        named = [model for model in others if model == name] or [m for m in others if Path(m).name == name]
        if len(named) != 1:
            raise DataError(f"these results are of {', '.join(others) or 'nothing'}, not of {name}: measure that")
        chosen = named[0]
        beside = [models[reference]] if reference is not None else []
        return _table(models[chosen], beside), _index(models[chosen])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"these are no results of `quamba eval --output`: {type(error).__name__} {error}") from error


def _table(model: dict[str, Any], beside: list[dict[str, Any]]) -> str:
    """A line a metric, the model's value before the reference's."""
    both = [model, *beside]
    lines = [["", *(m["name"] for m in both)], ["---"] * (1 + len(both))]
    for text in model["texts"]:
        scores = [m["texts"][text] for m in both]
        lines.append([f"{text}: perplexity", *(_number(s["perplexity"], s["perplexity_stderr"]) for s in scores)])
        for (key, error), said in _DIVERGENCE.items() if beside else ():
            value = _number(scores[0]["divergence"][key], scores[0]["divergence"][error])
            lines.append([f"{text}: {said.format(beside[0]['name'])}", value, ""])
    for i, task in enumerate(model["tasks"]):
        for metric in task["metrics"]:
            values = [m["tasks"][i]["metrics"][metric] for m in both]
            title = f"{task['task']} ({task['data']}, {task['samples']} rows): {metric}"
            lines.append([title, *(_number(value["value"], value["stderr"]) for value in values)])
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _index(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's measurements in the form of the hub's metadata."""
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


def _number(value: float | None, error: float | None = None) -> str:
    """Four significant digits, the error to as many places."""
    if value is None:
        return ""
    places = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}" + ("" if error is None else f" ± {error:.{places}f}")
