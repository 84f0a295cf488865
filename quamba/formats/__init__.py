"""Reading the world's checkpoints, and reading and writing our own artifacts. Only this room knows other people's names.

The names load on first use: finding out that a path is wrong takes no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    "ArtifactWriter": "artifact",
    "expected_tensors": "artifact",
    "is_artifact": "artifact",
    "Checkpoint": "checkpoint",
    "checkpoint_of": "checkpoint",
    "open_checkpoint": "checkpoint",
    "convert": "conversion",
    "load_any": "others",
    "load_model": "load",
    "save_model": "save",
    "find": "location",
    "locate": "location",
    "push_model": "save",
    "check_hashes": "artifact",
    "bits": "summary",
    "summarize": "summary",
    "copy_tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
}

__all__ = [
    "ArtifactWriter",
    "Checkpoint",
    "bits",
    "check_hashes",
    "checkpoint_of",
    "convert",
    "copy_tokenizer",
    "expected_tensors",
    "find",
    "is_artifact",
    "load_any",
    "load_model",
    "load_tokenizer",
    "locate",
    "open_checkpoint",
    "push_model",
    "save_model",
    "summarize",
]

if TYPE_CHECKING:
    from quamba.formats.artifact import ArtifactWriter, check_hashes, expected_tensors, is_artifact
    from quamba.formats.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
    from quamba.formats.conversion import convert
    from quamba.formats.load import load_model
    from quamba.formats.location import find, locate
    from quamba.formats.others import load_any
    from quamba.formats.save import push_model, save_model
    from quamba.formats.summary import bits, summarize
    from quamba.formats.tokenizer import copy_tokenizer, load_tokenizer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
