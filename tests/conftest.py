"""Shared fixtures: tiny random Mamba1 checkpoints in every layout, in milliseconds."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read with torch; threads that spin take other processes' time

import pytest
import torch
from torch import Tensor

from tests.forks import forks  # noqa: F401

torch.set_num_threads(2)


def pytest_collection_modifyitems(items):
    """Minutes in one test come first, so that at the end no process waits for another's."""
    items.sort(key=lambda item: item.path.parent.name != "triton")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Evaluations keep their answers away from the user's, and from those of tests beside these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


MAMBA_SSM_DEFAULTS = {"d_state": 16, "expand": 2, "d_conv": 4, "dt_rank": "auto", "conv_bias": True, "bias": False}


@dataclass(frozen=True)
class Shape:
    """A Mamba1 architecture. `vocab` is what the config says; tables have it rounded up to a multiple of `pad`."""

    vocab: int = 64
    pad: int = 8
    hidden: int = 32
    layers: int = 2
    d_state: int = 16
    expand: int = 2
    conv: int = 4
    dt_rank: int | str = "auto"
    conv_bias: bool = True
    bias: bool = False
    tied: bool = True

    @property
    def rows(self) -> int:
        return math.ceil(self.vocab / self.pad) * self.pad

    @property
    def inner(self) -> int:
        return self.expand * self.hidden

    @property
    def rank(self) -> int:
        return math.ceil(self.hidden / 16) if self.dt_rank == "auto" else int(self.dt_rank)


def random_tensors(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Float32 weights by mamba-ssm's names, of sizes that let every part of the model matter."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*size, generator=random) * std + mean

    inner, rank, states = shape.inner, shape.rank, shape.d_state
    tensors = {"backbone.embedding.weight": normal(shape.rows, shape.hidden)}
    for i in range(shape.layers):
        mixer = f"backbone.layers.{i}.mixer."
        tensors |= {
            f"backbone.layers.{i}.norm.weight": normal(shape.hidden, std=0.2, mean=1.0),
            mixer + "in_proj.weight": normal(2 * inner, shape.hidden, std=shape.hidden**-0.5),
            mixer + "conv1d.weight": normal(inner, 1, shape.conv, std=shape.conv**-0.5),
            mixer + "x_proj.weight": normal(rank + 2 * states, inner, std=inner**-0.5),
            mixer + "dt_proj.weight": normal(inner, rank, std=rank**-0.5),
            mixer + "dt_proj.bias": normal(inner, mean=-3.0),
            mixer + "A_log": torch.arange(1, states + 1).float().log() + normal(inner, states, std=0.1),
            mixer + "D": normal(inner, std=0.3, mean=1.0),
            mixer + "out_proj.weight": normal(shape.hidden, inner, std=inner**-0.5),
        }
        if shape.conv_bias:
            tensors[mixer + "conv1d.bias"] = normal(inner, std=0.3)
        if shape.bias:
            tensors[mixer + "in_proj.bias"] = normal(2 * inner, std=0.3)
            tensors[mixer + "out_proj.bias"] = normal(shape.hidden, std=0.3)
    tensors["backbone.norm_f.weight"] = normal(shape.hidden, std=0.2, mean=1.0)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    if not shape.tied:
        tensors["lm_head.weight"] = normal(shape.rows, shape.hidden, std=0.3)
    return tensors


def mamba_ssm_config(shape: Shape) -> dict:
    ssm = {"d_state": shape.d_state, "expand": shape.expand, "d_conv": shape.conv, "dt_rank": shape.dt_rank}
    ssm |= {"conv_bias": shape.conv_bias, "bias": shape.bias}
    return {
        "d_model": shape.hidden,
        "n_layer": shape.layers,
        "vocab_size": shape.vocab,
        "pad_vocab_size_multiple": shape.pad,
        "ssm_cfg": {key: value for key, value in ssm.items() if value != MAMBA_SSM_DEFAULTS[key]},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "tie_embeddings": shape.tied,
    }


def transformers_model(shape: Shape, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32):
    """transformers' own model holding these weights: the independent truth about logits."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=shape.rows,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        state_size=shape.d_state,
        expand=shape.expand,
        conv_kernel=shape.conv,
        time_step_rank=shape.rank,
        use_conv_bias=shape.conv_bias,
        use_bias=shape.bias,
        tie_word_embeddings=shape.tied,
    )
    model = MambaForCausalLM(config).to(dtype).eval()
    model.load_state_dict({name.replace("embedding.", "embeddings."): t for name, t in tensors.items()}, strict=True)
    return model.requires_grad_(False)


def write_mamba_ssm(
    folder: Path, shape: Shape, tensors: dict[str, Tensor], files: str = "bin", shards: int = 1
) -> None:
    """files: "bin" or "safetensors". A tied head stands in .bin files, as mamba-ssm writes them, not in safetensors."""
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(mamba_ssm_config(shape)))
    suffix = ".bin" if files == "bin" else ".safetensors"
    stem = "pytorch_model" if files == "bin" else "model"
    if files == "safetensors" and shape.tied:
        tensors = {key: t for key, t in tensors.items() if key != "lm_head.weight"}

    def write(path: Path, part: dict[str, Tensor]) -> None:
        torch.save(part, path) if files == "bin" else save_file(part, path)

    if shards == 1:
        write(folder / (stem + suffix), tensors)
        return
    index: dict[str, str] = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
        write(folder / file, part)
        index |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    (folder / f"{stem}{suffix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )


def copy_tokenizer(folder: Path) -> None:
    from quamba import bundled

    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(bundled.model_path("mamba1-nano") / file, folder / file)


def write_checkpoint(
    folder: Path,
    layout: str = "mamba_ssm",
    *,
    files: str = "bin",
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    seed: int = 0,
    **shape,
) -> Path:
    """A random checkpoint in `folder`; layout "mamba_ssm" (files "bin" or "safetensors") or "transformers"."""
    if tokenizer:
        shape.setdefault("vocab", 4096)
    wanted = Shape(**shape)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.to(dtype) for name, t in random_tensors(wanted, seed).items()}
    if wanted.tied:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
    if layout == "transformers":
        limit = 10**9 if shards == 1 else sum(t.nbytes for t in tensors.values()) // shards
        transformers_model(wanted, tensors, dtype).save_pretrained(folder, max_shard_size=limit)
    else:
        write_mamba_ssm(folder, wanted, tensors, files, shards)
    if tokenizer:
        copy_tokenizer(folder)
    return folder


Tiny = Callable[..., Path]


@pytest.fixture
def tiny(tmp_path: Path) -> Tiny:
    """`tiny("name", layout=..., **shape)` writes a random checkpoint into tmp_path/name and returns the folder."""

    def write(name: str = "tiny", layout: str = "mamba_ssm", **options) -> Path:
        return write_checkpoint(tmp_path / name, layout, **options)

    return write


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One float32 checkpoint with the bundled tokenizer, in mamba-ssm's layout. Only for reading."""
    return write_checkpoint(tmp_path_factory.mktemp("float") / "tiny", files="safetensors", tokenizer=True)


@pytest.fixture(scope="session")
def calibration_ids() -> Tensor:
    """Token ids below 64, for models without a tokenizer: `[5, 12]`."""
    return torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder: Path, calibration_ids: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_folder` quantized with the w8a8 preset. Only for reading."""
    import quamba

    out = tmp_path_factory.mktemp("artifact") / "tiny-w8a8"
    quamba.quantize(str(tiny_folder), "w8a8", out=out, calibration=calibration_ids)
    return out
