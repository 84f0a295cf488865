"""Checkpoints that the published Quamba code wrote, read as ours: each component's precision from its own tensors.

Its config names one class for all norms, and one for all heads; what a norm or a head is, its tensors tell. Scales that it
keeps twice must agree; one that is missing is taken from its twin, else a projection's input is scaled per token, and
anything else is refused. Nothing is made up. `packed` has the weights' own layouts.
"""

from __future__ import annotations

import re
from typing import Any

import torch

import quamba_kernels as kernels
from quamba.config import QuambaConfig
from quamba.formats.published import packed
from quamba.formats.published.block import PublishedBlock
from quamba.formats.published.source import Source, input_scale
from quamba.formats.repairs import Repairs
from quamba.formats.tensors import Tensors, View
from quamba.plan import Plan, SiteSpec, WeightSpec

_CLASS = re.compile(r"W(4A8|4A16|8A8)QMamba2?")


def matches(config: dict[str, Any]) -> bool:
    layer = (config.get("ssm_cfg") or {}).get("layer") if isinstance(config.get("ssm_cfg"), dict) else None
    return bool(_CLASS.fullmatch(layer) if isinstance(layer, str) else config.get("is_hybrid")) or "norm_cfg" in config


def read(config: dict[str, Any], files: Tensors, repairs: Repairs, exact: bool) -> tuple[QuambaConfig, View]:
    """Architecture with plan, and the tensors that it asks for. Raises CheckpointError.

    exact: two-level int4 weights become the int8 codes that they are multiplied as, at twice the size.
    """
    view = View(files)
    source = Source(files, view, repairs, exact)
    layers = 1 + max(int(m[1]) for m in (re.match(r"backbone\.layers\.(\d{1,6})\.", n) for n in files.entries) if m)
    ssm = {key: value for key, value in (config.get("ssm_cfg") or {}).items() if key != "layer"}
    hidden = source.entry("backbone.norm_f.weight").shape[0]
    blocks, plans = [], []
    for i in range(layers):
        entry, block_plan = PublishedBlock(source, i, hidden, ssm).read()
        blocks.append(entry)
        plans.append(block_plan)
    vocabulary, embedding = _embedding(source)
    final_norm, lm_head = _head(source, vocabulary, hidden)
    found = QuambaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        blocks=blocks,
        residual_in_fp32=config.get("residual_in_fp32", True),
        tie_word_embeddings=False,
        head_bias="lm_head.bias" in files.entries,
    )
    plan = Plan(tuple(plans), embedding, final_norm, lm_head, recipe="published quamba", provenance={"imported": True})
    source.warn_of_strangers()
    return found.with_plan(plan), view


def _embedding(source: Source) -> tuple[int, WeightSpec]:
    name = "backbone.embedding"
    weight = source.entry(f"{name}.weight")
    rows, width = weight.shape
    if weight.dtype.is_floating_point:
        source.copy(f"{name}.weight", f"{name}.weight")
        return rows, WeightSpec()
    if weight.dtype == torch.int8:
        source.copy(f"{name}.weight", f"{name}.weight")
        source.make(f"{name}.weight_scale", (rows,), torch.float32, lambda s: s, f"{name}.scales")
        return rows, WeightSpec(8)
    inputs, group = width * 8, 32
    pack = lambda words: kernels.pack_int4(packed.embedding_codes(words), group)  # noqa: E731
    groups = -(-inputs // group)
    source.make(f"{name}.weight_packed", (rows, groups * group // 2), torch.uint8, pack, f"{name}.weight")
    source.make(f"{name}.weight_scale", (rows,), torch.float32, lambda s: s, f"{name}.scales")
    source.constant(f"{name}.weight_group_scale", torch.ones(rows, groups, dtype=torch.int8))
    return rows, WeightSpec(4, group=group)


def _head(source: Source, vocabulary: int, hidden: int) -> tuple[SiteSpec, WeightSpec]:
    """Final norm and head: integers between them if the head multiplies integers, and only then."""
    source.copy("backbone.norm_f.weight", "backbone.norm_f.weight")
    if source.has("lm_head.bias"):
        source.copy("lm_head.bias", "lm_head.bias")
    spec = source.linear("lm_head", "lm_head", vocabulary)
    integer = source.has("lm_head.a") or source.has("lm_head.s_channel")
    norm = "backbone.norm_f.output_scale"
    if not integer:
        if source.has(norm):
            source.entry(norm)
            source.repairs.add("the final norm has a scale that nothing uses", "the head takes floats", norm)
        return SiteSpec(), spec
    return input_scale(source, norm, "backbone.scales.head_in", "lm_head"), spec
