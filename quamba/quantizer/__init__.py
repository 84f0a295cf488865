"""Quantizing a model: `quantize` is the one verb."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quamba.errors import DataError, QuambaError, RecipeError
from quamba.quantizer.calibration import CalibrationSet, calibration_set, given_ids
from quamba.quantizer.pipeline import Progress, run_pipeline
from quamba.recipe import Recipe

if TYPE_CHECKING:
    from quamba.model import QuambaLMHeadModel

__all__ = ["CalibrationSet", "Progress", "calibration_set", "quantize", "run_pipeline"]


def quantize(
    model: Any,
    recipe: str | Path | Recipe = "w8a8",
    *,
    out: str | Path | None = None,
    calibration: str | Path | Tensor = "bundled",
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> QuambaLMHeadModel:
    """Quantize a model and return it, loaded from the artifact it was written to.

    model: a bundled name, folder, hub id or short name; or a live float model (ours or transformers' Mamba).
    recipe: a preset (`w8a8`), a recipe's name or YAML file, or a `Recipe`. out: the artifact's folder; None: a temporary
    one, deleted with the model. calibration: `bundled`, a text file, `hf:NAME`, or token ids `[samples, seq_len]`.
    samples, seq_len: default from the recipe. dtype: of the float parts; "auto" keeps the source's.
    tokenizer: a tokenizer object, folder or hub id, where the model has none of its own.

    Raises QuambaError. The same call resumes a run that was interrupted. The same inputs on the same machine, with the
    same versions and number of threads, give identical files.
    """
    from quamba.formats import checkpoint_of, load_model, load_tokenizer, open_checkpoint
    from quamba.formats.load import as_device, as_dtype, read_generation_config

    for name, value, least in (("samples", samples, 1), ("seq_len", seq_len, 2)):
        if value is not None and value < least:
            raise DataError(f"{name} is {value}; it must be at least {least}")
    if not isinstance(recipe, str | Path | Recipe):
        raise RecipeError(f"recipe must be a name, a YAML file or a Recipe, not {type(recipe).__name__}")
    if not isinstance(calibration, str | Path | Tensor):
        raise DataError(f"calibration must be a name, a file or token ids, not {type(calibration).__name__}")
    checkpoint = open_checkpoint(str(model)) if isinstance(model, str | Path) else checkpoint_of(model)
    if checkpoint.quantized:
        raise QuambaError(f"{checkpoint.location.name} is quantized already; give the float model")
    if not isinstance(recipe, Recipe):
        recipe = Recipe.find(str(recipe), family=checkpoint.config.blocks[0]["mixer"])  # type: ignore[index]
    recipe.resolve(checkpoint.config)
    checkpoint.repairs.tell()
    if checkpoint.live is None:
        read_generation_config(checkpoint.folder)  # a result that wouldn't load is refused before any work
    if isinstance(tokenizer, str) or (tokenizer is None and isinstance(model, str | Path)):
        tokenizer = load_tokenizer(
            checkpoint.location.name if checkpoint.live else str(model),
            tokenizer,
            required=not isinstance(calibration, Tensor),
        )
    if isinstance(calibration, Tensor):
        chosen = given_ids(calibration, checkpoint.config.vocab_size, seed=seed)
    elif tokenizer is None:
        raise DataError("a live model needs tokenizer=..., or calibration= as token ids")
    else:
        chosen = calibration_set(
            str(calibration),
            tokenizer,
            checkpoint.config.vocab_size,
            samples=samples or recipe.calibration.samples,
            seq_len=seq_len or recipe.calibration.seq_len,
            seed=seed,
        )
    temporary = None
    if out is None:
        temporary = tempfile.TemporaryDirectory(prefix="quamba-", ignore_cleanup_errors=True)
        out = Path(temporary.name) / f"{checkpoint.location.name}-{recipe.name}"
    run_pipeline(
        checkpoint,
        recipe,
        chosen,
        Path(out),
        dtype=as_dtype(dtype),
        device=as_device(device, None),
        overwrite=overwrite,
        tokenizer=tokenizer,
        progress=progress,
    )
    quantized = load_model(str(Path(out).absolute()), device=device)
    if temporary is not None:
        weakref.finalize(quantized, temporary.cleanup)
    return quantized
