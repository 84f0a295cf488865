"""lm-eval's tasks, run by lm-eval's own code on a model object, also without a network."""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.errors import DataError
from quamba.schema import nearest

MAX_LENGTH = 2048  # the field's convention for these models; a tokenizer's own limit may be anything


@dataclass(frozen=True)
class Metric:
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task: its metrics, over `samples` rows of `data`. `logliks`: log-likelihood of the target per row, if it is
    a log-likelihood task with one target a row (lambada), in row order."""

    task: str
    data: str
    samples: int
    metrics: dict[str, Metric]
    logliks: tuple[float, ...] = field(default=(), repr=False)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    data: str | Path | None = None,
) -> list[TaskResult]:
    """Evaluate `tasks` through lm-eval's `HFLM` and `simple_evaluate`, zero-shot unless a task says otherwise.

    data: None lets lm-eval fetch the data sets; a folder holds `<task>.jsonl` with the columns the task reads;
    "bundled" is the sample shipped with quamba. limit: only the first so many rows. Raises DataError: unknown task,
    missing file or column, no network.

    For lambada tasks `loglikelihood_per_word` is added, the mean log-likelihood of the target word in nats.
    """
    tasks = list(tasks)
    with _quiet(), tempfile.TemporaryDirectory(prefix="quamba-eval-") as scratch:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        known = TaskManager()
        for task in tasks:
            if task not in known.all_tasks:
                raise DataError(f"lm-eval has no task {task!r}{_nearest_task(task, known.all_tasks)}")
        manager, label = known, "lm-eval's data set"
        if data is not None:
            folder, label = _folder(data)
            for task in tasks:
                _override(known, task, folder, Path(scratch))
            manager = TaskManager(include_path=scratch)
        language_model = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=MAX_LENGTH
        )
        with _data_errors(tasks, offline=data is None), _datasets_cache(Path(scratch) / "cache", data is not None):
            found = simple_evaluate(
                model=language_model,
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
    assert found is not None
    return [_result(task, label, found) for task in tasks]


def _result(task: str, label: str, found: dict[str, Any]) -> TaskResult:
    if task not in found["results"]:
        raise DataError(f"{task} is a group; name its tasks one by one")
    values, samples = found["results"][task], found["samples"].get(task, [])
    metrics: dict[str, Metric] = {}
    for key, value in values.items():
        name, _, rest = key.partition(",")
        if not rest or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{name}_stderr,{rest}")
        metrics[name] = Metric(float(value), float(error) if isinstance(error, int | float) else None)
    logliks: tuple[float, ...] = ()
    if "perplexity" in metrics and samples and "perplexity" in samples[0]:
        logliks = tuple(float(s["perplexity"]) for s in sorted(samples, key=lambda s: s["doc_id"]))
        mean, error = mean_and_stderr(logliks)
        metrics["loglikelihood_per_word"] = Metric(mean, error)
        ppl = metrics["perplexity"].value
        metrics["perplexity"] = Metric(ppl, ppl * error)  # to first order
    return TaskResult(task, label, len(samples), metrics, logliks)


def mean_and_stderr(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and its standard error with the n - 1 correction (0 for one value)."""
    values = list(values)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _nearest_task(task: str, names: list[str]) -> str:
    hint = nearest(task, names)
    return hint if "did you mean" in hint else ": `lm-eval ls tasks` lists them"


def _folder(data: str | Path) -> tuple[Path, str]:
    from quamba import bundled

    if str(data) == "bundled":
        return bundled.evaluation_dir(), "bundled sample"
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data {data} is no folder; it should hold <task>.jsonl (or say --data bundled)")
    return folder, folder.resolve().name


def _override(known: Any, task: str, folder: Path, scratch: Path) -> None:
    """Write a task file that includes lm-eval's own and reads `<task>.jsonl` instead of the hub."""
    file = (folder / f"{task}.jsonl").resolve()
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{folder} has no {task}.jsonl; it has {have}")
    try:
        with file.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a JSON object a line: {error}") from error
    if not isinstance(first, dict):
        raise DataError(f"{file} is not a JSON object a line")
    original = known.task_index[task].yaml_path
    if original is None:
        raise DataError(f"{task} is not a plain task: --data can't serve it")
    lines = {
        "include": str(original),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
    }
    # JSON is YAML.
    (scratch / f"{task}.yaml").write_text(json.dumps(lines), encoding="utf-8")


@contextmanager
def _datasets_cache(folder: Path, local: bool) -> Iterator[None]:
    """A local file's rows are cached in `folder`, not in the user's home."""
    if not local:
        yield
        return
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = before
        datasets.enable_progress_bars()


@contextmanager
def _data_errors(tasks: list[str], offline: bool) -> Iterator[None]:
    """What lm-eval and datasets raise for missing data, in one sentence."""
    import jinja2
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    names = ", ".join(tasks)
    try:
        yield
    except (ConnectionError, LocalEntryNotFoundError, HfHubHTTPError, DatasetNotFoundError, FileNotFoundError) as error:
        if not offline:
            raise DataError(f"the data of {names} can't be read: {error}") from error
        raise DataError(
            f"the data of {names} is not on this machine and could not be fetched from the hub: give a folder "
            "with <task>.jsonl (--data DIR), or use the bundled sample (--data bundled)"
        ) from error
    except (KeyError, DatasetGenerationError, jinja2.UndefinedError) as error:
        raise DataError(f"the rows given for {names} lack what the task reads: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval announces seeds and model arguments at warning level; keep errors only."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
