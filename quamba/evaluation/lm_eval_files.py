"""Results in the files that lm-eval writes itself, by lm-eval's own writer, for the tools that read those."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError
from quamba.evaluation.report import ModelResults


def save_for_lm_eval(results: ModelResults, model: str, folder: Path) -> Path:
    """Write `<folder>/<model>/results_<date>.json` and `samples_<task>_<date>.jsonl`; returns the first.

    model: what was evaluated, as the user named it. Standard errors are ours: the ones lm-eval would give for means, and
    others where it gives none or draws them at random. Raises QuambaError if lm-eval could not write.
    """
    from lm_eval.loggers import EvaluationTracker

    from quamba import __version__

    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.log_experiment_args("quamba", {"pretrained": model}, None, None, False)
    found = dict(results.lm_eval)
    samples = found.pop("samples")
    found["results"] = {task.task: _with_errors(found["results"][task.task], task.metrics) for task in results.tasks}
    found["config"] = found["config"] | {"model": "quamba", "model_args": {"pretrained": model}}
    found["lm_eval_version"], found["transformers_version"] = version("lm_eval"), version("transformers")
    found["quamba_version"] = __version__
    with _told() as trouble:
        tracker.save_results_aggregated(found, samples)
        for task, rows in samples.items():
            tracker.save_results_samples(task, rows)
    place = folder / str(tracker.general_config_tracker.model_name_sanitized)
    if trouble:
        raise QuambaError(f"can't write lm-eval's files into {place}: {trouble[-1]}")
    return place / f"results_{tracker.date_id}.json"


def _with_errors(values: dict[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's entry of a task, its missing standard errors filled in."""
    known = {(name if "," in name else f"{name},none"): metric.stderr for name, metric in metrics.items()}
    errors = {}
    for key in values:
        name, _, rule = key.partition(",")
        if known.get(key) is not None:
            errors[f"{name}_stderr,{rule}"] = known[key]
    return values | errors


@contextlib.contextmanager
def _told() -> Iterator[list[str]]:
    """What goes wrong in lm-eval's writer: it only logs that, in two lines."""
    import logging

    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("Could not save") or (said and len(said) == 1):
                said.append(text)

    logger, listener = logging.getLogger("lm_eval.loggers.evaluation_tracker"), Listener()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield said
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate
