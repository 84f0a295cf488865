"""lm-eval's own `HFLM`, with our progress, float32 scores and checks. Slow to import: only where it is used."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.api.task
import lm_eval.evaluator
from huggingface_hub import get_session
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from quamba.evaluation.text import Progress, check_ids, finite

_LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "transformers")


class _Counter:
    """In the place of lm-eval's response cache, which is told of every answer."""

    def __init__(self, progress: Progress):
        self.progress, self.done, self.total = progress, 0, 0

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        self.done += 1
        self.progress(self.done, max(self.total, self.done), "requests")


class _Model(HFLM):
    def _count(self, requests: list[Any]) -> list[Any]:
        if isinstance(self.cache_hook, _Counter):
            self.cache_hook.done, self.cache_hook.total = 0, len(requests)
        return requests

    def loglikelihood(self, requests, disable_tqdm=True):
        return super().loglikelihood(self._count(requests), disable_tqdm=True)

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        return super().loglikelihood_rolling(self._count(requests), disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm=True):
        return super().generate_until(self._count(requests), disable_tqdm=True)

    def _loglikelihood_tokens(self, requests, disable_tqdm=True, override_bs=None):
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Tensor, **kwargs: Any) -> Tensor:
        check_ids(inps, self.model.config.vocab_size)
        return finite(super()._model_call(inps, **kwargs), self.model)


def language_model(model: Any, tokenizer: Any, batch_size: int, max_length: int, progress: Progress | None) -> HFLM:
    """`HFLM` around a model object. Its log-softmax runs in float32 whatever the model's dtype."""
    found = _Model(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=batch_size,
        max_length=max_length,
        softmax_dtype="float32",
    )
    if progress is not None:
        found.cache_hook = _Counter(progress)
    return found


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Errors only from lm-eval and datasets, no bars of theirs, no listing of the machine's packages (seconds), and no
    question to git about the current folder (which complains on stderr where there is no repository)."""
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_replaced(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)))
        stack.enter_context(_replaced(lm_eval.evaluator, "add_env_info", lambda results: None))
        stack.enter_context(_replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        yield


@contextlib.contextmanager
def offline_if_unreachable(asked: bool) -> Iterator[None]:
    """Without a hub, use its local cache at once instead of retrying for half a minute."""
    with contextlib.ExitStack() as stack:
        if asked and not huggingface_hub.constants.HF_HUB_OFFLINE and not _reachable():
            stack.enter_context(_replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(_replaced(datasets.config, "HF_HUB_OFFLINE", True))
        yield


def _reachable() -> bool:
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # which client library raises depends on huggingface_hub's version; any failure means no
        return False
    return True
