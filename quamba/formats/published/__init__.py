"""Checkpoints that the published Quamba code wrote, read as ours: each component's precision from its own tensors.

Its config names one class for all norms, and one for all heads; what a norm or a head is, its tensors tell, and a config
that says otherwise is a repair. Sizes are settled as for float checkpoints: config and tensors must agree. Scales that the
file keeps twice must agree, too; one that is missing is taken from its twin, else a projection's input is scaled per token,
and anything else is refused. Nothing is made up. `packed` has the weights' own layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

import quamba_kernels as kernels
from quamba.config import QuambaConfig
from quamba.errors import CheckpointError
from quamba.formats.architecture import TIES, settle_architecture
from quamba.formats.mamba_ssm import check_supported
from quamba.formats.published import packed
from quamba.formats.published.block import PublishedBlock, input_site
from quamba.formats.published.linear import INTEGER, precision, read_linear
from quamba.formats.published.source import FLOAT, Source
from quamba.formats.repairs import Repairs
from quamba.formats.tensors import Tensors, View
from quamba.plan import Plan, SiteSpec, WeightSpec

_CLASS = re.compile(r"(W4A8|W4A16|W8A8)QMamba(2?)")
_DEFAULTS = {"native": True, "tied": False, "pad_vocab_size_multiple": 8, "n_groups": 1, "state_size": 128}
EMBEDDING, HEAD, NORM = "backbone.embedding", "lm_head", "backbone.norm_f"


def matches(config: dict[str, Any]) -> bool:
    ssm = config.get("ssm_cfg")
    layer = ssm.get("layer") if isinstance(ssm, dict) else None
    return "norm_cfg" in config or isinstance(layer, list) or bool(_CLASS.fullmatch(str(layer)))


def read(config: dict[str, Any], files: Tensors, repairs: Repairs, exact: bool) -> tuple[QuambaConfig, View]:
    """Architecture with plan, and the tensors that it asks for. Raises CheckpointError.

    exact: two-level int4 weights become the int8 codes that they are multiplied as, at twice the size.
    """
    view = View(files)
    source = Source(files, view, repairs, exact)
    numbers = {int(m[1]) for m in (re.match(r"backbone\.layers\.(\d{1,6})\.", name) for name in files.entries) if m}
    blocks = [PublishedBlock(source, index) for index in sorted(numbers)]
    found = _architecture(config, source, blocks, repairs)
    vocabulary, hidden = found.vocab_size, found.hidden_size
    embedding = _embedding(source, vocabulary, hidden)
    plans = tuple(block.read(entry["args"], hidden) for block, entry in zip(blocks, found.blocks, strict=True))
    final_norm, lm_head = _head(source, vocabulary, hidden)
    plan = Plan(plans, embedding, final_norm, lm_head, recipe="published quamba", provenance={"imported": True})
    for claim, said, real in _claims(config, source, blocks):
        if said not in (None, real):
            repairs.add(f"the config has {claim} = {said}; the tensors are of {real}", "a part is what its tensors are")
    source.check_strangers()
    return found.with_plan(plan), view


def _architecture(
    config: dict[str, Any], source: Source, blocks: list[PublishedBlock], repairs: Repairs
) -> QuambaConfig:
    """The config's sizes held against the tensors', by the rules of mamba-ssm's layout."""
    ssm = dict(config.get("ssm_cfg") or {})
    layers = ssm.get("layer")
    if isinstance(layers, list) and len(layers) != len(blocks):
        raise CheckpointError(
            f"config and tensors contradict each other: by the config {len(layers)} layers, by the tensors {len(blocks)}"
        )
    families = {f"Mamba{match[2] or 1}" for match in map(_CLASS.fullmatch, _classes(layers, len(blocks))) if match}
    if len(families) == 1:
        ssm["layer"] = families.pop()
    else:
        ssm.pop("layer", None)
    check_supported(config, ssm)
    shapes = {"lm_head.weight": (), "backbone.embedding.weight": _table(source)}
    if source.has("lm_head.bias"):
        shapes["lm_head.bias"] = ()
    for block in blocks:
        shapes |= block.shapes(shapes["backbone.embedding.weight"][1])
    plain = {key: value for key, value in config.items() if key not in TIES} | {"ssm_cfg": ssm}
    if not families and "layer" not in ssm and blocks and not blocks[0].mamba1:
        ssm["layer"] = "Mamba2"
    for key in TIES:
        if config.get(key):
            repairs.add(f"the config has {key} = {config[key]}; the head is its own", "the format has no tied head")
    return settle_architecture(plain | {"tie_embeddings": False}, shapes, _DEFAULTS, repairs)


def _classes(layers: Any, count: int) -> list[str]:
    """The class that the config names for each layer."""
    if not isinstance(layers, list):
        return [str(layers)] * count
    return [str(next(iter(layer.values()), "")) if isinstance(layer, dict) else str(layer) for layer in layers]


def _claims(config: dict[str, Any], source: Source, blocks: list[PublishedBlock]) -> Iterator[tuple[str, Any, str]]:
    """(key, what the config says, what the tensors are) for classes of the published code."""
    layers = (config.get("ssm_cfg") or {}).get("layer")
    if layers is not None:
        for block, said in zip(blocks, _classes(layers, len(blocks)), strict=True):
            family = "QMamba" if block.mamba1 else "QMamba2"
            yield "ssm_cfg.layer", said, f"{block.precision}{family}"
    for key, real in (("embedding_cfg", _embedding_class(source)), ("lm_head_cfg", _head_class(source))):
        told = config.get(key)
        yield f"{key}.layer", told.get("layer") if isinstance(told, dict) else None, real
    norm = config.get("norm_cfg")
    if isinstance(norm, dict) and isinstance(norm.get("norm"), str) and blocks:
        yield "norm_cfg.norm", norm["norm"], "QRMSNorm" if blocks[0].precision in INTEGER else "RMSNorm"


def _embedding_class(source: Source) -> str:
    dtype = source.entry(f"{EMBEDDING}.weight").dtype
    return {torch.int8: "W8O16Embedding", torch.int32: "W4O16Embedding"}.get(dtype, "Embedding")


def _head_class(source: Source) -> str:
    kind = precision(source, HEAD)
    return "Linear" if kind == "float" else f"{kind}B16O16Linear"


def _table(source: Source) -> tuple[int, int]:
    """Rows and width of the embedding."""
    entry = source.entry(f"{EMBEDDING}.weight")
    if len(entry.shape) != 2 or not all(entry.shape):
        raise CheckpointError(f"{EMBEDDING}.weight has the impossible shape {list(entry.shape)}")
    return entry.shape[0], entry.shape[1] * (8 if entry.dtype == torch.int32 else 1)


def _embedding(source: Source, rows: int, width: int) -> WeightSpec:
    kind, group = _embedding_class(source), 32
    name = f"{EMBEDDING}.weight"
    if kind == "Embedding":
        source.copy(name, name, rows, width)
        return WeightSpec()
    source.expect(f"{EMBEDDING}.scales", FLOAT, rows)
    source.make(f"{name}_scale", (rows,), torch.float32, lambda s: s, f"{EMBEDDING}.scales")
    if kind == "W8O16Embedding":
        source.expect(name, torch.int8, rows, width)
        source.make(name, (rows, width), torch.int8, lambda w: w, name)
        return WeightSpec(8)
    pack = lambda words: kernels.pack_int4(packed.embedding_codes(words), group)  # noqa: E731
    groups = -(-width // group)
    source.make(f"{name}_packed", (rows, groups * group // 2), torch.uint8, pack, name)
    source.constant(f"{name}_group_scale", torch.ones(rows, groups, dtype=torch.int8))
    return WeightSpec(4, group=group)


def _head(source: Source, vocabulary: int, hidden: int) -> tuple[SiteSpec, WeightSpec]:
    """Final norm and head: integers between them if the head multiplies integers, and only then."""
    source.copy(f"{NORM}.weight", f"{NORM}.weight", hidden)
    if source.has(f"{HEAD}.bias"):
        source.copy(f"{HEAD}.bias", f"{HEAD}.bias", vocabulary)
    spec = read_linear(source, HEAD, HEAD, hidden, vocabulary)
    site = input_site(source, f"{NORM}.output_scale", "backbone.scales.head_in", HEAD)
    return site, spec
