"""From files to a model and back."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError, QuambaError
from quamba.formats.artifact import ArtifactWriter, block_shard
from quamba.formats.checkpoint import Checkpoint, checkpoint_of, is_finite, open_checkpoint

_HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# What transformers' Auto classes and pipelines pass along and this loader has no use for.
_IGNORED = (
    "config",
    "low_cpu_mem_usage",
    "use_safetensors",
    "trust_remote_code",
    "attn_implementation",
    "adapter_kwargs",
)


@torch.inference_mode(False)
def load_model(model: Any, *, dtype: Any = "auto", device: Any = None, device_map: Any = None, **kwargs: Any):
    """See `QuambaLMHeadModel.from_pretrained`. Tensors stay memory-mapped where dtype and device allow."""
    dtype = kwargs.pop("torch_dtype", dtype)
    checks = {key: bool(kwargs.pop(key)) for key in ("strict", "verify") if key in kwargs}
    hub = {key: kwargs.pop(key) for key in _HUB_KEYS if key in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if v is not None and k not in _IGNORED and not k.startswith("_")}
    if kwargs:
        raise TypeError(f"from_pretrained doesn't know {', '.join(sorted(kwargs))}")
    if isinstance(model, str | os.PathLike):
        checkpoint = open_checkpoint(str(model), **checks, **hub)
    else:
        checkpoint = checkpoint_of(model)
        if checks.get("strict"):
            checkpoint.repairs.refuse()
    checkpoint.repairs.tell()
    return build(checkpoint, as_dtype(dtype), as_device(device, device_map))


@torch.inference_mode(False)
def build(checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: torch.device | None = None):
    """The model of an open checkpoint; dtype of the float parts None: as stored. Its tensors are ordinary ones, whatever
    mode the caller is in."""
    from quamba.model import QuambaLMHeadModel

    config = checkpoint.config
    with torch.device("meta"):
        model = QuambaLMHeadModel(config)
    model.to(dtype or config.dtype)
    wanted = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    tensors = {name: cast(tensor, wanted[name]) for name, tensor in checkpoint.read(checkpoint.files.entries).items()}
    tensors |= {head: tensors[embedding] for head, embedding in model.tied.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    for head, embedding in model.tied.items():
        setattr(model.lm_head, head.removeprefix("lm_head."), model.get_parameter(embedding))
    config.dtype = dtype or config.dtype
    if checkpoint.live is None:
        model.generation_config = read_generation_config(checkpoint.folder) or model.generation_config
    elif getattr(checkpoint.live, "generation_config", None) is not None:
        model.generation_config = copy.deepcopy(checkpoint.live.generation_config)
    model.name_or_path = checkpoint.location.name
    model.eval()
    return model if device is None else model.to(device)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, or QuambaError if a value is too large for it."""
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if dtype == torch.float16 and not is_finite(result):
        raise QuambaError("weights of this model are too large for float16: use --dtype bfloat16 or float32")
    return result


def read_generation_config(folder: Path) -> Any:
    """What the folder's generation_config.json says, None without one. Raises CheckpointError."""
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"can't read {folder / 'generation_config.json'}: {error}") from error


def as_dtype(dtype: Any) -> torch.dtype | None:
    if dtype is None or dtype == "auto":
        return None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), dtype)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QuambaError(f"dtype can't be {dtype}: choose float32, float16, bfloat16 or auto")
    return dtype


def as_device(device: Any, device_map: Any) -> torch.device | None:
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise QuambaError("a model is loaded onto one device: device_map can't split it")
        device_map = device_map[""]
    choice = device if device is not None else device_map
    if choice == "auto":
        choice = "cuda" if torch.cuda.is_available() else "cpu"
    if choice is None:
        return None
    try:
        found = torch.device(choice)
        torch.empty(0, device=found)
        if found.type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        raise QuambaError(f"device {choice!r} can't be used here: {str(error).splitlines()[0]}") from error
    return found


def save_model(model, folder: str | os.PathLike, **kwargs: Any) -> None:
    """See `QuambaLMHeadModel.save_pretrained`. config.json goes first and comes last: nothing half-written loads."""
    if kwargs.pop("push_to_hub", False):
        raise QuambaError("save first, then model.push_to_hub(repo_id)")
    if not kwargs.pop("is_main_process", True):
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = model.backbone.norm_f.weight.dtype
    writer = ArtifactWriter(folder, config)
    state = model.state_dict()
    for name in model.tied:
        state.pop(name)
    shards: dict[str, dict[str, Tensor]] = {shard: {} for shard in writer.shards()}
    for name, tensor in state.items():
        shards[shard_of(name)][name] = tensor
    for shard, tensors in shards.items():
        writer.write(shard, tensors)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    writer.finish()


def shard_of(name: str) -> str:
    """Which shard a tensor belongs to."""
    if name.startswith("backbone.layers."):
        return block_shard(int(name.split(".")[2]))
    return "embedding.safetensors" if name.startswith("backbone.embedding.") else "head.safetensors"
