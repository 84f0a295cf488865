"""Files of weights that `torch.save` wrote. Nothing in them is executed, and none of them allocates more than it holds."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from quamba.errors import CheckpointError

_MAX_PICKLE = 256 * 2**20  # names and shapes; the largest known checkpoints have some hundred kB of them


def load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, memory-mapped where the file is of torch 1.6 or later.

    Python numbers become 0-d tensors and None is left out: some checkpoints keep scales that way.
    """
    try:
        zipped = zipfile.is_zipfile(file)  # torch before 1.6 wrote something else, which can't be mapped
        if zipped:
            _check_zip(file)
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle makes torch stumble over
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).lower():
            reason = f"it holds more than weights ({reason})"
        raise CheckpointError(f"{file} can't be read as a file of weights: {reason}") from error
    if isinstance(data, dict) and set(data) >= {"state_dict"} and isinstance(data["state_dict"], dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{file} holds something else than a dict of tensors")
    return {name: _tensor(file, name, value) for name, value in data.items() if value is not None}


def _tensor(file: Path, name: str, value: object) -> Tensor:
    if isinstance(value, bool | int | float):
        return torch.tensor(float(value))
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{file}: {name} is no plain tensor but {type(value).__name__}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name} claims {list(value.shape)} values and stores fewer")
    return value


def _check_zip(file: Path) -> None:
    """Entries must be stored, not compressed, lie apart, and fit the file: so no bomb can unfold."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    size = file.stat().st_size
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise CheckpointError(f"{file} is compressed inside: not written by torch.save, and not read")
    if sum(info.file_size for info in infos) > size:
        raise CheckpointError(f"{file} claims more bytes inside than it has: entries overlap")
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        raise CheckpointError(f"{file} has two entries of the same name inside")
    if any(info.file_size > _MAX_PICKLE for info in infos if info.filename.endswith("data.pkl")):
        raise CheckpointError(f"{file} has an absurdly long table of contents")
