"""Float weights to integers."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.model import Block


def round_to_nearest(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes in [-127, 127] and a float32 scale `[out]` for weight `[out, ...]`: absmax / 127 a row, half to even.

    A row of zeros gets scale 1, and no scale is so small that its inverse overflows.
    """
    rows = weight.float().flatten(1)
    absmax = rows.abs().amax(dim=1)
    scale = torch.where(absmax > 0, absmax / 127.0, torch.ones_like(absmax)).clamp(min=torch.finfo(torch.float32).tiny)
    codes = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return codes.view(weight.shape), scale


@torch.no_grad()
def quantize_block(source: Block, target: Block, scales: dict[str, Tensor]) -> None:
    """Fill `target` (built with a quantized plan) from `source` (float, already folded and rotated) and static scales.

    `source` is used up: scales that the family folds into weights are folded into its own.
    """
    source.mixer.fold_scales(scales, target.plan)
    tensors: dict[str, Tensor] = {}
    for name, module in target.named_modules():
        wanted = getattr(module, "spec", None)
        if wanted is None:
            continue
        weight = source.get_parameter(f"{name}.weight")
        if wanted.is_float:
            tensors[f"{name}.weight"] = weight
        else:
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = round_to_nearest(weight)
    for name, tensor in source.state_dict().items():
        tensors.setdefault(name, tensor)
    tensors |= {f"scales.{name}": scale for name, scale in scales.items()}
    kinds = {name: tensor.dtype for name, tensor in target.state_dict().items()}
    tensors = {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}
    target.load_state_dict(tensors, strict=True, assign=True)
    target.requires_grad_(False)
