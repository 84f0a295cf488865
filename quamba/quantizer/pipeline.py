"""The one flow from a float checkpoint to an artifact: block after block, one in memory at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quamba
import quamba_kernels as kernels
from quamba.config import QuambaConfig
from quamba.errors import QuambaError
from quamba.formats.artifact import ArtifactWriter, block_shard, write_atomically
from quamba.formats.checkpoint import Checkpoint
from quamba.formats.load import cast
from quamba.formats.tokenizer import copy_tokenizer
from quamba.mixers import MIXERS
from quamba.model import Block
from quamba.plan import BlockPlan, Plan
from quamba.quantizer.calibration import CalibrationSet
from quamba.quantizer.card import model_card
from quamba.quantizer.observers import Observer
from quamba.quantizer.run import RunFolder
from quamba.quantizer.stream import Stream
from quamba.quantizer.weights import quantize_block
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
    if checkpoint.quantized:
        raise QuambaError(f"{checkpoint.location.name} is quantized already; give the float model")
    plan = dataclasses.replace(recipe.resolve(checkpoint.config), provenance=_provenance(checkpoint, calibration))
    config = checkpoint.config.with_plan(plan)
    config.dtype = dtype or checkpoint.config.dtype
    with RunFolder(out, overwrite) as folder, torch.no_grad():
        job = _Job(checkpoint, recipe, plan, config, calibration.ids, folder, device or torch.device("cpu"), progress)
        job.run()
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder.path)
        _copy_generation_config(checkpoint, folder.path)
        write_atomically(folder.path / "README.md", model_card(config, plan, checkpoint).encode())
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

    def run(self) -> None:
        layers = self.config.num_hidden_layers
        done = self.folder.resume(self.key)
        if done < 0:
            self.folder.need(2 * self.stream(0).nbytes + self._model_bytes())
            self._embedding()
            self.folder.mark(self.key, 0)
            done = 0
        for index in range(done, layers):
            self._block(index)
            self.folder.mark(self.key, index + 1)
            self.stream(index).delete()
        head = ["backbone.norm_f.weight"] + ([] if self.config.tie_word_embeddings else ["lm_head.weight"])
        self.writer.write("head.safetensors", self._as_float(self.checkpoint.read(head)))

    def _model_bytes(self) -> int:
        from quamba.formats.artifact import expected_tensors

        sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in expected_tensors(self.config).values()]
        return int(1.01 * sum(sizes)) + 1_000_000

    def _as_float(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: cast(tensor, self.config.dtype) for name, tensor in tensors.items()}

    def _embedding(self) -> None:
        name = "backbone.embedding.weight"
        weight = self._as_float(self.checkpoint.read([name]))[name]
        self.writer.write("embedding.safetensors", {name: weight})
        self.stream(0).write(kernels.embedding(ids, weight) for ids in self.ids.split(self.batch))

    def _block(self, index: int) -> None:
        layers = self.config.num_hidden_layers
        plan = self.plan.blocks[index]
        before, after = self.stream(index), self.stream(index + 1)
        step, total = 2 * index * self.steps, 2 * layers * self.steps

        def each(batches, text: str):
            nonlocal step
            for batch in batches:
                yield batch.to(self.device)
                step += 1
                self.progress(step, total, f"block {index + 1}/{layers}: {text}")

        source = self._float_block(index, plan)
        observers = {
            name: Observer(f"block {index}, {name}", source.scales.widths[name], spec, self.recipe.observer)
            for name, spec in plan.sites.items()
            if spec.scale == "static"
        }

        def observe(name: str, value: Tensor) -> None:
            if name in observers:
                observers[name].add(value.cpu())

        source.scales.observer = observe
        outputs = (source(batch) for batch in each(before.batches(), "calibrating"))
        if self.recipe.propagate == "float":
            after.write(outputs)
        else:
            for _ in outputs:
                pass
        source.scales.observer = None
        scales = {name: observer.scale() for name, observer in observers.items()}

        target = Block(self.config, index, plan).to(self.config.dtype)
        quantize_block(source.to("cpu"), target, scales)
        del source
        target.to(self.device)
        if self.recipe.propagate == "quantized":
            after.write(target(batch) for batch in each(before.batches(), "quantized pass"))
        prefix = f"backbone.layers.{index}."
        self.writer.write(block_shard(index), {prefix + name: t for name, t in target.state_dict().items()})
        self.progress(2 * (index + 1) * self.steps, total, f"block {index + 1}/{layers}: written")

    def _float_block(self, index: int, plan: BlockPlan) -> Block:
        """One block in float32, with the recipe's function-preserving transforms applied."""
        with torch.device("meta"):
            block = Block(self.config, index, BlockPlan())
        tensors = {name: tensor.float().clone() for name, tensor in self.checkpoint.block(index).items()}
        block.load_state_dict(tensors, strict=True, assign=True)
        block.requires_grad_(False)
        if self.recipe.fold_norm:
            block.mixer.fold_norm(block.norm.weight)
            block.norm.weight.fill_(1.0)
        block.mixer.rotate(plan.rotations)
        return block.to(self.device)


def _widest_site(block: dict[str, Any], hidden_size: int) -> int:
    mixer = MIXERS[block["mixer"]]
    return max(mixer.site_widths(mixer.Args(**block["args"]), hidden_size).values())


def _provenance(checkpoint: Checkpoint, calibration: CalibrationSet) -> dict[str, Any]:
    return {
        "base_model": checkpoint.location.repo or checkpoint.location.name,
        "calibration": calibration.provenance,
        "quamba": quamba.__version__,
    }


def _copy_generation_config(checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.live is not None:
        if getattr(checkpoint.live, "generation_config", None) is not None:
            checkpoint.live.generation_config.save_pretrained(folder)
        return
    source = checkpoint.folder / "generation_config.json"
    if source.is_file():
        write_atomically(folder / "generation_config.json", source.read_bytes())
