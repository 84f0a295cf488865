"""One block on its way from float to integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from quamba.model import Block
from quamba.plan import BlockPlan
from quamba.qtensor import real
from quamba.quantizer.gptq import Hessian, gptq
from quamba.quantizer.observers import Observer
from quamba.quantizer.weights import quantize_weight
from quamba.recipe import Recipe
from quamba.state import LayerState


class BlockQuantizer:
    """`source`: the float block, folded and rotated; used up. `plan`: what it becomes. `groups`: the group of each channel
    at sites with scales by group."""

    def __init__(self, source: Block, plan: BlockPlan, recipe: Recipe, index: int, groups: dict[str, Tensor]):
        self.source, self.plan, self.recipe, self.groups = source, plan, recipe, groups
        self.index = index
        self.splits = source.mixer.splits(source.mixer.args)
        self.scales: dict[str, Tensor] = {}

    def gptq_groups(self) -> list[list[str]]:
        """Weights that GPTQ rounds, in the order they are used; those that read the same site share a Hessian."""
        groups: dict[str, list[str]] = {}
        for name, (_, site) in self.source.weights().items():
            if name in gptq_weights(self.plan, self.recipe):
                groups.setdefault(site, []).append(name)
        return list(groups.values())

    def calibrate(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yields the float block's outputs; static scales are found when the last one has been taken."""
        source, observers = self.source, {}
        for name, spec in self.plan.sites.items():
            if spec.scale == "static":
                observers[name] = Observer(
                    f"block {self.index}, {name}",
                    source.scales.widths[name],
                    spec,
                    self.recipe.observer_of(name),
                    index=self.groups.get(name),
                    depth=source.scales.depths.get(name, 1),
                    percentile=self.recipe.percentile,
                )
                source.scales.observers[name] = observers[name].add
        for batch in batches:
            state = None
            if "state" in observers:  # the only one that needs a state to look at
                state = LayerState(source.state_spec())
                state.allocate(batch.shape[0], batch.device)
            yield source(batch, state)
        source.scales.observers.clear()
        self.scales = {name: observer.scale() for name, observer in observers.items()}
        for names in self.recipe.shared:
            found = [name for name in names if name in self.scales]
            for name in found:
                self.scales[name] = torch.stack([self.scales[other] for other in found]).amax(0)

    def round_to_nearest(self, target: Block) -> None:
        """Fill `target`, built with the plan, with the source's weights and the scales."""
        source = self.source
        source.mixer.fold_scales(self.scales, self.plan)
        tensors: dict[str, Tensor] = {}
        for name, (place, _) in source.weights().items():
            spec, weight = self.plan.weight(name), source.get_parameter(f"{place}.weight")
            found: dict[str, Tensor] = {"weight": weight}
            if not spec.is_float:
                # What GPTQ rounds again needs no search now.
                clip = "absmax" if name in gptq_weights(self.plan, self.recipe) else self.recipe.clip
                found = quantize_weight(weight, spec, splits=self.splits.get(name), clip=clip)
            tensors |= {f"{place}.{suffix}": tensor for suffix, tensor in found.items()}
        for name, place in source.vectors().items():
            if not self.plan.weight(name).is_float:
                vector, spec = source.get_parameter(place), self.plan.weight(name)
                rows = vector.flatten()[:, None] if spec.axis == "split" else vector.flatten()[None]
                found = quantize_weight(rows, spec, splits=self.splits.get(name))
                tensors[place], tensors[f"{place}_scale"] = found["weight"].view_as(vector), found["weight_scale"]
        for name, scale in self.scales.items():
            tensors[f"scales.{name}"] = scale
            if self.plan.site(name).axis == "group":
                tensors[f"scales.{name}_group"] = self.groups[name]
        wanted = {name: tensor.dtype for name, tensor in target.state_dict().items()}
        floats = {name: tensor for name, tensor in source.state_dict().items() if name in wanted}
        tensors = {name: tensor.to(wanted[name]) for name, tensor in (floats | tensors).items()}
        target.load_state_dict(tensors, strict=True, assign=True)
        target.requires_grad_(False)

    def gptq(self, target: Block, names: list[str], batches: Iterable[Tensor]) -> None:
        """Round weights that read one site again, by GPTQ, for the inputs that they have in `target`."""
        places = {name: target.weights()[name][0] for name in names}
        first = target.get_submodule(places[names[0]])
        hessian = Hessian(self.source.get_parameter(f"{places[names[0]]}.weight").shape[1])
        for batch in batches:
            hessian.add(input_of(target, first, batch))
        options = self.recipe.gptq
        for name, place in places.items():
            found = gptq(
                self.source.get_parameter(f"{place}.weight"),
                self.plan.weight(name),
                hessian,
                splits=self.splits.get(name),
                clip=self.recipe.clip,
                damping=options.damping,
                act_order=options.act_order,
            )
            assign(target.get_submodule(place), found)


def gptq_weights(plan: BlockPlan, recipe: Recipe) -> set[str]:
    """Weights of a block that GPTQ rounds."""
    return {name for name in plan.weights if name in recipe.gptq.weights and not plan.weight(name).is_float}


def assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the values of a module's own parameters."""
    for name, tensor in tensors.items():
        module.get_parameter(name).data.copy_(tensor)


class _Reached(Exception):
    """Ends a forward pass where everything asked for has been seen."""


def input_of(block: Block, module: nn.Module, batch: Tensor) -> Tensor:
    """The real values, float `[B, L, in]`, that `module` inside `block` is given for a batch of the residual stream."""
    seen: list[Tensor] = []

    def look(_, args: tuple) -> None:
        seen.append(real(args[0]))
        raise _Reached

    handle = module.register_forward_pre_hook(look)
    try:
        block(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]
