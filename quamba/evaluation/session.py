"""An evaluation of models by name: finds them and their tokenizers, and goes on where a killed run stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import quamba_kernels
from quamba.evaluation.kept import Answers, run_folder
from quamba.evaluation.processes import ALONE, Processes
from quamba.evaluation.report import ModelResults
from quamba.evaluation.run import Loaders, evaluate
from quamba.formats import load_tokenizer, locate
from quamba.formats.location import TOKENIZER_FILES
from quamba.model import QuambaLMHeadModel


def measure(
    models: Mapping[str, str],
    tokenizer: str | None = None,
    *,
    loading: Mapping[str, Any],
    resume: bool = True,
    note: Callable[[str], None] = lambda text: None,
    processes: Processes = ALONE,
    **settings: Any,
) -> list[ModelResults]:
    """`evaluate` of models by name (label -> MODEL), with what it takes as `settings`.

    tokenizer: for all, instead of each model's own; a model without one takes the first one there is. loading:
    `from_pretrained`'s dtype, device, strict and verify. resume: keep answers until all is done, and start with those that
    an interrupted run of the same models has left (`note` says how many). Raises QuambaError.
    """
    words = tokenizers(models, tokenizer)
    answers = Answers()
    if resume:
        places = {label: locate(model).path for label, model in models.items()}
        if tokenizer is not None:
            places["--tokenizer"] = locate(tokenizer, allow=TOKENIZER_FILES).path
        facts = {"dtype": str(loading.get("dtype")), "device": str(loading.get("device") or "cpu").partition(":")[0]}
        facts |= {"backend": quamba_kernels.backend_name(), "max_length": str(settings.get("max_length"))}
        answers = _open(run_folder(places, facts), processes)
        if answers.left and processes.first:
            note(f"going on with {answers.left} answers of an interrupted run (--no-resume starts over)")
    load = partial(QuambaLMHeadModel.from_pretrained, **loading)
    try:
        found = evaluate(
            Loaders({label: partial(load, model) for label, model in models.items()}),
            words,
            answers=answers,
            processes=processes,
            **settings,
        )
    finally:
        answers.close()
    if processes.first:
        answers.discard()
    return found


def _open(folder: Path, processes: Processes) -> Answers:
    """All have read before anyone writes. Where nothing can be written nothing is kept."""
    try:
        return Answers(folder, processes.rank)
    except OSError:
        return Answers()
    finally:
        processes.wait()


def tokenizers(models: Mapping[str, str], tokenizer: str | None) -> dict[str, Any]:
    """Label -> tokenizer. Raises DataError if there is none at all."""
    first = next(iter(models.values()))
    if tokenizer is not None:
        return dict.fromkeys(models, load_tokenizer(first, tokenizer))
    found = {label: load_tokenizer(model, required=False) for label, model in models.items()}
    some = next((words for words in found.values() if words is not None), None)
    if some is None:
        some = load_tokenizer(first)
    return {label: some if words is None else words for label, words in found.items()}
