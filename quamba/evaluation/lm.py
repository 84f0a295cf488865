"""lm-eval's own `HFLM`, with our progress, float32 scores and checks, and answers that outlive a killed run.

Slow to import: only where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import hash_args
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from quamba.evaluation.kept import Answers
from quamba.evaluation.processes import ALONE, Processes
from quamba.evaluation.quiet import replaced
from quamba.evaluation.text import Progress, check_ids, finite


class _Hook:
    """In the place of lm-eval's response cache, which is told of every answer."""

    def __init__(self, answers: Answers, progress: Progress | None):
        self.answers, self.progress = answers, progress
        self.done = self.total = 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        if not _sampled(request):
            self.answers.put(hash_args(kind, request), answer)
        self.advance(1)

    def advance(self, count: int) -> None:
        self.done += count
        if self.progress is not None and count:
            self.progress(self.done, max(self.total, self.done), "requests")


class _Model(HFLM):
    cache_hook: Any

    def loglikelihood(self, requests, disable_tqdm=True):
        return self._answer("loglikelihood", requests, super().loglikelihood)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return self._answer("loglikelihood_rolling", requests, self._roll)

    def generate_until(self, requests, disable_tqdm=True):
        return self._answer("generate_until", requests, super().generate_until)

    def _answer(self, kind: str, requests: list[Any], ask: Callable[..., list[Any]]) -> list[Any]:
        """What an interrupted run has answered is taken from there."""
        hook = self.cache_hook
        known = [None if _sampled(r.args) else hook.answers.get(hash_args(kind, r.args)) for r in requests]
        left = [request for request, answer in zip(requests, known, strict=True) if answer is None]
        hook.done, hook.total = 0, len(requests)
        hook.advance(len(requests) - len(left))
        new = iter(ask(left, disable_tqdm=True) if left else [])
        answers = [next(new) if answer is None else answer for answer in known]
        return [tuple(answer) if isinstance(answer, list) else answer for answer in answers]

    def _roll(self, requests: list[Any], disable_tqdm: bool) -> list[float]:
        """Some documents at a time, because HFLM tells the hook of none before the last; and each process by itself: HFLM
        would have them meet after every call."""
        found: list[float] = []
        with replaced(self, "_world_size", 1):
            for start in range(0, len(requests), self.batch_size):
                found += super().loglikelihood_rolling(requests[start : start + self.batch_size], disable_tqdm)
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
        check_ids(inps, self.model.config.vocab_size)
        return finite(super()._model_call(inps, **kwargs), self.model)


def _sampled(request: Any) -> bool:
    """A sampled text is not the only answer: lm-eval may ask for several."""
    return len(request) > 1 and isinstance(request[1], dict) and bool(request[1].get("do_sample"))


def language_model(
    model: Any,
    tokenizer: Any,
    batch_size: int,
    max_length: int,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> HFLM:
    """`HFLM` around a model object. Its log-softmax runs in float32 whatever the model's dtype."""
    found = _Model(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
    )
    found.cache_hook = _Hook(Answers() if answers is None else answers, progress)
    if processes.count > 1:
        found.accelerator = processes.accelerator
        found._rank, found._world_size = processes.rank, processes.count
    return found
