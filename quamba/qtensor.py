"""QTensor: integer codes together with their scale. What flows between quantized pieces inside a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class QTensor:
    """int8 `values [..., C]`; float32 `scale`, so that `values * scale` is the real tensor.

    axis "tensor": scale 0-d; "channel": scale `[C]`; "token": scale `[..., 1]`. Not a tuple on purpose: code that
    unpacks tuples would drop the scale. Never crosses a block's boundary.
    """

    values: Tensor
    scale: Tensor
    axis: str

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dequantize(self) -> Tensor:
        """float32 reals."""
        return self.values.float() * self.scale

    def split(self, sizes: Sequence[int]) -> list[QTensor]:
        """Pieces along the last axis."""
        values = self.values.split(list(sizes), dim=-1)
        scales = self.scale.split(list(sizes)) if self.axis == "channel" else [self.scale] * len(sizes)
        return [QTensor(v, s, self.axis) for v, s in zip(values, scales, strict=True)]

    def with_unit_scale(self) -> QTensor:
        """The codes alone, for a consumer whose weight columns already hold the channel scales."""
        return QTensor(self.values, torch.ones((), device=self.values.device), "tensor")


def _unflatten(leaves: Iterable[Any], axis: Any) -> QTensor:
    values, scale = leaves
    return QTensor(values, scale, axis)


pytree.register_pytree_node(
    QTensor,
    lambda q: ([q.values, q.scale], q.axis),
    _unflatten,
    serialized_type_name="quamba.QTensor",
)
