"""From what a user types as MODEL to a folder: a bundled name, a folder, a hub id, or a short name."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quamba.errors import CheckpointError

TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("*.model", "*.jinja"),
)
MODEL_FILES = (
    *("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"),
    *("README.md", "LICENSE*", "LICENCE*", "NOTICE*"),  # what the base model says of its licence
)

_SHORT = re.compile(r"mamba2?(attn)?-\d[\w.-]*")


@dataclass(frozen=True)
class Location:
    """Where a model lies. `name`: how to call it in messages and files (never a machine's path); `repo`: its hub id."""

    path: Path
    name: str
    repo: str | None = None


def locate(model: str, allow: tuple[str, ...] = MODEL_FILES, **hub: Any) -> Location:
    """Find MODEL, downloading from the hub if it is an id there. Raises CheckpointError that says what was tried."""
    found = find(model)
    if isinstance(found, Location):
        return found
    return Location(_download(found, model, allow, hub), found.rsplit("/", 1)[1], found)


def find(model: str) -> Location | str:
    """Where MODEL lies on this machine, or its id on the hub. Raises CheckpointError if it can be neither."""
    from quamba import bundled

    path = Path(model).expanduser()
    if path.is_dir():
        return Location(path, path.resolve().name)
    if path.exists():
        raise CheckpointError(f"{model} is a file; give the folder that holds config.json and the weights")
    if model in bundled.MODELS:
        return Location(bundled.model_path(model), model)
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise CheckpointError(f"no such folder: {model}")
    if "/" not in model and not _SHORT.fullmatch(model):
        names = ", ".join(bundled.MODELS)
        raise CheckpointError(
            f"{model!r} is no folder here, no bundled model ({names}), and no hub id (owner/name) or short name (mamba-130m)"
        )
    return model if "/" in model else f"state-spaces/{model}"


def _download(repo: str, model: str, allow: tuple[str, ...], hub: dict) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    where = os.environ.get("HF_ENDPOINT", "the Hugging Face hub")
    kwargs = {key: value for key, value in hub.items() if value is not None}
    try:
        return Path(snapshot_download(repo, allow_patterns=list(allow), **kwargs))  # type: ignore[arg-type]
    except HFValidationError as error:
        raise CheckpointError(f"no such folder, and no hub id either: {model}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} has no repository {repo} (or it is private: log in with `hf auth login`)"
        ) from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        raise CheckpointError(
            f"{model}: no such folder here, and {repo} could not be fetched from {where} nor found in the local cache "
            f"({type(error).__name__}); without a network, give the path of a folder with config.json and the weights"
        ) from error
