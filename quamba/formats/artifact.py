"""Our own layout: one safetensors shard for the embedding, one a block, one for final norm and head.

    config.json                    architecture and plan; written last, so an unfinished folder never loads
    embedding.safetensors          backbone.embedding.weight
    block-00000.safetensors ...    backbone.layers.0.*
    head.safetensors               backbone.norm_f.weight, lm_head.weight unless tied
    model.safetensors.index.json

Every shard's metadata holds the format version and the digest of architecture + plan; names, shapes and dtypes follow
from the plan.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.headers import DTYPE_NAMES, read_header
from quamba.plan import FORMAT_VERSION

INDEX = "model.safetensors.index.json"
LINE = 64  # bytes: a cache line, and the widest vector
_LATER = ("head_bias",)  # fields of a later time, part of the digest where they say something
_ARCHITECTURE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "blocks",
    "layer_norm_epsilon",
    "residual_in_fp32",
    "tie_word_embeddings",
)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def matches(config: dict[str, Any]) -> bool:
    return config.get("model_type") == "quamba"


def read_config(data: dict[str, Any]) -> QuambaConfig:
    config = QuambaConfig.from_dict(data)
    if config.dtype not in _DTYPES.values():
        raise CheckpointError(f"dtype is {data.get('dtype')!r}; expected one of {', '.join(_DTYPES)}")
    if len(config.plan.blocks) != config.num_hidden_layers:
        raise CheckpointError(f"the plan has {len(config.plan.blocks)} blocks, the model {config.num_hidden_layers}")
    return config


def is_artifact(folder: Path) -> bool:
    try:
        return matches(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError):
        return False


def digest(config: QuambaConfig) -> str:
    """sha256 of the canonical JSON of architecture, float dtype and plan."""
    facts = {key: getattr(config, key) for key in _ARCHITECTURE}
    facts |= {key: getattr(config, key) for key in _LATER if getattr(config, key)}
    facts["dtype"] = str(config.dtype).removeprefix("torch.")
    plan = config.plan.to_dict()
    facts["plan"] = {key: value for key, value in plan.items() if key not in ("recipe", "provenance")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_digests(config: QuambaConfig, where: str, shards: dict[str, dict[str, str]]) -> None:
    """Every shard's metadata against config.json. Raises CheckpointError naming the shard."""
    expected = digest(config)
    for name, metadata in shards.items():
        if metadata.get("quamba_format_version") != str(FORMAT_VERSION):
            raise CheckpointError(f"{where}/{name} has format {metadata.get('quamba_format_version')!r}, not 1")
        if metadata.get("quamba_digest") != expected:
            raise CheckpointError(
                f"{where}/{name} was not written for this config.json (its plan digest differs): "
                "the files were edited or mixed with another model's; quantize again"
            )


def expected_tensors(config: QuambaConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of everything that a model with this architecture and plan stores."""
    from quamba.model import QuambaLMHeadModel

    with torch.device("meta"):
        model = QuambaLMHeadModel(config)
    model.to(config.dtype or torch.float32)
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    for name in model.tied:
        tensors.pop(name)
    return tensors


def block_shard(index: int) -> str:
    return f"block-{index:05d}.safetensors"


class ArtifactWriter:
    """Writes shards as they come, each complete or absent; `finish` writes index and config and makes it a model."""

    def __init__(self, folder: Path, config: QuambaConfig):
        self.folder, self.config = folder, config
        self.metadata = {
            "format": "pt",
            "quamba_format_version": str(FORMAT_VERSION),
            "quamba_digest": digest(config),
        }

    def write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """A safetensors file. The header is padded and what has whole cache lines comes first: mapped, it lies on them."""
        kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        names = sorted(kept, key=lambda name: (kept[name].nbytes % LINE > 0, -kept[name].itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(sorted(self.metadata.items()))}
        end = 0
        for name in names:
            start, end = end, end + kept[name].nbytes
            header[name] = {
                "dtype": DTYPE_NAMES[kept[name].dtype],
                "shape": list(kept[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-(8 + len(text)) // LINE) * LINE - 8)
        data = [kept[name].reshape(-1).view(torch.uint8).numpy().data for name in names]
        write_atomically(self.folder / shard, struct.pack("<Q", len(text)), text, *data)

    def finish(self) -> None:
        """Index and config.json, from the shards on disk."""
        names: dict[str, str] = {}
        total, hashes = 0, {}
        for shard in self.shards():
            hashes[shard] = sha256_of(self.folder / shard)
            entries, _ = read_header(self.folder / shard)
            names |= dict.fromkeys(entries, shard)
            total += (self.folder / shard).stat().st_size
        index = {"metadata": {"total_size": total, "sha256": hashes}, "weight_map": dict(sorted(names.items()))}
        write_atomically(self.folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        self.config.architectures = ["QuambaLMHeadModel"]
        write_atomically(self.folder / "config.json", self.config.to_json_string().encode())

    def shards(self) -> list[str]:
        blocks = [block_shard(i) for i in range(self.config.num_hidden_layers)]
        return ["embedding.safetensors", *blocks, "head.safetensors"]


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_hashes(folder: Path) -> None:
    """Every shard against the hash that was recorded when it was written. Raises CheckpointError naming the shard."""
    try:
        hashes = json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["sha256"]
        wrong = [name for name, expected in sorted(hashes.items()) if sha256_of(folder / Path(name).name) != expected]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} can't be verified: it records no hashes of its files (only quamba's own artifacts do; "
            "`quamba convert` makes one)"
        ) from error
    if wrong:
        raise CheckpointError(
            f"{folder / wrong[0]} is not what was written: its hash differs; restore or make it again"
        )


def write_atomically(path: Path, *pieces: bytes | memoryview) -> None:
    """The file is there whole, on disk, or not at all; an older one stays until then."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
