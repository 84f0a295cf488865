"""lm-eval's tasks, run by lm-eval's own code on a model object, also without a network."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.errors import DataError
from quamba.evaluation.catalogue import catalogue, task_config, template_columns
from quamba.evaluation.text import Progress
from quamba.schema import nearest

BUNDLED = "bundled sample"
_WHOLE = {"lambada_openai": 5153}  # rows of the data sets that a bundled sample is taken from

MAX_LENGTH = 2048  # the field's convention for these models; a tokenizer's own limit may be anything


@dataclass(frozen=True)
class Metric:
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """One task: its metrics, over `samples` rows of `data`. `logliks`: log-likelihood of the target per row, if it is
    a log-likelihood task with one target a row (lambada), in row order. `choices`: log-likelihood of each choice per row,
    if it is a multiple-choice task."""

    task: str
    data: str
    samples: int
    metrics: dict[str, Metric]
    logliks: tuple[float, ...] = field(default=(), repr=False)
    choices: tuple[tuple[float, ...], ...] = field(default=(), repr=False)


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    data: str | Path | None = None,
    progress: Progress | None = None,
) -> list[TaskResult]:
    """Evaluate `tasks` through lm-eval's `HFLM` and `simple_evaluate`, zero-shot unless a task says otherwise.

    data: None lets lm-eval fetch the data sets; a folder holds `<task>.jsonl` with the columns the task reads;
    "bundled" is the sample shipped with quamba. limit: only the first so many rows. Raises DataError: unknown task,
    missing file or column, no network.

    For lambada tasks `loglikelihood_per_word` is added, the mean log-likelihood of the target word in nats.
    """
    tasks = list(tasks)
    for task in tasks:
        if task not in catalogue().names:
            raise DataError(f"lm-eval has no task {task!r}{_nearest_task(task, catalogue().names)}")
        if task not in catalogue().tasks:
            raise DataError(f"{task} is a group; name its tasks one by one")
    label = "lm-eval's data set"
    with tempfile.TemporaryDirectory(prefix="quamba-eval-") as scratch:
        here = Path(scratch)
        if data is not None:
            folder, label = _folder(data)
        for task in tasks:
            _task_file(task, None if data is None else folder, here)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from quamba.evaluation.lm import language_model, offline_if_unreachable, quiet

        # Only our files: an index of lm-eval's own, fourteen thousand, takes twenty seconds.
        with (
            quiet(),
            offline_if_unreachable(data is None),
            _data_errors(tasks, offline=data is None),
            _datasets_cache(here / "cache", data is not None),
        ):
            found = simple_evaluate(
                model=language_model(model, tokenizer, batch_size, MAX_LENGTH, progress),
                tasks=tasks,
                limit=limit,
                task_manager=TaskManager(include_path=scratch, include_defaults=False),
                bootstrap_iters=0,
                log_samples=True,
            )
    assert found is not None
    return [_result(task, _label(task, label, found), found) for task in tasks]


def _label(task: str, label: str, found: dict[str, Any]) -> str:
    if label != BUNDLED or task not in _WHOLE:
        return label
    return f"{label}, {found['n-samples'][task]['original']} of {_WHOLE[task]:,} rows"


def _result(task: str, label: str, found: dict[str, Any]) -> TaskResult:
    """lm-eval's values with standard errors from its per-row values: for a mean, the same formula as lm-eval's."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics: dict[str, Metric] = {}
    logliks: tuple[float, ...] = ()
    for key, value in found["results"][task].items():
        name, _, rule = key.partition(",")
        if not rule or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        rows = [s[name] for s in samples if s["filter"] == rule and isinstance(s.get(name), int | float)]
        error = None
        if len(rows) > 1:
            mean, spread = mean_and_stderr(rows)
            if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
                error = spread
            elif name == "perplexity":  # of a task with one target a row: exp(-mean), so to first order
                error = value * spread
        metrics[name if rule == "none" else key] = Metric(float(value), error)
        if name == "perplexity" and rows:
            logliks = tuple(map(float, rows))
    if logliks:
        metrics["loglikelihood_per_word"] = Metric(*mean_and_stderr(logliks))
    choices: tuple[tuple[float, ...], ...] = ()
    if found["configs"][task]["output_type"] == "multiple_choice":
        choices = tuple(tuple(float(answer[0]) for answer in sample["filtered_resps"]) for sample in samples)
    return TaskResult(task, label, found["n-samples"][task]["effective"], metrics, logliks, choices)


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
        return bundled.evaluation_dir(), BUNDLED
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise DataError(f"--data {data} is no folder; it should hold <task>.jsonl (or say --data bundled)")
    return folder, folder.resolve().name


def _task_file(task: str, folder: Path | None, scratch: Path) -> None:
    """Write a task file that includes lm-eval's own, and reads `<task>.jsonl` instead of the hub if there is a folder.

    The rows go to the split that the task evaluates. Few-shot examples come from `<task>.<split>.jsonl`.
    """
    path = catalogue().tasks[task]
    lines: dict[str, Any] = {"include": str(path), "task": task}
    if folder is not None:
        config = task_config(path)
        if "class" in config:
            raise DataError(f"{task} fetches its data itself: --data can't serve it")
        split = config.get("test_split") or config.get("validation_split") or "test"
        files = {split: _checked(folder, f"{task}.jsonl", config)}
        lines |= {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
        lines |= {"test_split": split, "fewshot_split": None}
        fewshot = dict(config.get("fewshot_config") or {})
        source = fewshot.pop("split", None) or config.get("fewshot_split") or config.get("training_split")
        lines["fewshot_config"] = None
        if (config.get("num_fewshot") or 0) > 0 and "samples" in fewshot:
            del lines["fewshot_config"]
        elif (config.get("num_fewshot") or 0) > 0 and source:
            lines["fewshot_split"] = source
            if source != split:
                files[source] = _checked(folder, f"{task}.{source}.jsonl", config)
        cache = str(scratch / "cache")
        lines["dataset_kwargs"] = {"data_files": {k: str(v) for k, v in files.items()}, "cache_dir": cache}
    # JSON is YAML.
    (scratch / f"{task}.yaml").write_text(json.dumps(lines), encoding="utf-8")


def _checked(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """The file, with a JSON object a line that has the columns the task's templates name; else DataError."""
    file = (folder / name).resolve()
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in folder.glob("*.jsonl"))) or "no .jsonl file"
        raise DataError(f"{folder} has no {name}; it has {have}")
    columns = template_columns(config)
    rows = 0
    try:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                row, rows = json.loads(line), rows + 1
                if not isinstance(row, dict):
                    raise DataError(f"{file}, line {number}, is not a JSON object")
                if missing := sorted(columns - row.keys()):
                    raise DataError(f"{file}, line {number}, lacks {', '.join(missing)} (it has {', '.join(row)})")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not a JSON object a line: {error}") from error
    if not rows:
        raise DataError(f"{file} is empty")
    return file


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
