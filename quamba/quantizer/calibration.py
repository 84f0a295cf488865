"""Calibration text to token windows."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationSet:
    """ids int64 `[samples, seq_len]`; `provenance`: what they are, for the artifact."""

    ids: Tensor
    provenance: dict[str, Any]


def calibration_set(
    source: str, tokenizer: Any, vocab_size: int, *, samples: int, seq_len: int, seed: int
) -> CalibrationSet:
    """Cut the text into windows of `seq_len` tokens and keep `samples` of them, chosen by `seed`, in text order.

    source: `bundled`, a text file, or `hf:NAME` (a data set on the hub with a `text` column). Raises DataError for
    text that can't be read, is too short for one window, or yields ids that the model has no embedding for.
    """
    text, name = _text(source)
    # transformers warns that the text is longer than the model's context; it is cut below.
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < seq_len:
        raise DataError(
            f"calibration text {source} has {len(ids)} tokens, less than one window of {seq_len}: "
            "give a longer text, or a smaller --seq-len"
        )
    if int(ids.max()) >= vocab_size:
        raise DataError(
            f"the tokenizer produced id {int(ids.max())}, but the model's vocabulary has {vocab_size} entries: "
            "this tokenizer belongs to another model (--tokenizer)"
        )
    windows = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
    if len(windows) < samples:
        logger.warning("%s has only %d windows of %d tokens; using all of them", source, len(windows), seq_len)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return _described(windows[order[:samples].sort().values], name, seed)


def _text(source: str) -> tuple[str, str]:
    if source == "bundled":
        from quamba import bundled

        return bundled.calibration_text(), "bundled"
    if source.startswith("hf:"):
        return _hub_text(source[3:]), source
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read calibration text {source}: {error}") from error
    if not text.strip():
        raise DataError(f"calibration text {source} is empty")
    return text, path.name


def _hub_text(name: str, most: int = 4_000_000) -> str:
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True)
        pieces: list[str] = []
        total = 0
        for row in rows:
            if "text" not in row:
                raise DataError(f"data set {name} has no text column (it has {', '.join(row)})")
            pieces.append(row["text"])
            total += len(row["text"])
            if total >= most:
                break
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"can't load data set {name} from the hub ({reason}); without a network use --calibration bundled or a text file"
        ) from error
    return "\n\n".join(pieces)


def given_ids(ids: Tensor, vocab_size: int, *, seed: int) -> CalibrationSet:
    """Token ids handed over by the caller, int64 `[samples, seq_len]`. Raises DataError."""
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise DataError(f"calibration ids must be integers [samples, seq_len], not {ids.dtype} {list(ids.shape)}")
    if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
        raise DataError(f"calibration ids must lie in 0..{vocab_size - 1}, the model's vocabulary")
    return _described(ids.to(torch.int64).cpu().contiguous(), "token ids given by the caller", seed)


def _described(ids: Tensor, source: str, seed: int) -> CalibrationSet:
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
    samples, seq_len = ids.shape
    return CalibrationSet(
        ids, {"source": source, "samples": samples, "seq_len": seq_len, "seed": seed, "sha256": digest}
    )
