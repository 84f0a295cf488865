"""Reading the world's checkpoints, and reading and writing our own artifacts. Only this room knows other people's names."""

from quamba.formats.artifact import ArtifactWriter, expected_tensors, is_artifact
from quamba.formats.checkpoint import Checkpoint, checkpoint_of, open_checkpoint
from quamba.formats.load import load_model, save_model
from quamba.formats.locate import locate
from quamba.formats.tokenizer import copy_tokenizer, load_tokenizer

__all__ = [
    "ArtifactWriter",
    "Checkpoint",
    "checkpoint_of",
    "copy_tokenizer",
    "expected_tensors",
    "is_artifact",
    "load_model",
    "load_tokenizer",
    "locate",
    "open_checkpoint",
    "save_model",
]
