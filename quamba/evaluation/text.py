"""Perplexity of a text.

The text becomes one row of tokens without a beginning-of-sequence token, cut into windows of `context` tokens that
don't overlap; the last one, the tail, is what is left. A model reads every window from an empty state, and every token
but the first of its window is scored. A tail of a single token has nothing to score and is dropped. So T tokens in W
windows give T - W scored tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quamba.errors import DataError, QuambaError
from quamba.evaluation.kept import Answers
from quamba.evaluation.processes import ALONE, Processes

T = TypeVar("T")

CONTEXT = 1024
"""Tokens a window, unless the caller says otherwise."""

SAMPLES = {"wikitext": "wikitext2_sample", "novels": "novels_sample"}
"""Words that stand for a bundled text."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""

_LOGITS = 2**27  # of one batch, unless the caller chooses the batch size: 512 MB in float32
_CHUNK = 2**24  # logits worked on in float32 at once


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text. nll_sum: negative log-likelihood in nats, of `tokens` scored tokens."""

    nll_sum: float
    tokens: int
    nll_squares: float

    @property
    def mean(self) -> float:
        """Mean negative log-likelihood in nats a token."""
        return self.nll_sum / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.mean) if self.mean < 700 else math.inf

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean negative log-likelihood, tokens taken as independent; None for a single token."""
        return standard_error(self.nll_sum, self.nll_squares, self.tokens)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.stderr is None else self.perplexity * self.stderr


def standard_error(total: float, squares: float, n: int) -> float | None:
    """Of a mean, from the sum and the sum of squares of n independent values."""
    if n < 2:
        return None
    return math.sqrt(max(squares - total * total / n, 0.0) / (n - 1) / n)


def read_text(source: str | Path) -> str:
    """A UTF-8 file, or a bundled sample: wikitext or novels. Raises DataError."""
    from quamba import bundled

    path = bundled.sample(SAMPLES[str(source)]) if str(source) in SAMPLES else Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"can't read the text {source}: {reason} (a file, or {' or '.join(SAMPLES)})") from error
    if not text.strip():
        raise DataError(f"the text {source} is empty")
    return text


def encode_text(tokenizer: Any, source: str | Path) -> Tensor:
    """Token ids int64 `[T]` of what `read_text` finds, no special tokens added. Raises DataError below two tokens."""
    text = read_text(source)
    # verbose: transformers would warn that the text is longer than the model's context.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < 2:
        raise DataError(f"the text {source} has {len(ids)} tokens; perplexity needs two or more")
    return ids


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises DataError for ids outside the vocabulary."""
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise DataError(
            f"the tokenizer produced id {int(ids.max())}, but the model's vocabulary has {vocab_size} entries: "
            "this tokenizer belongs to another model (--tokenizer)"
        )


def batches(ids: Tensor, context: int, batch_size: int) -> Iterator[Tensor]:
    """Windows of ids `[T]` as `[batch_size or fewer, context]`, then the tail, `[1, 2 to context - 1]`, if any."""
    if context < 2:
        raise ValueError(f"a window has two tokens or more, not {context}")
    whole = len(ids) // context * context
    if whole:
        yield from ids[:whole].view(-1, context).split(batch_size)
    if len(ids) - whole >= 2:
        yield ids[None, whole:]


def scored_tokens(length: int, context: int) -> int:
    """How many of `length` tokens are scored."""
    return length - math.ceil(length / context)


def batch_size_for(model: Any, context: int, wanted: int | None) -> int:
    """The batch size asked for, else the largest up to 8 whose logits stay below 2^27 numbers."""
    return wanted or max(1, min(8, _LOGITS // (context * model.config.vocab_size)))


def chunks(logits: Tensor) -> Iterator[tuple[int, slice]]:
    """(row, positions) that cover `logits [B, L, V]` but for each row's last position, in pieces of bounded size."""
    step = max(1, _CHUNK // logits.shape[-1])
    for row in range(logits.shape[0]):
        for start in range(0, logits.shape[1] - 1, step):
            yield row, slice(start, min(start + step, logits.shape[1] - 1))


def following(positions: slice) -> slice:
    """The positions of the tokens that are predicted at `positions`."""
    return slice(positions.start + 1, positions.stop + 1)


def finite(values: Tensor, model: Any) -> Tensor:
    """The values, or QuambaError if one is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        name = getattr(model, "name_or_path", "") or type(model).__name__
        raise QuambaError(f"{name} gives scores that are NaN or infinite: its weights or scales are damaged")
    return values


@torch.no_grad()
def score_text(
    model: Any,
    ids: Tensor,
    context: int = CONTEXT,
    batch_size: int | None = None,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> TextScore:
    """Score ids `[T]`, T >= 2, by the rule at the top of this file.

    Only windows of equal length share a batch, so nothing is padded; batch_size None chooses one that bounds memory.
    Log-probabilities are computed in float32 and summed in float64. answers, processes: as in `each_batch`. Raises DataError
    for ids outside the model's vocabulary, QuambaError for NaN or infinite scores.
    """
    check_ids(ids, model.config.vocab_size)

    def score(batch: Tensor) -> list[float]:
        batch = batch.to(model.device)
        logits = model(input_ids=batch).logits
        sums = [0.0, 0.0]
        for row, positions in chunks(logits):
            logp = logits[row, positions].float().log_softmax(-1)
            nll = -logp.gather(1, batch[row, following(positions), None])
            nll = finite(nll, model).cpu().double()
            sums = [sums[0] + float(nll.sum()), sums[1] + float(nll.square().sum())]
        return sums

    size = batch_size_for(model, context, batch_size)
    sums = each_batch(score, "perplexity", ids, context, size, progress, answers, processes)
    nll_sum, squares = (math.fsum(column) for column in zip(*sums, strict=True))
    return TextScore(nll_sum, scored_tokens(len(ids), context), squares)


def each_batch(
    work: Callable[[Tensor], T],
    title: str,
    ids: Tensor,
    context: int,
    size: int,
    progress: Progress | None = None,
    answers: Answers | None = None,
    processes: Processes = ALONE,
) -> list[T]:
    """`work(batch)`, plain JSON, of every batch of windows in order.

    The processes share the batches and all get all of them. What `answers` has is not worked out again.
    """
    parts = list(batches(ids, context, size))
    mine = range(processes.rank, len(parts), processes.count)
    tokens = [part.shape[0] * (part.shape[1] - 1) for part in parts]
    done, total = 0, sum(tokens[i] for i in mine)
    answers = Answers() if answers is None else answers
    found: dict[int, T] = {}
    for i in mine:
        key = f"{title}/{context}/{hashlib.sha256(parts[i].cpu().numpy().tobytes()).hexdigest()}"
        known = answers.get(key)
        found[i] = work(parts[i]) if known is None else known
        if known is None:
            answers.put(key, found[i])
        done += tokens[i]
        if progress is not None:
            progress(done, total, f"{title}: {done}/{total} tokens")
    merged = processes.merge(found)
    return [merged[i] for i in range(len(parts))]
