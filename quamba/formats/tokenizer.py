"""A model's tokenizer: from its folder, or the one its family was trained with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quamba.errors import CheckpointError, DataError
from quamba.formats.location import TOKENIZER_FILES, locate

# state-spaces' repositories carry no tokenizer; their model cards name this one.
STATE_SPACES_TOKENIZER = "EleutherAI/gpt-neox-20b"


def load_tokenizer(model: str, tokenizer: str | None = None, required: bool = True, **hub: Any) -> Any:
    """The tokenizer of MODEL (or the one named by `tokenizer`), padding on the left. Raises DataError.

    None if the model has none or its family's is out of reach, none is named, and none is `required`.
    """
    named = tokenizer is not None
    if tokenizer is None:
        location = locate(model, **hub)
        if _has_tokenizer(location.path):
            return _read(location.path)
        if not (location.repo or "").startswith("state-spaces/"):
            if not required:
                return None
            raise DataError(
                f"{location.path} has no tokenizer (tokenizer.json); name one with --tokenizer FOLDER_OR_HUB_ID"
            )
        tokenizer = STATE_SPACES_TOKENIZER
    try:
        folder = locate(tokenizer, allow=TOKENIZER_FILES, **hub).path
    except CheckpointError as error:
        if not (required or named):
            return None
        raise DataError(f"no tokenizer for {model}: {error}") from error
    if not _has_tokenizer(folder):
        raise DataError(f"{folder} holds no tokenizer (tokenizer.json)")
    return _read(folder)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _read(folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left")
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise DataError(f"the tokenizer in {folder} can't be read: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files into an artifact, padding on the left whatever the object does."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"padding_side": "left"}
    for fact_of_this_run in ("is_local", "local_files_only"):
        config.pop(fact_of_this_run, None)
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
