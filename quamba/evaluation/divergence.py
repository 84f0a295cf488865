"""How far a model's predictions are from a reference's, token by token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quamba.errors import DataError
from quamba.evaluation.kept import Answers
from quamba.evaluation.processes import ALONE, Processes
from quamba.evaluation.significance import p_value
from quamba.evaluation.text import (
    CONTEXT,
    Progress,
    TextScore,
    batch_size_for,
    check_ids,
    chunks,
    each_batch,
    finite,
    following,
    scored_tokens,
    standard_error,
)
from quamba.evaluation.uncertainty import Difference, contributions, mean_and_stderr


@dataclass(frozen=True)
class Divergence:
    """Of a model from a reference, over `tokens` predictions.

    mean_kl, p999_kl: mean and 99.9th percentile (linear interpolation) over tokens of KL(reference || model), in nats.
    top1_agreement: the share of tokens at which both find the same token the most likely.
    score, reference_score: each one's own score on the text. windows: (negative log-likelihood of the model, of the
    reference, scored tokens) of each window. Standard errors take tokens as independent, those of `change` windows.
    """

    mean_kl: float
    mean_kl_stderr: float | None
    p999_kl: float
    top1_agreement: float
    tokens: int
    score: TextScore
    reference_score: TextScore
    p999_kl_stderr: float | None = None
    top1_stderr: float | None = None
    windows: tuple[tuple[float, float, int], ...] = ()

    @property
    def change(self) -> Difference:
        """Of the perplexity, as a share of the reference's: 0.01 is 1 % worse. Error and test compare window by window."""
        mean = self.score.mean - self.reference_score.mean
        ratio = math.exp(min(mean, 700.0))
        if len(self.windows) < 2:
            return Difference(ratio - 1, None, None, "")
        ours, theirs, tokens = zip(*self.windows, strict=True)
        # log of the ratio = the weighted mean of the windows' differences
        pairs = [(theirs[i] - ours[i], tokens[i]) for i in range(len(tokens))]
        error = mean_and_stderr(contributions(ratio, "weighted", pairs))[1]
        return Difference(ratio - 1, error, *p_value(ours, theirs))


@torch.no_grad()
def compare(
    model: Any,
    reference: Any,
    ids: Tensor,
    context: int = CONTEXT,
    batch_size: int | None = None,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> Divergence:
    """One pass of both models over ids `[T]`, windows as in `quamba.evaluation.text`.

    Log-probabilities are float32, sums float64; a mean KL is right to about 1e-6 nats. Holds the logits of one batch of
    each model, and a few numbers a token. answers, processes: as in `each_batch`. Raises DataError if the vocabularies
    differ or an id is outside, QuambaError for NaN scores.
    """
    sizes = model.config.vocab_size, reference.config.vocab_size
    if sizes[0] != sizes[1]:
        raise DataError(f"the models have different vocabularies ({sizes[0]} and {sizes[1]}): they can't be compared")
    check_ids(ids, sizes[0])

    def work(batch: Tensor) -> dict[str, Any]:
        """sums: [nll, its squares] of the model, then of the reference, for each row."""
        logits = model(input_ids=batch.to(model.device)).logits
        wanted = reference(input_ids=batch.to(reference.device)).logits.to(logits.device)
        targets = batch.to(logits.device)
        sums = torch.zeros(batch.shape[0], 2, 2, dtype=torch.float64)
        kls: list[Tensor] = []
        agreeing = 0
        for row, positions in chunks(logits):
            q = logits[row, positions].float().log_softmax(-1)
            p = wanted[row, positions].float().log_softmax(-1)
            target = targets[row, following(positions), None]
            scores = -torch.cat((q.gather(1, target), p.gather(1, target)), 1).T
            finite(scores[0], model)
            nll = finite(scores, reference).cpu().double()
            sums[row] += torch.stack((nll.sum(1), nll.square().sum(1)), 1)
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            kls.append(finite((p.exp() * (p - q)).sum(-1, dtype=torch.float64), model).cpu())
        kl = torch.cat(kls).tolist()
        return {"sums": sums.tolist(), "tokens": batch.shape[1] - 1, "agreeing": agreeing, "kl": kl}

    size = batch_size_for(model, context, batch_size)
    found = each_batch(work, "perplexity and KL", ids, context, size, progress, answers, processes)
    total = scored_tokens(len(ids), context)
    kl = np.array([value for part in found for value in part["kl"]])
    sums = np.array([row for part in found for row in part["sums"]])  # [windows, 2 models, nll and squares]
    windows = [(float(row[0][0]), float(row[1][0]), part["tokens"]) for part in found for row in part["sums"]]
    score, reference_score = (TextScore(float(nats), total, float(squares)) for nats, squares in sums.sum(0))
    agreement = sum(part["agreeing"] for part in found) / total
    return Divergence(
        mean_kl=float(kl.mean()),
        mean_kl_stderr=standard_error(float(kl.sum()), float(np.square(kl).sum()), total),
        p999_kl=float(np.quantile(kl, 0.999)),
        top1_agreement=agreement,
        tokens=total,
        score=score,
        reference_score=reference_score,
        p999_kl_stderr=quantile_stderr(kl, 0.999),
        top1_stderr=standard_error(agreement * total, agreement * total, total),
        windows=tuple(windows),
    )


def quantile_stderr(values: np.ndarray, q: float) -> float | None:
    """Half the distance between the quantiles one standard error of their rank apart (Woodruff 1952); None for few values
    beyond the quantile."""
    step = math.sqrt(q * (1 - q) / len(values))
    if q + step >= 1:
        return None
    low, high = np.quantile(values, (q - step, q + step))
    return float(high - low) / 2
