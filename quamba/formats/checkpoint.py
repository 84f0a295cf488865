"""A checkpoint: somebody's files behind our names. Headers are checked against the architecture before bytes are read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError, QuambaError
from quamba.formats import artifact, mamba_ssm, transformers
from quamba.formats.location import Location, locate
from quamba.formats.tensors import LiveTensors, TensorFiles, read_json

TIED = "lm_head.weight"
_LAYOUTS: dict[str, Any] = {"quamba": artifact, "transformers": transformers, "mamba_ssm": mamba_ssm}


@dataclass(frozen=True)
class Checkpoint:
    """`config`: the architecture (and plan) read from it, `config.dtype` its float dtype; `names`: our name -> the file's."""

    location: Location
    layout: str
    config: QuambaConfig
    files: TensorFiles | LiveTensors
    names: dict[str, str]
    live: Any = None  # the model, if it is one in memory

    @property
    def folder(self) -> Path:
        return self.location.path

    @property
    def quantized(self) -> bool:
        return not self.config.plan.is_float

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by our names, memory-mapped, float ones checked to be finite. Raises CheckpointError."""
        source = {self.names[name]: name for name in names}
        tensors = {source[theirs]: tensor for theirs, tensor in self.files.read(source).items()}
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise CheckpointError(f"{self.location.name}: tensor {name} holds NaN or infinite values")
        return tensors

    def block(self, index: int) -> dict[str, Tensor]:
        """One block's tensors by their names inside the block."""
        prefix = f"backbone.layers.{index}."
        tensors = self.read(name for name in self.names if name.startswith(prefix))
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def open_checkpoint(model: str, **hub: Any) -> Checkpoint:
    """Find and identify MODEL, and check names, shapes and integrity of its files. Raises CheckpointError."""
    location = locate(model, **hub)
    config_file = location.path / "config.json"
    if not config_file.is_file():
        unfinished = " (a quantization that was not finished?)" if location.path.name.endswith(".partial") else ""
        raise CheckpointError(f"{location.path} has no config.json, so it is no model folder{unfinished}")
    if (location.path / "run.json").is_file():
        raise CheckpointError(
            f"{location.path} is a quantization that was not finished: run the same command to resume it"
        )
    return _identify(location, read_json(config_file), str(config_file), lambda: TensorFiles(location.path))


def checkpoint_of(model: Any) -> Checkpoint:
    """A live float model (ours, or transformers' Mamba or Mamba2) as a checkpoint. Raises CheckpointError."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        raise CheckpointError(
            f"can't quantize a {type(model).__name__}: give a name, a folder, or a live model of quamba's or transformers'"
        )
    name = getattr(model, "name_or_path", "") or type(model).__name__
    location = Location(Path(), Path(name).name)
    data = model.config.to_dict() | {"dtype": str(model.dtype).removeprefix("torch.")}
    found = _identify(
        location, data, f"the configuration of {type(model).__name__}", lambda: LiveTensors(model.state_dict())
    )
    return dataclasses.replace(found, live=model)


def _identify(
    location: Location, data: dict[str, Any], config_file: str, open_files: Callable[[], TensorFiles | LiveTensors]
) -> Checkpoint:
    name = next((name for name, layout in _LAYOUTS.items() if layout.matches(data)), None)
    if name is None:
        kind = data.get("model_type") or data.get("architectures") or "no model_type"
        raise CheckpointError(
            f"{config_file} describes an architecture that isn't supported ({kind}); "
            "supported: Mamba1 and Mamba2 in mamba-ssm's or transformers' layout, and quamba's own artifacts"
        )
    layout = _LAYOUTS[name]
    try:
        config = layout.read_config(data)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"{config_file} can't be understood: {type(error).__name__}: {error}") from error
    except QuambaError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    if not config.blocks:
        raise CheckpointError(f"{config_file} describes a model without layers")
    files = open_files()
    names = {layout.rename(theirs): theirs for theirs in files.entries}
    if config.tie_word_embeddings and TIED in names and "backbone.embedding.weight" in names:
        _check_tied(location, files, names)
        del names[TIED]
    if name != "quamba":
        config.dtype = _float_dtype(location, files, names)
    else:
        artifact.check_digests(config, location.name, files.metadata)
    _check(location, config, files, names, exact=name == "quamba")
    return Checkpoint(location, name, config, files, names)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Extremes carry NaN along, and need no temporary of the tensor's size."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def _float_dtype(location: Location, files: TensorFiles | LiveTensors, names: dict[str, str]) -> torch.dtype:
    theirs = names.get("backbone.embedding.weight")
    if theirs is None:
        raise CheckpointError(f"{location.name} has no embedding: missing tensor backbone.embedding.weight")
    dtype = files.entries[theirs].dtype
    if not dtype.is_floating_point:
        raise CheckpointError(f"{location.name}: the embedding is stored as {dtype}, expected a float type")
    return torch.float32 if dtype == torch.float64 else dtype


def _check_tied(location: Location, files: TensorFiles | LiveTensors, names: dict[str, str]) -> None:
    head, embedding = names[TIED], names["backbone.embedding.weight"]
    both = files.read([head, embedding])
    if both[head].shape != both[embedding].shape or not torch.equal(both[head], both[embedding]):
        raise CheckpointError(
            f"{location.name}: config.json says that head and embedding are tied, but lm_head.weight differs from the "
            "embedding; set tie_embeddings (tie_word_embeddings) to false in config.json if the head is its own"
        )


def _check(
    location: Location, config: QuambaConfig, files: TensorFiles | LiveTensors, names: dict[str, str], exact: bool
) -> None:
    try:
        expected = artifact.expected_tensors(config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{location.name}: config.json asks for an impossible model: {error}") from error
    except QuambaError as error:
        raise CheckpointError(f"{location.name}: config.json: {error}") from error
    missing, extra = sorted(expected.keys() - names.keys()), sorted(names.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{location.name}: {len(missing)} tensors are missing: {_some(missing)}")
    if extra:
        raise CheckpointError(
            f"{location.name}: {len(extra)} tensors don't belong to this architecture: {_some(extra)}"
        )
    for name, (shape, dtype) in expected.items():
        entry = files.entries[names[name]]
        if entry.shape != shape:
            raise CheckpointError(
                f"{location.name}: {name} has shape {list(entry.shape)}; by config.json it should be {list(shape)}"
            )
        if (exact and entry.dtype != dtype) or entry.dtype.is_floating_point != dtype.is_floating_point:
            raise CheckpointError(f"{location.name}: {name} is stored as {entry.dtype}; expected {dtype}")


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
