"""A checkpoint: somebody's files behind our names. Headers are checked against the architecture before bytes are read."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from quamba.config import QuambaConfig
from quamba.errors import CheckpointError, QuambaError
from quamba.formats import artifact, mamba_ssm, published, transformers
from quamba.formats.architecture import TIES
from quamba.formats.location import Location, locate
from quamba.formats.repairs import Repairs, count, some
from quamba.formats.tensors import LiveTensors, TensorFiles, Tensors, View, read_json
from quamba.plan import MULTIPLIER

HEAD, EMBEDDING = "lm_head.weight", "backbone.embedding.weight"
CONFIGS = ("config.json", "params.json")
_LAYOUTS: dict[str, Any] = {
    "quamba": artifact,
    "published quamba": published,
    "transformers": transformers,
    "mamba_ssm": mamba_ssm,
}
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+(?=(?:backbone|lm_head|embeddings?|layers|norm_f)\.)")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_BODY = re.compile(r"^(?:embeddings?|layers|norm_f)\.")
_MISUNDERSTOOD: tuple[type[Exception], ...] = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
_MISUNDERSTOOD += (MemoryError, RuntimeError, StrictDataclassError)  # the last one from transformers 5.14, say
_PRECISE = ("A_log", "mixer.D", "dt_bias", "dt_proj.bias")  # held in float32 whatever the model's dtype


@dataclass(frozen=True)
class Checkpoint:
    """`config`: the architecture (and plan) read from it, `config.dtype` its float dtype; `files`: its tensors by our
    names; `repairs`: what was put right."""

    location: Location
    layout: str
    config: QuambaConfig
    files: Tensors
    repairs: Repairs
    live: Any = None  # the model, if it is one in memory

    @property
    def folder(self) -> Path:
        return self.location.path

    @property
    def quantized(self) -> bool:
        return not self.config.plan.is_float

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by our names, memory-mapped; float ones are checked to be finite, integer group scales to be small enough
        for int8 products. Raises CheckpointError."""
        tensors = self.files.read(names)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not is_finite(tensor):
                raise CheckpointError(f"{self.location.name}: tensor {name} holds NaN or infinite values")
            if tensor.dtype == torch.int8 and name.endswith("weight_group_scale") and tensor.numel():
                low, high = map(int, tensor.aminmax())
                if low < -MULTIPLIER or high > MULTIPLIER:
                    raise CheckpointError(
                        f"{self.location.name}: tensor {name} holds {low} to {high}; at most {MULTIPLIER} in magnitude"
                    )
        return tensors

    def block(self, index: int) -> dict[str, Tensor]:
        """One block's tensors by their names inside the block."""
        prefix = f"backbone.layers.{index}."
        tensors = self.read(name for name in self.files.entries if name.startswith(prefix))
        return {name[len(prefix) :]: tensor for name, tensor in tensors.items()}


def open_checkpoint(
    model: str, *, strict: bool = False, exact: bool = False, verify: bool = False, **hub: Any
) -> Checkpoint:
    """Find and identify MODEL, and check names, shapes and integrity of its files. Raises CheckpointError.

    strict: refuse what needs repairs. exact: import int4 weights with two levels of scales as the int8 codes that they
    are multiplied as (see `quamba.formats.published`). verify: read every shard and check the hash recorded for it.
    """
    location = locate(model, **hub)
    config_file, data = _read_config(location)
    found = _identify(location, data, str(config_file), TensorFiles, exact)
    if strict:
        found.repairs.refuse()
    if verify:
        artifact.check_hashes(location.path)
    return found


def layout_of(model: str, **hub: Any) -> str | None:
    """The layout that MODEL's config belongs to, None if it is none of those that are read here. Raises CheckpointError."""
    return _matching(_read_config(locate(model, **hub))[1])


def _matching(data: dict[str, Any]) -> str | None:
    return next((name for name, layout in _LAYOUTS.items() if layout.matches(data)), None)


def _read_config(location: Location) -> tuple[Path, dict[str, Any]]:
    config_file = next((location.path / name for name in CONFIGS if (location.path / name).is_file()), None)
    if config_file is None:
        unfinished = (
            " (a quantization or conversion that was not finished?)" if location.path.name.endswith(".partial") else ""
        )
        raise CheckpointError(f"{location.path} has no config.json, so it is no model folder{unfinished}")
    if (location.path / "run.json").is_file():
        raise CheckpointError(
            f"{location.path} is a quantization or conversion that was not finished: run the same command to resume it"
        )
    return config_file, read_json(config_file)


def checkpoint_of(model: Any) -> Checkpoint:
    """A live float model (ours, transformers', mamba-ssm's) as a checkpoint. Raises CheckpointError."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "state_dict") or not (dataclasses.is_dataclass(config) or hasattr(config, "to_dict")):
        raise CheckpointError(
            f"can't quantize a {type(model).__name__}: give a name, a folder, or a live model of quamba's, "
            "transformers' or mamba-ssm's"
        )
    name = getattr(model, "name_or_path", "") or type(model).__name__
    data = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    data["dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    if transformers.matches(data) and "norm_groups" not in data:
        data |= transformers.live_facts(model)
    kind = f"the configuration of {type(model).__name__}"
    repo = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
    found = _identify(
        Location(Path(), Path(name).name, repo), data, kind, lambda *_: LiveTensors(model.state_dict()), False
    )
    return dataclasses.replace(found, live=model)


def _identify(location: Location, data: dict[str, Any], config_file: str, open_files: Any, exact: bool) -> Checkpoint:
    name = _matching(data)
    if name is None:
        kind = data.get("model_type") or data.get("architectures") or "no model_type"
        raise CheckpointError(
            f"{config_file} describes an architecture that isn't supported ({kind}); supported: Mamba1 and Mamba2 in "
            "mamba-ssm's or transformers' layout, FalconMamba, the published Quamba's, and quamba's own artifacts"
        )
    layout, repairs = _LAYOUTS[name], Repairs(location.name)
    files: Tensors = open_files(location.path, name == "quamba")
    if leftover := getattr(files, "leftover", ""):
        repairs.add(f"{leftover} is left over: there is a single file beside it", "transformers reads that one, too")
    if exact and not any(ours.endswith(".s_channel") for ours in files.entries):
        raise CheckpointError(
            f"{location.name} has no int4 weights with two levels of scales: nothing to import exactly"
        )
    try:
        if name == "quamba":
            config = layout.read_config(data)
        elif name == "published quamba":
            config, files = published.read(data, _unwrapped(data, files, repairs), repairs, exact)
        else:
            view = _our_names(layout, data, files, repairs)
            shapes = {ours: entry.shape for ours, entry in view.entries.items()}
            config, files = layout.read_config(data, shapes, repairs), view
    except _MISUNDERSTOOD as error:
        raise CheckpointError(f"{config_file} can't be understood: {type(error).__name__}: {error}") from error
    except QuambaError as error:
        raise CheckpointError(f"{config_file}: {error}") from error
    if not config.blocks:
        raise CheckpointError(f"{config_file} describes a model without layers")
    if name == "quamba":
        artifact.check_digests(config, location.name, files.metadata)
    _settle_head(location, data, config, files, repairs)
    if name != "quamba":
        config.dtype = _float_dtype(files, repairs)
    _check(location, config, files, repairs, exact=name == "quamba")
    return Checkpoint(location, name, config, files, repairs)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. Extremes carry NaN along, and need no temporary of the tensor's size."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in tensor.aminmax())


def _unwrapped(data: dict[str, Any], files: Tensors, repairs: Repairs) -> View:
    """The files' tensors without wrappers' prefixes, and with `backbone.` where only the body was saved."""
    view = View(files)
    plain = {theirs: _WRAPPERS.sub("", theirs) for theirs in files.entries}
    bare = not any(name.startswith("backbone.") for name in plain.values())
    for theirs, name in plain.items():
        if name != theirs and "dim" not in data:  # in Codestral's layout the prefix belongs there
            prefix = theirs.removesuffix(name)
            repairs.add(
                f"names begin with {prefix!r}, which is left out", "a wrapper's prefix; what follows is unchanged"
            )
        if bare and _BODY.match(name):
            name = f"backbone.{name}"
            repairs.add(
                "names lack the prefix backbone.", "only the body of the model was saved; its names are complete"
            )
        if name in view.entries:
            raise CheckpointError(f"{theirs} and {view.sources[name][0][0]} both stand for {name}")
        view.add(name, theirs)
    return view


def _our_names(layout: Any, data: dict[str, Any], files: Tensors, repairs: Repairs) -> View:
    """The files' tensors by our names."""
    view, files = View(files), _unwrapped(data, files, repairs)
    for name, ((theirs,), _) in files.sources.items():
        ours = layout.rename(name)
        if ours in view.entries:
            other = view.sources[ours][0][0]
            if not _equal(view.files, theirs, other):
                raise CheckpointError(f"{theirs} and {other} both stand for {ours}, and they differ")
            repairs.add(f"{theirs} and {other} both stand for {ours}; one is left out", "they are equal", ours)
            continue
        view.add(ours, theirs)
    return view


def _equal(files: Tensors, a: str, b: str) -> bool:
    if files.entries[a].shape != files.entries[b].shape:
        return False
    both = files.read([a, b])
    return torch.equal(both[a], both[b])


def _settle_head(
    location: Location, data: dict[str, Any], config: QuambaConfig, files: Tensors, repairs: Repairs
) -> None:
    """A tied head's copy is dropped; one that differs from the embedding is a head of its own or a contradiction."""
    if not config.tie_word_embeddings or HEAD not in files.entries or EMBEDDING not in files.entries:
        return
    same = _equal(files, HEAD, EMBEDDING)
    if not same and not all(is_finite(tensor) for tensor in files.read([HEAD, EMBEDDING]).values()):
        raise CheckpointError(f"{location.name}: head or embedding holds NaN or infinite values")
    said = {name: bool(data[name]) for name in TIES if data.get(name) is not None}
    if same:
        del files.entries[HEAD]
    elif said and all(said.values()):
        raise CheckpointError(
            f"{location.name}: the config says that head and embedding are tied, but lm_head.weight differs from the "
            "embedding; set tie_embeddings (tie_word_embeddings) to false in it if the head is its own"
        )
    else:
        config.tie_word_embeddings = False
    if len(set(said.values())) > 1:
        values = " and ".join(f"{name} = {value}" for name, value in said.items())
        repairs.add(
            f"the config has both {values}", f"the tensors are {'equal' if same else 'different'}", HEAD, EMBEDDING
        )
    elif not same:
        repairs.add("head and embedding are not tied, as would be usual", "the two tensors differ", HEAD, EMBEDDING)


def _float_dtype(files: Tensors, repairs: Repairs) -> torch.dtype:
    """The dtype to hold the model in: that of its matrices, the widest if they differ. What it rounds is told."""
    kinds: dict[torch.dtype, list[str]] = {}
    floats = {n: e for n, e in files.entries.items() if e.dtype.is_floating_point}
    floats = {n: e for n, e in floats.items() if not n.endswith("_scale") and ".scales." not in n}
    free = {n: e for n, e in floats.items() if not n.endswith(_PRECISE)}
    matrices = {n: e for n, e in free.items() if len(e.shape) > 1}
    for name, entry in (matrices or {n: e for n, e in free.items() if n == "backbone.norm_f.weight"}).items():
        kinds.setdefault(torch.float32 if entry.dtype == torch.float64 else entry.dtype, []).append(name)
    dtype = next(iter(kinds), torch.float32)
    if len(kinds) > 1:
        fewest = min(kinds.values(), key=len)
        said = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        repairs.add(
            f"tensors are stored as {said}; all are held in float32", "it holds every value of the others", *fewest
        )
        dtype = torch.float32
    for name, entry in floats.items():
        held = dtype if name in free else torch.float32
        if entry.dtype != held and (held != torch.float32 or entry.dtype == torch.float64):
            repairs.add(
                f"{str(entry.dtype).removeprefix('torch.')} is rounded to {str(held).removeprefix('torch.')}",
                "the matrices have no more digits" if held != torch.float32 else "no kernel here computes in more",
                name,
            )
    return dtype


def _check(location: Location, config: QuambaConfig, files: Tensors, repairs: Repairs, exact: bool) -> None:
    try:
        expected = artifact.expected_tensors(config)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{location.name}: config.json asks for an impossible model: {error}") from error
    except QuambaError as error:
        raise CheckpointError(f"{location.name}: config.json: {error}") from error
    missing, extra = sorted(expected.keys() - files.entries.keys()), sorted(files.entries.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{location.name}: {count(len(missing), 'tensor')} missing: {some(missing)}")
    strangers = [name for name in extra if exact or name.startswith("backbone.layers.")]
    if strangers:
        raise CheckpointError(
            f"{location.name}: {count(len(strangers), 'tensor')} not of this architecture: {some(strangers)}"
        )
    for name in extra:
        repairs.add("tensors that the architecture doesn't have are ignored", "no block could read them", name)
        del files.entries[name]
    for name, (shape, dtype) in expected.items():
        entry = files.entries[name]
        if entry.shape != shape:
            raise CheckpointError(
                f"{location.name}: {name} has shape {list(entry.shape)}; by config.json it should be {list(shape)}"
            )
        if entry.dtype.is_floating_point and entry.dtype not in _FLOATS:
            raise CheckpointError(f"{location.name}: {name} is stored as {entry.dtype}, in which nothing here computes")
        if (exact and entry.dtype != dtype) or entry.dtype.is_floating_point != dtype.is_floating_point:
            raise CheckpointError(f"{location.name}: {name} is stored as {entry.dtype}; expected {dtype}")
