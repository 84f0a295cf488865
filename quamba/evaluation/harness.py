"""lm-eval's tasks, run by lm-eval's own code on a model object, also without a network."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quamba.errors import DataError
from quamba.evaluation.catalogue import Catalogue, catalogue
from quamba.evaluation.kept import Answers
from quamba.evaluation.local_data import BUNDLED, WHOLE, data_folder, write_task_file
from quamba.evaluation.processes import ALONE, Processes
from quamba.evaluation.text import Progress
from quamba.evaluation.uncertainty import Metric, jackknife, mean_and_stderr, measured
from quamba.schema import nearest

MAX_LENGTH = 2048  # the field's convention for these models; a tokenizer's own limit may be anything


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


def run_tasks(model: Any, tokenizer: Any, tasks: Iterable[str], **options: Any) -> list[TaskResult]:
    """Evaluate `tasks`; options and errors are those of `run_harness`."""
    return run_harness(model, tokenizer, tasks, **options)[0]


def run_harness(
    model: Any,
    tokenizer: Any,
    tasks: Iterable[str],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
    data: str | Path | None = None,
    include: Path | None = None,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> tuple[list[TaskResult], dict[str, Any]]:
    """Evaluate `tasks` through lm-eval's `HFLM` and `simple_evaluate`, zero-shot unless a task says otherwise.

    data: None lets lm-eval fetch the data sets; a folder holds `<task>.jsonl` with the columns the task reads;
    "bundled" is the sample shipped with quamba. include: a folder of task files of one's own. limit: only the first so many
    rows. max_length: tokens a request may have; longer ones lose their beginning, and rolling ones are cut into windows.
    answers: what is known already, and where to keep the rest. Raises DataError: unknown task, missing file or column, no
    network.

    Returns the results, and what `simple_evaluate` returned; both empty in all but the first of several processes. For
    lambada tasks `loglikelihood_per_word` is added, the mean log-likelihood of the target word in nats.
    """
    tasks = list(tasks)
    known = catalogue(include)
    check_tasks(tasks, known)
    label = "lm-eval's data set"
    with tempfile.TemporaryDirectory(prefix="quamba-eval-") as scratch:
        here, folder = Path(scratch), None
        if data is not None:
            folder, label = data_folder(data)
        for task in tasks:
            write_task_file(task, known, folder, here)
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        from quamba.evaluation.lm import language_model
        from quamba.evaluation.quiet import datasets_cache, offline_if_unreachable, quiet

        class Manager(TaskManager):
            def load(self, *args: Any, **kwargs: Any) -> Any:
                self.loaded = super().load(*args, **kwargs)
                return self.loaded

        with (
            quiet(),
            offline_if_unreachable(data is None),
            _data_errors(tasks, offline=data is None),
            datasets_cache(here / "cache") if data is not None else nullcontext(),
        ):
            # Only our files: an index of lm-eval's own, fourteen thousand, takes twenty seconds.
            manager = Manager(include_path=scratch, include_defaults=False)
            found = simple_evaluate(
                model=language_model(model, tokenizer, batch_size, max_length, progress, answers, processes),
                tasks=tasks,
                limit=limit,
                task_manager=manager,
                bootstrap_iters=0,
                log_samples=True,
            )
    if found is None:  # another process reports
        return [], {}
    results = []
    for task in tasks:
        aggregations = manager.loaded["tasks"][task].aggregation()
        results.append(_result(task, _label(task, label), found, aggregations))
    return results, found


def check_tasks(tasks: Iterable[str], known: Catalogue) -> None:
    """Raises DataError for a name that is no task."""
    for task in tasks:
        if task in known.collections and task not in known.tasks:
            raise DataError(f"{task} is a group; name its tasks one by one")
        if task not in known.tasks:
            hint = nearest(task, known.names)
            hint = hint if "did you mean" in hint else ": `quamba lm-eval ls tasks` lists them"
            raise DataError(f"lm-eval has no task {task!r}{hint}")


def _label(task: str, label: str) -> str:
    if label != BUNDLED or task not in WHOLE:
        return label
    return f"{label} of {WHOLE[task]:,} rows"


def _result(task: str, label: str, found: dict[str, Any], aggregations: dict[str, Callable]) -> TaskResult:
    """lm-eval's values, with standard errors from its per-row values."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    metrics: dict[str, Metric] = {}
    logliks: tuple[float, ...] = ()
    for key, value in found["results"][task].items():
        name, _, rule = key.partition(",")
        if not rule or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        rows = [s for s in samples if s["filter"] == rule]
        scores = [row[name] for row in rows if name in row]
        metric = _metric(float(value), scores, aggregations.get(name))
        if len(scores) < len(rows):  # rows of two models could not be matched
            metric = Metric(metric.value, metric.stderr, metric.kind)
        metrics[name if rule == "none" else key] = metric
        if name == "perplexity" and metric.kind == "perplexity":
            logliks = tuple(map(float, scores))
    if logliks:
        metrics["loglikelihood_per_word"] = measured(mean_and_stderr(logliks)[0], "mean", logliks)
    choices: tuple[tuple[float, ...], ...] = ()
    if found["configs"][task]["output_type"] == "multiple_choice":
        choices = tuple(tuple(float(answer[0]) for answer in sample["filtered_resps"]) for sample in samples)
    return TaskResult(task, label, found["n-samples"][task]["effective"], metrics, logliks, choices)


def _metric(value: float, scores: list[Any], aggregate: Callable | None) -> Metric:
    """A metric of these rows' scores under lm-eval's aggregation."""
    from lm_eval.api import metrics as lm

    kinds = {lm.mean: "mean", lm.perplexity: "perplexity", lm.weighted_perplexity: "weighted", lm.bits_per_byte: "bits"}
    kind = kinds.get(aggregate) if aggregate is not None else "mean"
    if kind is not None:
        return measured(value, kind, [_plain(score) for score in scores])
    assert aggregate is not None
    try:
        return measured(value, "groups", jackknife(aggregate, scores)) if len(scores) > 1 else Metric(value, None)
    except Exception:  # a task's own aggregation need not bear fewer rows than all
        return Metric(value, None)


def _plain(score: Any) -> Any:
    return tuple(map(float, score)) if isinstance(score, tuple | list) else float(score)


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
