"""Tokens per second of a model, prompt and decoding apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Speed:
    """Medians over the rounds, in tokens per second, each with (lowest, highest)."""

    prefill: float
    prefill_range: tuple[float, float]
    decode: float
    decode_range: tuple[float, float]


@torch.no_grad()
def measure_speed(
    models: Sequence[Any],
    ids: Tensor,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Speed]:
    """Prefill of ids `[B, L]`, then `new_tokens` greedy steps from the state, for each model.

    The models take turns, round by round, so that a machine that drifts slows them all; one more round first is thrown
    away. Works for any model that returns `past_key_values` or `cache_params` and takes it back.
    """
    times: list[list[tuple[float, float]]] = [[] for _ in models]
    total = (rounds + 1) * len(models)
    for turn in range(rounds + 1):
        for i, model in enumerate(models):
            seconds = _once(model, ids.to(model.device), new_tokens)
            if turn:
                times[i].append(seconds)
            if progress is not None:
                progress(turn * len(models) + i + 1, total, "speed")
    rows = ids.shape[0]
    return [_speed(seconds, rows * ids.shape[1], rows * new_tokens) for seconds in times]


def _once(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    started = _now(ids)
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = _now(ids)
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        out = model(input_ids=token, **{name: out[name]}, use_cache=True)
    return read - started, _now(ids) - read


def _now(ids: Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter()


def _speed(seconds: list[tuple[float, float]], prompt: int, new: int) -> Speed:
    prefill = [prompt / a for a, _ in seconds]
    decode = [new / b for _, b in seconds]
    return Speed(
        statistics.median(prefill),
        (min(prefill), max(prefill)),
        statistics.median(decode),
        (min(decode), max(decode)),
    )
