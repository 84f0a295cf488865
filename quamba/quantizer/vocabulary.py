"""The ends of the model: the embedding before the blocks, final norm and head after them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from quamba.layers import Embedding, Hadamard, Linear, RMSNorm, Sites
from quamba.plan import Plan, WeightSpec
from quamba.qtensor import real
from quamba.quantizer.gptq import Hessian, gptq
from quamba.quantizer.observers import Observer
from quamba.quantizer.rotate import fold_final_norm, rotate_rows
from quamba.quantizer.weights import quantize_weight
from quamba.recipe import Recipe

Batches = Callable[[], Iterable[Tensor]]


def embed(
    weight: Tensor, plan: Plan, recipe: Recipe, tied: bool, ids: Iterable[Tensor]
) -> tuple[dict[str, Tensor], Iterable[Tensor]]:
    """The embedding's tensors, and the residual stream `[B, L, D]` it gives for batches of ids.

    weight: float32 `[V, D]`. Untied, it is turned with the residual stream; tied, the stream is turned after it.
    """
    if plan.hadamard is not None and not tied:
        weight = rotate_rows(weight, plan.hadamard)
    tensors = {"weight": weight}
    if not plan.embedding.is_float:
        tensors = quantize_weight(weight, plan.embedding, clip=recipe.clip)
    quantized = recipe.propagate == "quantized"
    module = Embedding(weight.shape[0], weight.shape[1], plan.embedding if quantized else WeightSpec())
    seen = tensors if quantized else {"weight": weight}
    module.load_state_dict(seen, strict=True, assign=True)
    turn = Hadamard(plan.hadamard if tied else None)
    return tensors, (turn.turn(module(batch)) for batch in ids)


def finish(
    norm: Tensor, head: Tensor | None, eps: float, plan: Plan, recipe: Recipe, stream: Batches
) -> dict[str, Tensor]:
    """Tensors of final norm, its site and the head, by their names in the model.

    norm: the final norm's weight; head: float32 `[V, D]`, or None where it is the embedding. stream: the residual stream
    after the last block, as often as it is asked for.
    """
    tied = head is None
    layer, turn = RMSNorm(len(norm), eps), Hadamard(plan.hadamard if tied else None)
    layer.weight.data = norm.clone()
    linear = None
    if head is not None:
        linear = Linear(head.shape[1], head.shape[0])
        linear.weight = torch.nn.Parameter(head.clone(), requires_grad=False)
        if plan.hadamard is not None:
            fold_final_norm(linear, norm)
            layer.weight.data.fill_(1.0)
            linear.weight.data = rotate_rows(linear.weight, plan.hadamard)
    tensors = {"backbone.norm_f.weight": layer.weight.data}
    width = {"head_in": len(norm)}
    sites = Sites(width, {"head_in": plan.final_norm})
    if plan.final_norm.scale == "static":
        observer = Observer(
            "head_in", len(norm), plan.final_norm, recipe.observer_of("head_in"), percentile=recipe.percentile
        )
        for batch in stream():
            observer.add(layer(turn.turn_back(batch), Sites(width, {})("head_in")))
        tensors["backbone.scales.head_in"] = observer.scale()
        sites.load_state_dict({"head_in": observer.scale()})
    if linear is not None:
        found = {"weight": linear.weight.data}
        if not plan.lm_head.is_float and "lm_head" in recipe.gptq.weights:
            hessian = Hessian(head.shape[1])  # type: ignore[union-attr]
            for batch in stream():
                hessian.add(real(layer(batch, sites("head_in"))))
            options = recipe.gptq
            found = gptq(
                linear.weight.data,
                plan.lm_head,
                hessian,
                clip=recipe.clip,
                damping=options.damping,
                act_order=options.act_order,
            )
        elif not plan.lm_head.is_float:
            found = quantize_weight(linear.weight.data, plan.lm_head, clip=recipe.clip)
        tensors |= {f"lm_head.{name}": tensor for name, tensor in found.items()}
    return tensors
