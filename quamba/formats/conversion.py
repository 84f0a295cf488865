"""Somebody's checkpoint, written as an artifact of ours: same numbers, our names, plan and shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quamba.formats.artifact import ArtifactWriter, expected_tensors, write_atomically
from quamba.formats.card import converted_card, copy_licence
from quamba.formats.checkpoint import Checkpoint, open_checkpoint
from quamba.formats.load import cast, read_generation_config, shard_of, write_generation_config
from quamba.formats.run import RunFolder
from quamba.formats.tokenizer import copy_tokenizer, load_tokenizer

Progress = Callable[[int, int, str], None]


def convert(
    model: str,
    out: str | Path,
    *,
    exact: bool = False,
    strict: bool = False,
    verify: bool = False,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **hub: Any,
) -> Checkpoint:
    """Write MODEL into `out` as an artifact, a shard at a time; returns the checkpoint it was read from.

    exact, strict, verify: as in `open_checkpoint`. dtype: of the float parts; None as stored. Raises QuambaError.
    """
    checkpoint = open_checkpoint(model, strict=strict, exact=exact, verify=verify, **hub)
    read_generation_config(checkpoint.folder)  # a folder that wouldn't load is refused before any work
    words = load_tokenizer(model, tokenizer, required=False, **hub)
    config = type(checkpoint.config).from_dict(checkpoint.config.to_dict())
    config.dtype = dtype or checkpoint.config.dtype
    wanted = expected_tensors(config)
    with RunFolder(Path(out), overwrite) as folder:
        folder.resume({"convert": checkpoint.location.name, "model": checkpoint.files.fingerprint(), "exact": exact})
        folder.need(int(1.01 * sum(torch.Size(s).numel() * d.itemsize for s, d in wanted.values())) + 1_000_000)
        writer = ArtifactWriter(folder.path, config)
        shards: dict[str, list[str]] = {shard: [] for shard in writer.shards()}
        for name in wanted:
            shards[shard_of(name)].append(name)
        for done, (shard, names) in enumerate(shards.items(), 1):
            tensors = checkpoint.read(names)
            writer.write(shard, {name: cast(tensor, wanted[name][1]) for name, tensor in tensors.items()})
            if progress is not None:
                progress(done, len(shards), shard)
        if words is not None:
            copy_tokenizer(words, folder.path)
        copy_generation_config(checkpoint, folder.path)
        copy_licence(checkpoint, folder.path)
        converted_card(config, checkpoint).write(folder.path)
        writer.finish()
        folder.finish()
    return checkpoint


def copy_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    """The source's generation_config.json, if it has one."""
    if checkpoint.live is not None:
        if getattr(checkpoint.live, "generation_config", None) is not None:
            write_generation_config(checkpoint.live.generation_config, folder)
        return
    source = checkpoint.folder / "generation_config.json"
    if source.is_file():
        write_atomically(folder / "generation_config.json", source.read_bytes())
