"""The one flow from a float checkpoint to an artifact: block after block, one in memory at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quamba
import quamba_kernels as kernels
from quamba.config import QuambaConfig
from quamba.formats.artifact import ArtifactWriter, block_shard
from quamba.formats.card import copy_licence, quantized_card
from quamba.formats.checkpoint import Checkpoint
from quamba.formats.conversion import copy_generation_config
from quamba.formats.load import cast
from quamba.formats.run import RunFolder
from quamba.formats.tokenizer import copy_tokenizer
from quamba.mixers import MIXERS
from quamba.model import Block
from quamba.plan import BlockPlan, Plan
from quamba.quantizer.block import BlockQuantizer, gptq_weights
from quamba.quantizer.calibration import CalibrationSet
from quamba.quantizer.reorder import ChannelStatistic, reorder_mamba2, sort_and_cluster
from quamba.quantizer.rotate import fold_norms, rotate_online, rotate_residual
from quamba.quantizer.stream import Stream
from quamba.quantizer.vocabulary import embed, finish
from quamba.recipe import Recipe

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what is going on)."""

# A batch of calibration samples should keep a mixer's widest activation near this many elements.
BATCH_ELEMENTS = 1 << 21


def run_pipeline(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: CalibrationSet,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> None:
    """Quantize `checkpoint` into the folder `out`. Raises QuambaError; an interrupted run resumes when called again."""
    plan = dataclasses.replace(recipe.resolve(checkpoint.config), provenance=_provenance(checkpoint, calibration))
    config = checkpoint.config.with_plan(plan)
    config.tie_word_embeddings = config.tie_word_embeddings and not recipe.untie
    config.dtype = dtype or checkpoint.config.dtype
    with RunFolder(out, overwrite) as folder, torch.no_grad():
        job = _Job(checkpoint, recipe, plan, config, calibration.ids, folder, device or torch.device("cpu"), progress)
        job.run()
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder.path)
        copy_generation_config(checkpoint, folder.path)
        copy_licence(checkpoint, folder.path)
        quantized_card(config, checkpoint).write(folder.path)
        job.writer.finish()
        folder.finish()


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        plan: Plan,
        config: QuambaConfig,
        ids: Tensor,
        folder: RunFolder,
        device: torch.device,
        progress: Progress | None,
    ):
        self.checkpoint, self.recipe, self.plan, self.config = checkpoint, recipe, plan, config
        self.ids, self.folder, self.device = ids, folder, device
        self.progress = progress or (lambda done, total, text: None)
        self.writer = ArtifactWriter(folder.path, config)
        samples, seq_len = ids.shape
        widest = max(_widest_site(block, config.hidden_size) for block in config.blocks)
        self.batch = max(1, min(samples, BATCH_ELEMENTS // (seq_len * widest)))
        self.steps = -(-samples // self.batch)  # batches in one pass
        self.passes = [self._passes(block) for block in plan.blocks]
        self.done = 0  # batches, in all passes
        self.key = {
            "model": checkpoint.files.fingerprint(),
            "recipe": dataclasses.asdict(recipe),
            "plan": self.writer.metadata["quamba_digest"],
            "ids": plan.provenance["calibration"]["sha256"],
            "versions": [quamba.__version__, torch.__version__, torch.get_num_threads(), kernels.describe(device)],
        }
        self.key = json.loads(json.dumps(self.key))  # that is how it will be compared

    def stream(self, block: int) -> Stream:
        return Stream(self.folder.path, block, (*self.ids.shape, self.config.hidden_size), self.batch)

    def _passes(self, plan: BlockPlan) -> int:
        """How often a block reads the whole stream."""
        return 1 + self.recipe.reorder + len(gptq_weights(plan, self.recipe)) + (self.recipe.propagate == "quantized")

    def run(self) -> None:
        layers = self.config.num_hidden_layers
        finished = self.folder.resume(self.key)
        if finished < 0:
            self.folder.need(2 * self.stream(0).nbytes + self._model_bytes(), ", or fewer --samples")
            self._embedding()
            self.folder.mark(self.key, 0)
            finished = 0
        self.done = self.steps * sum(self.passes[:finished])
        for index in range(finished, layers):
            self._block(index)
            self.folder.mark(self.key, index + 1)
            self.stream(index).delete()
        self._head()

    def _each(self, block: int, text: str) -> Iterator[Tensor]:
        """The batches of the stream in front of a block, with progress."""
        total = self.steps * sum(self.passes)
        for batch in self.stream(block).batches():
            yield batch.to(self.device)
            self.done += 1
            self.progress(self.done, total, f"block {block + 1}/{self.config.num_hidden_layers}: {text}")

    def _model_bytes(self) -> int:
        from quamba.formats.artifact import expected_tensors

        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected_tensors(self.config).values()]
        return int(1.01 * sum(sizes)) + 1_000_000

    def _write(self, shard: str, tensors: dict[str, Tensor]) -> None:
        """Float tensors that may be rounded to the model's dtype are; scales stay as they are."""
        precise = {name for name in tensors if "scale" in name}
        self.writer.write(
            shard,
            {
                n: cast(t, self.config.dtype) if t.is_floating_point() and n not in precise else t
                for n, t in tensors.items()
            },
        )

    def _embedding(self) -> None:
        name = "backbone.embedding.weight"
        # The model will see the weights as they are stored.
        weight = cast(self.checkpoint.read([name])[name], self.config.dtype).float()
        ids = self.ids.split(self.batch)
        tensors, stream = embed(weight, self.plan, self.recipe, self.config.tie_word_embeddings, ids)
        self._write("embedding.safetensors", {f"backbone.embedding.{n}": t for n, t in tensors.items()})
        self.stream(0).write(stream)

    def _head(self) -> None:
        names = ["backbone.norm_f.weight"]
        if not self.config.tie_word_embeddings:
            names.append(
                "backbone.embedding.weight" if self.checkpoint.config.tie_word_embeddings else "lm_head.weight"
            )
        bias = self.checkpoint.read(["lm_head.bias"]) if self.config.head_bias else {}
        tensors = {name: tensor.float() for name, tensor in self.checkpoint.read(names).items()}
        norm, head = tensors.pop("backbone.norm_f.weight"), next(iter(tensors.values()), None)
        last = self.stream(self.config.num_hidden_layers)
        found = finish(norm, head, self.config.layer_norm_epsilon, self.plan, self.recipe, last.batches)
        self._write("head.safetensors", found | bias)

    def _block(self, index: int) -> None:
        layers, plan, after = self.config.num_hidden_layers, self.plan.blocks[index], self.stream(index + 1)
        quantized = self.recipe.propagate == "quantized"
        source = self._float_block(index)
        groups = {name: group for name, (group, _) in source.mixer.groupings(source.mixer.args).items()}
        if self.recipe.reorder:
            groups |= reorder(source, self._each(index, "sorting channels"))
        rotate_online(source, plan.rotations)  # last: out_proj's columns are channels no more
        job = BlockQuantizer(source, plan, self.recipe, index, groups)
        outputs = job.calibrate(self._each(index, "calibrating"))
        if quantized:
            for _ in outputs:
                pass
        else:
            after.write(outputs)
        target = Block(self.config, index, plan).to(self.config.dtype)
        source.to("cpu")
        job.round_to_nearest(target)
        target.to(self.device)
        for names in job.gptq_groups():
            job.gptq(target, names, self._each(index, f"GPTQ of {', '.join(names)}"))
        del job, source
        if quantized:
            after.write(target(batch) for batch in self._each(index, "quantized pass"))
        prefix = f"backbone.layers.{index}."
        self.writer.write(block_shard(index), {prefix + name: t for name, t in target.state_dict().items()})
        self.progress(self.done, self.steps * sum(self.passes), f"block {index + 1}/{layers}: written")

    def _float_block(self, index: int) -> Block:
        """One block in float32, norms folded, in the basis of the residual stream."""
        with torch.device("meta"):
            block = Block(self.config, index, BlockPlan())
        tensors = {name: tensor.float().clone() for name, tensor in self.checkpoint.block(index).items()}
        block.load_state_dict(tensors, strict=True, assign=True)
        block.requires_grad_(False)
        if self.recipe.fold_norm:
            fold_norms(block)
        if self.plan.hadamard is not None:
            rotate_residual(block, self.plan.hadamard)
        return block.to(self.device)


def reorder(block: Block, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sort the channels and cluster the heads of a float Mamba2 block, in place; the groups of its channels then."""
    args = block.mixer.args
    statistic = ChannelStatistic(args.intermediate_size)
    block.scales.observers["x"] = statistic.add
    for batch in batches:
        block(batch)
    block.scales.observers.clear()
    order = sort_and_cluster(statistic.value(), args.num_heads, args.head_dim, args.n_groups)
    block.mixer.load_state_dict(reorder_mamba2(block.mixer.state_dict(), order, args), strict=True)
    return {"x": order.groups, "state": order.groups}


def _widest_site(block: dict[str, Any], hidden_size: int) -> int:
    mixer = MIXERS[block["mixer"]]
    return max(mixer.site_widths(mixer.Args(**block["args"]), hidden_size).values())


def _provenance(checkpoint: Checkpoint, calibration: CalibrationSet) -> dict[str, Any]:
    return {
        "base_model": checkpoint.location.repo or checkpoint.location.name,
        "calibration": calibration.provenance,
        "quamba": quamba.__version__,
    }
