"""How far a model's predictions are from a reference's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quamba.errors import DataError
from quamba.evaluation.text import (
    CONTEXT,
    Progress,
    TextScore,
    batch_size_for,
    batches,
    check_ids,
    chunks,
    finite,
    following,
    scored_tokens,
    standard_error,
)


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over `tokens` predictions.

    mean_kl, p999_kl: mean and 99.9th percentile (linear interpolation) over tokens of KL(reference || model), in nats.
    top1_agreement: the share of tokens at which both find the same token the most likely.
    score, reference_score: each one's own score on the text.
    """

    mean_kl: float
    mean_kl_stderr: float | None
    p999_kl: float
    top1_agreement: float
    tokens: int
    score: TextScore
    reference_score: TextScore


@torch.no_grad()
def compare(
    model: Any,
    reference: Any,
    ids: Tensor,
    context: int = CONTEXT,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """One pass of both models over ids `[T]`, windows as in `quamba.evaluation.text`.

    Log-probabilities are float32, sums float64; a mean KL is right to about 1e-6 nats. Holds the logits of one batch of
    each model, and a few numbers a token. Raises DataError if the vocabularies differ or an id is outside, QuambaError
    for NaN scores.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise DataError(f"the models have different vocabularies ({sizes[0]} and {sizes[1]}): they can't be compared")
    check_ids(ids, sizes[0])
    kls: list[Tensor] = []
    sums = torch.zeros(2, 2, dtype=torch.float64)  # of nll and its square, for model and reference
    agreeing = done = 0
    total = scored_tokens(len(ids), context)
    for batch in batches(ids, context, batch_size_for(model, context, batch_size)):
        logits = model(input_ids=batch.to(model.device)).logits
        wanted = reference(input_ids=batch.to(reference.device)).logits.to(logits.device)
        targets = batch.to(logits.device)
        for row, positions in chunks(logits):
            q = logits[row, positions].float().log_softmax(-1)
            p = wanted[row, positions].float().log_softmax(-1)
            target = targets[row, following(positions), None]
            scores = -torch.cat((q.gather(1, target), p.gather(1, target)), 1).T
            finite(scores[0], model)
            nll = finite(scores, reference).cpu().double()
            sums += torch.stack((nll.sum(1), nll.square().sum(1)), 1)
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            kls.append(finite((p.exp() * (p - q)).sum(-1, dtype=torch.float64), model).cpu())
        done += batch.shape[0] * (batch.shape[1] - 1)
        if progress is not None:
            progress(done, total, f"perplexity and KL: {done}/{total} tokens")
    kl = torch.cat(kls)
    score, reference_score = (TextScore(float(nats), total, float(squares)) for nats, squares in sums)
    return Divergence(
        mean_kl=float(kl.mean()),
        mean_kl_stderr=standard_error(float(kl.sum()), float(kl.square().sum()), total),
        p999_kl=float(np.quantile(kl.numpy(), 0.999)),
        top1_agreement=agreeing / total,
        tokens=total,
        score=score,
        reference_score=reference_score,
    )
