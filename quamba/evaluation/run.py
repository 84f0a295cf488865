"""Everything that `quamba eval` measures, of one model or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from quamba.evaluation.divergence import Divergence, compare
from quamba.evaluation.harness import run_tasks
from quamba.evaluation.report import ModelResults
from quamba.evaluation.text import CONTEXT, Progress, score_text


def evaluate(
    models: dict[str, Any],
    tokenizer: Any,
    tasks: Sequence[str] = (),
    texts: dict[str, Tensor] | None = None,
    *,
    context: int = CONTEXT,
    limit: int | None = None,
    batch_size: int = 8,
    data: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[ModelResults], dict[str, Divergence]]:
    """Score texts (name -> token ids `[T]`) and lm-eval tasks with each model (label -> model).

    Returns the results a model, and, if there are two models, the divergence of the first from the second on each text.
    limit, batch_size and data are `run_tasks`'s. Raises QuambaError.
    """
    results = [ModelResults(name) for name in models]
    networks = list(models.values())
    divergences: dict[str, Divergence] = {}
    for text, ids in (texts or {}).items():
        if len(networks) == 2:
            found = compare(
                networks[0], networks[1], ids, context, progress=_titled(progress, f"perplexity and KL on {text}")
            )
            divergences[text] = found
            results[0].texts[text], results[1].texts[text] = found.score, found.reference_score
        else:
            results[0].texts[text] = score_text(networks[0], ids, context, progress=_titled(progress, text))
    for result, network in zip(results, networks, strict=True):
        if tasks:
            step = _titled(progress, f"{result.name}: {', '.join(tasks)}")
            result.tasks = run_tasks(
                network, tokenizer, tasks, limit=limit, batch_size=batch_size, data=data, progress=step
            )
    return results, divergences


def _titled(progress: Progress | None, title: str) -> Progress | None:
    return None if progress is None else lambda done, total, _: progress(done, total, title)
