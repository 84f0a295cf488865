"""Files of weights that `torch.save` wrote. Nothing in them is executed, and none of them allocates more than it holds."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.headers import check_name, refuse_pointer
from quamba.formats.opcodes import MAX_PICKLE, check_pickle

_ZIP = b"PK\x03\x04"  # what torch itself tells the two formats by
_OLD = 0x1950A86A20F9469CFC6C, 1001


def load_bin(file: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, memory-mapped where the file is of torch 1.6 or later.

    Python numbers become 0-d tensors and None is left out: some checkpoints keep scales that way.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(8)
        refuse_pointer(file, start)
        zipped = start.startswith(_ZIP)
        if zipped:
            _check_zip(file)
        else:
            _check_old(file)
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes torch stumble over
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} can't be read as a file of weights: {reason[:300]}") from error
    if isinstance(data, dict) and set(data) >= {"state_dict"} and isinstance(data["state_dict"], dict):
        data = data["state_dict"]
    if not isinstance(data, dict) or not all(isinstance(name, str) for name in data):
        raise CheckpointError(f"{file} holds something else than a dict of tensors")
    return {check_name(file, name): _tensor(file, name, value) for name, value in data.items() if value is not None}


def _tensor(file: Path, name: str, value: object) -> Tensor:
    if isinstance(value, bool | int | float):
        try:
            return torch.tensor(float(value))
        except OverflowError as error:
            raise CheckpointError(f"{file}: the number {name} is too large") from error
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        raise CheckpointError(f"{file}: {name} is no plain tensor but {type(value).__name__}")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{file}: {name} claims {list(value.shape)} values and stores fewer")
    return value


def _check_zip(file: Path) -> None:
    """Entries must be stored, not compressed, lie apart, and hold all that the pickle asks for: no bomb can unfold."""
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        names = [info.filename.lower() for info in infos]  # torch looks them up without minding case
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise CheckpointError(f"{file} is compressed inside: not written by torch.save, and not read")
        if len(set(names)) != len(names):
            raise CheckpointError(f"{file} has two entries of the same name inside")
        ends = [info.header_offset + 30 + info.file_size for info in infos]
        starts = [info.header_offset for info in infos[1:]] + [archive.start_dir]
        if any(end > start for end, start in zip(ends, starts)):
            raise CheckpointError(f"{file} claims more bytes inside than it has: entries overlap")
        folder = archive.infolist()[0].filename.split("/")[0] if infos else ""
        sizes = {info.filename.removeprefix(f"{folder}/"): info.file_size for info in infos}
        if sizes.get("data.pkl", 0) > MAX_PICKLE:
            raise CheckpointError(f"{file} has an absurdly long table of contents")
        contents = archive.read(f"{folder}/data.pkl")
    _, storages = check_pickle(io.BytesIO(contents), len(contents))
    for key, nbytes in storages.items():
        if nbytes > sizes.get(f"data/{key}", -1):
            raise CheckpointError(f"{file} claims more bytes inside than it has: storage {key[:20]} of {nbytes}")


def _check_old(file: Path) -> None:
    """Before torch 1.6: number, version, system, the tensors, the storages' names, the storages one after the other."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        for expected in _OLD:
            if check_pickle(stream, 100)[0] != expected:
                raise ValueError("it is neither of the formats of torch.save")
        check_pickle(stream, 10_000)
        _, storages = check_pickle(stream, size - stream.tell())
        keys, _ = check_pickle(stream, size - stream.tell())
        stored = sum(8 + nbytes for nbytes in storages.values())  # each behind its length
        if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
            raise ValueError("its storages are not those that its tensors name")
        if stored > size - stream.tell():
            raise CheckpointError(f"{file} claims more bytes inside than it has: {stored} of storages")
