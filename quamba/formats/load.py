"""From files to a model."""

from __future__ import annotations

import copy
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError, QuambaError
from quamba.formats.artifact import block_shard, digest
from quamba.formats.checkpoint import Checkpoint, checkpoint_of, is_finite, open_checkpoint
from quamba.plan import Plan

_HUB_KEYS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
# What transformers' Auto classes and pipelines pass along and this loader has no use for.
_IGNORED = ("low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "attn_implementation", "adapter_kwargs")
_ONE_DEVICE = "a model is loaded whole, onto one device: give device_map='cuda:0', or device='cuda:0'"
_REFUSED = {
    "max_memory": _ONE_DEVICE,
    "offload_folder": _ONE_DEVICE,
    "offload_buffers": _ONE_DEVICE,
    "tp_plan": _ONE_DEVICE,
    "distributed_config": _ONE_DEVICE,
    "state_dict": "load first, then call model.load_state_dict",
    "subfolder": "give the path of the folder itself",
    "variant": "an artifact has one set of files; load another dtype with dtype=",
    "gguf_file": "GGUF files aren't read",
    "key_mapping": "names are mapped by layout, see docs/formats.md",
    "ignore_mismatched_sizes": "every tensor must fit the architecture",
}
_WHOLE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_STRUCTURE = ("model_type", "architectures", "blocks", "layer_types", "quantization_config", "dtype")


@torch.inference_mode(False)
def load_model(
    model: Any,
    *,
    dtype: Any = "auto",
    device: Any = None,
    device_map: Any = None,
    config: Any = None,
    generation_config: Any = None,
    quantization_config: Any = None,
    output_loading_info: bool = False,
    **kwargs: Any,
):
    """See `QuambaLMHeadModel.from_pretrained`. Tensors stay memory-mapped where dtype and device allow."""
    dtype = kwargs.pop("torch_dtype", dtype)
    checks = {key: bool(kwargs.pop(key)) for key in ("strict", "verify") if key in kwargs}
    hub = {key: kwargs.pop(key) for key in _HUB_KEYS if key in kwargs}
    kwargs = {k: v for k, v in kwargs.items() if v not in (None, False, "") and not k.startswith("_")}
    for key, why in _REFUSED.items():
        if key in kwargs:
            raise QuambaError(f"from_pretrained can't take {key}: {why}")
    if unknown := sorted(kwargs.keys() - set(_IGNORED)):
        raise TypeError(f"from_pretrained doesn't know {', '.join(unknown)}")
    if isinstance(model, str | os.PathLike):
        checkpoint = open_checkpoint(str(model), **checks, **hub)
    else:
        checkpoint = checkpoint_of(model)
        if checks.get("strict"):
            checkpoint.repairs.refuse()
    _check_plan(checkpoint, quantization_config)
    take_settings(checkpoint.config, config, checkpoint.location.name)
    checkpoint.repairs.tell()
    found = build(checkpoint, as_dtype(dtype), as_device(device, device_map))
    if generation_config is not None:
        found.generation_config = copy.deepcopy(generation_config)
    if device_map is not None:
        found.hf_device_map = {"": found.device}  # pipelines leave a model that has one where it is
    if output_loading_info:  # a tensor that is missing or doesn't fit was an error
        nothing: set[str] = set()
        return found, {
            "missing_keys": nothing,
            "unexpected_keys": nothing,
            "mismatched_keys": nothing,
            "error_msgs": [],
        }
    return found


def _check_plan(checkpoint: Checkpoint, quantization_config: Any) -> None:
    """A `quantization_config` of the call may only repeat what the files say (lm-eval does that)."""
    if quantization_config is None:
        return
    data = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
    if "blocks" not in data or Plan.from_dict(data) != checkpoint.config.plan:
        raise QuambaError(
            "quantization_config quantizes transformers' own classes in place; "
            f"{checkpoint.location.name} is loaded as it is: quantize with quamba.quantize"
        )


def take_settings(config: QuambaConfig, given: Any, name: str) -> None:
    """Copy the run-time settings of a config passed to `from_pretrained`. QuambaError if it describes another model."""
    if given is None:
        return
    if not isinstance(given, QuambaConfig):
        raise QuambaError(f"config must be a QuambaConfig, not {type(given).__name__}")
    same = copy.deepcopy(given)
    same.dtype = config.dtype
    if digest(same) != digest(config):
        raise QuambaError(f"config= describes another model than the files of {name}")
    for key, value in given.to_dict().items():
        if key not in _STRUCTURE and hasattr(config, key):
            setattr(config, key, value)


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
    if checkpoint.live is None:
        place = checkpoint.location
        model.origin = dataclasses.replace(place, path=place.path.absolute())
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


def write_generation_config(config: Any, folder: Path) -> None:
    """As transformers writes it, without the checks that some of its versions make: what a model came with is passed on."""
    config.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])


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
        places = {str(place): place for place in device_map.values()}
        if len(places) != 1:
            raise QuambaError(f"device_map can't split a model over {', '.join(places)}: {_ONE_DEVICE}")
        device_map = next(iter(places.values()))
    choice = device if device is not None else device_map
    if choice in _WHOLE_MAPS:
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


def shard_of(name: str) -> str:
    """Which shard a tensor belongs to."""
    if name.startswith("backbone.layers."):
        return block_shard(int(name.split(".")[2]))
    return "embedding.safetensors" if name.startswith("backbone.embedding.") else "head.safetensors"
