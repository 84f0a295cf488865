"""The files that the engines of cpu.py read: random weights as float checkpoints, artifacts and GGUF files."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield


def make(task: dict[str, Any]) -> dict[str, Any]:
    """Write what is missing of a model's files: float checkpoints, artifacts, GGUF files. `folder` None: a bundled model.

    Returns paths and sizes by format, and multiply-adds a token of the blocks' projections.
    """
    import torch

    from quamba.formats import locate, open_checkpoint

    torch.set_num_threads(task["threads"])
    folder = Path(task["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    wanted, paths, failed = task["formats"], {}, {}
    if task["shape"]:
        source = write_random(task["family"], task["shape"], folder / "float32", torch.float32)
        paths["float32"] = source
        if "bf16" in wanted:
            paths["bf16"] = write_random(task["family"], task["shape"], folder / "bf16", torch.bfloat16)
    else:
        source = paths["float32"] = paths["bf16"] = Path(locate(task["model"]).path)
    for name, recipe in task["recipes"].items():
        paths[name] = write_artifact(source, folder / name, **recipe)
    for kind in task["gguf"]:
        try:
            paths[kind] = write_gguf_file(source, folder, kind)
        except (OSError, RuntimeError) as error:
            failed[kind] = str(error)
    (folder / "float.gguf").unlink(missing_ok=True)
    checkpoint = open_checkpoint(str(source))
    shapes = {name: entry.shape for name, entry in checkpoint.files.entries.items() if name.endswith("proj.weight")}
    return {
        "paths": {name: str(path) for name, path in paths.items()},
        "failed": failed,
        "sizes": {name: size(path) for name, path in paths.items()},
        "multiply_adds": sum(rows * columns for rows, columns in shapes.values()),
        "vocabulary": checkpoint.config.vocab_size,
    }


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def write_random(family: str, shape: dict[str, int], out: Path, dtype: Any) -> Path:
    import torch
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    if out.is_dir():
        return out
    part = Path(f"{out}.part")
    shutil.rmtree(part, ignore_errors=True)
    torch.manual_seed(0)
    config: Any = MambaConfig(**shape, tie_word_embeddings=True)
    if family == "mamba2":
        heads = {"state_size": 128, "head_dim": 64, "num_heads": shape["hidden_size"] // 32, "n_groups": 1}
        config = Mamba2Config(**shape, **heads, tie_word_embeddings=True)
    with quiet():
        model = (Mamba2ForCausalLM if family == "mamba2" else MambaForCausalLM)(config).to(dtype)
        model.save_pretrained(part)
    write_tokenizer(part)
    part.rename(out)
    return out


def write_tokenizer(folder: Path) -> None:
    """As much of a byte-level tokenizer as llama.cpp insists on: the bytes' letters and one merge."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *letters, "ab"]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("a", "b")]))
    tokenizer.add_special_tokens(words[:1])
    tokenizer.save(str(folder / "tokenizer.json"))


def write_artifact(source: Path, out: Path, preset: str, vocabulary: bool | None) -> Path:
    """Quantized for speed only: two windows of random ids, no GPTQ and no search for clipping. Float parts: float16."""
    import dataclasses

    import torch

    import quamba
    from quamba.formats import open_checkpoint
    from quamba.recipe import Recipe

    if not out.is_dir():
        config = open_checkpoint(str(source)).config
        recipe = Recipe.find(preset, family=config.blocks[0]["mixer"])
        recipe = recipe.with_switches(embedding=vocabulary, lm_head=vocabulary, gptq=False)
        recipe = dataclasses.replace(recipe, clip="absmax", int4_vocabulary_from=0)
        ids = torch.randint(1, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
        with quiet():
            quamba.quantize(str(source), recipe, calibration=ids, out=out, dtype="float16")
    return out


def write_gguf_file(source: Path, folder: Path, kind: str) -> Path:
    import llama_reference

    out, full, part = folder / f"{kind}.gguf", folder / "float.gguf", folder / "part.gguf"
    if not out.exists():
        if not full.exists():
            llama_reference.write_gguf(str(source), part)
            part.rename(full)
        llama_reference.quantize_gguf(full, part, kind)
        part.rename(out)
    return out
