"""How a module holds one weight: as its spec says, under the names that artifacts use.

| bits | tensors |
|---|---|
| 16 | `weight`, float |
| 8 | `weight` int8; `weight_scale` float32, `[out]` or one for all |
| 4 | `weight_packed` uint8; `weight_scale` float32 `[out]`; `weight_group_scale` `[out, groups]`, int8 or float16 |
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from quamba.layers.precise import PreciseModule, frozen
from quamba.plan import WeightSpec


class WeightedModule(PreciseModule):
    """A module with one weight `[out, ...]`; `spec` says how it is stored."""

    precise: tuple[str, ...] = ("weight_scale", "weight_group_scale")
    # None where the spec doesn't have them.
    weight: Tensor
    weight_packed: Tensor
    weight_scale: Tensor
    weight_group_scale: Tensor

    def hold_weight(self, spec: WeightSpec, *shape: int) -> None:
        """Make the tensors of a weight of this shape, uninitialised; those that its spec doesn't have are None."""
        self.spec = spec
        outputs, inputs = shape[0], shape[-1]
        tensors: dict[str, nn.Parameter] = {}
        if spec.is_float:
            tensors["weight"] = nn.Parameter(torch.empty(shape))
        elif spec.bits == 8:
            scales = () if spec.axis == "tensor" else (outputs,)
            tensors["weight"] = frozen(*shape, dtype=torch.int8)
            tensors["weight_scale"] = frozen(*scales, dtype=torch.float32)
        else:
            groups = -(-inputs // spec.group)
            kind = torch.int8 if spec.group_scale == "integer" else torch.float16
            tensors["weight_packed"] = frozen(outputs, groups * spec.group // 2, dtype=torch.uint8)
            tensors["weight_scale"] = frozen(outputs, dtype=torch.float32)
            tensors["weight_group_scale"] = frozen(outputs, groups, dtype=kind)
        for name in ("weight", "weight_packed", "weight_scale", "weight_group_scale"):
            self.register_parameter(name, tensors.get(name))

    def row_scale(self, outputs: int) -> Tensor:
        """`weight_scale` as float32 `[outputs]`."""
        return self.weight_scale if self.weight_scale.ndim else self.weight_scale.expand(outputs).contiguous()
