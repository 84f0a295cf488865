"""Everything that `quamba eval` measures, of one model or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quamba.errors import DataError
from quamba.evaluation.catalogue import Catalogue, catalogue
from quamba.evaluation.divergence import compare
from quamba.evaluation.harness import MAX_LENGTH, check_tasks, run_harness
from quamba.evaluation.kept import Answers
from quamba.evaluation.processes import ALONE, Processes
from quamba.evaluation.report import ModelResults
from quamba.evaluation.text import CONTEXT, Progress, encode_text, score_text


class Loaders(Mapping[str, Any]):
    """Label -> model, loaded whenever it is asked for and not held."""

    def __init__(self, loaders: Mapping[str, Callable[[], Any]]):
        self.loaders = dict(loaders)

    def __getitem__(self, label: str) -> Any:
        return self.loaders[label]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)


def evaluate(
    models: Mapping[str, Any],
    tokenizer: Any,
    tasks: Sequence[str] = (),
    texts: Mapping[str, Tensor | str | Path] | None = None,
    *,
    reference: str | None = None,
    context: int = CONTEXT,
    limit: int | None = None,
    batch_size: int = 8,
    max_length: int = MAX_LENGTH,
    data: str | Path | None = None,
    include: Path | None = None,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> list[ModelResults]:
    """Score texts and lm-eval tasks with each model (label -> model; with `Loaders` one after another in memory).

    tokenizer: one for all, or a mapping of one for each. texts: name -> token ids `[T]`, or what `encode_text` reads.
    reference: the label of the model that the others are compared with; on texts their divergence from it is measured.
    limit, batch_size, max_length, data, include, answers and processes are `run_harness`'s.

    Returns the results in the models' order, the reference last. Raises QuambaError; DataError if a model and the reference
    don't make the same tokens of a text.
    """
    if reference is not None and reference not in models:
        raise ValueError(f"the reference {reference!r} is none of {', '.join(models)}")
    check_tasks(tasks, catalogue(include) if tasks else Catalogue({}, frozenset()))
    answers = Answers() if answers is None else answers
    texts = dict(texts or {})
    words = tokenizer if isinstance(tokenizer, Mapping) else dict.fromkeys(models, tokenizer)
    labels = [label for label in models if label != reference] + [label for label in models if label == reference]
    ids = {label: {name: _ids(words[label], source) for name, source in texts.items()} for label in labels}
    if reference is not None:
        _same_tokens(ids, reference)
    results = {label: ModelResults(label) for label in labels}
    other = models[reference] if reference and texts else None
    for label in labels:
        network = None  # the last one goes before the next is loaded
        network = other if label == reference and other is not None else models[label]
        found = results[label]
        for name in texts:
            if found.texts.get(name) is not None:
                continue
            common: dict[str, Any] = {"answers": answers.of(f"{label}/{reference}/"), "processes": processes}
            step = _titled(progress, f"{label}: perplexity of {name}")
            if other is None or reference in (None, label):
                found.texts[name] = score_text(network, ids[label][name], context, progress=step, **common)
                continue
            step = _titled(progress, f"{label}: perplexity of {name}, and KL to {reference}")
            divergence = compare(network, other, ids[label][name], context, progress=step, **common)
            found.divergences[name], found.texts[name] = divergence, divergence.score
            assert reference is not None
            results[reference].texts[name] = divergence.reference_score
        if tasks:
            found.tasks, found.lm_eval = run_harness(
                network,
                words[label],
                tasks,
                limit=limit,
                batch_size=batch_size,
                max_length=max_length,
                data=data,
                include=include,
                progress=_titled(progress, f"{label}: {', '.join(tasks)}"),
                answers=answers.of(f"{label}/"),
                processes=processes,
            )
    processes.wait()
    return list(results.values())


def _ids(tokenizer: Any, source: Tensor | str | Path) -> Tensor:
    return source if isinstance(source, Tensor) else encode_text(tokenizer, source)


def _same_tokens(ids: Mapping[str, Mapping[str, Tensor]], reference: str) -> None:
    for label, texts in ids.items():
        for name, found in texts.items():
            if not found.equal(ids[reference][name]):
                raise DataError(f"{label} and {reference} have different tokenizers: on {name} they can't be compared")


def _titled(progress: Progress | None, title: str) -> Progress | None:
    return None if progress is None else lambda done, total, _: progress(done, total, title)
