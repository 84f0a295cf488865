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

    def split(self, sizes: Sequence[int], dim: int = -1) -> list[QTensor]:
        """Pieces along the last axis, the only one that can be cut."""
        assert dim == -1
        values = self.values.split(list(sizes), dim=-1)
        scales = self.scale.split(list(sizes)) if self.axis == "channel" else [self.scale] * len(sizes)
        return [QTensor(v, s, self.axis) for v, s in zip(values, scales, strict=True)]

    def with_unit_scale(self) -> QTensor:
        """The codes alone, for a consumer whose weight columns already hold the channel scales."""
        return QTensor(self.values, torch.ones((), dtype=torch.float32, device=self.values.device), "tensor")


def parts(x: Tensor | QTensor) -> tuple[Tensor, Tensor | None]:
    """What kernels take: codes and their scale, or a float tensor and None."""
    return (x.values, x.scale) if isinstance(x, QTensor) else (x, None)


def real(x: Tensor | QTensor) -> Tensor:
    """The float tensor that `x` stands for."""
    return x.dequantize() if isinstance(x, QTensor) else x


def _unflatten(leaves: Iterable[Any], axis: Any) -> QTensor:
    values, scale = leaves
    return QTensor(values, scale, axis)


pytree.register_pytree_node(
    QTensor,
    lambda q: ([q.values, q.scale], q.axis),
    _unflatten,
    serialized_type_name="quamba.QTensor",
)
