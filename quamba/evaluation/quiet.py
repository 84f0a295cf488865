"""lm-eval and datasets without their talk, and without waiting for a hub that isn't there. Slow to import."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval.api.task
import lm_eval.evaluator
from huggingface_hub import get_session
from tqdm import tqdm

_LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "transformers")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
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
        if not datasets.utils.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        stack.enter_context(replaced(lm_eval.api.task, "tqdm", partial(tqdm, disable=True)))
        stack.enter_context(replaced(lm_eval.evaluator, "add_env_info", lambda results: None))
        stack.enter_context(replaced(lm_eval.evaluator, "get_git_commit_hash", lambda: None))
        yield


@contextlib.contextmanager
def offline_if_unreachable(asked: bool) -> Iterator[None]:
    """Without a hub, use its local cache at once instead of retrying for half a minute."""
    with contextlib.ExitStack() as stack:
        if asked and not huggingface_hub.constants.HF_HUB_OFFLINE and not _reachable():
            stack.enter_context(replaced(huggingface_hub.constants, "HF_HUB_OFFLINE", True))
            stack.enter_context(replaced(datasets.config, "HF_HUB_OFFLINE", True))
        yield


def _reachable() -> bool:
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # which client library raises depends on huggingface_hub's version; any failure means no
        return False
    return True


@contextlib.contextmanager
def datasets_cache(folder: Path) -> Iterator[None]:
    """A local file's rows are cached in `folder`, not in the user's home."""
    with replaced(datasets.config, "HF_DATASETS_CACHE", folder):
        yield
