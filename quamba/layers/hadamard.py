"""Online Hadamard rotation in front of a linear whose weight was rotated to match."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.errors import QuambaError
from quamba.layers.sites import Output
from quamba.plan import Rotation
from quamba.qtensor import QTensor
from quamba_kernels.hadamard_matrices import ORDERS, factor, outer_matrix


class Hadamard(nn.Module):
    """`y = x Hᵀ`, H orthogonal of order n as `rotation` says; None leaves x alone. Has no tensors of its own."""

    def __init__(self, rotation: Rotation | None):
        super().__init__()
        if rotation is not None:
            known = rotation.matrix in ("sylvester", "identity") or ORDERS.get(rotation.matrix) == rotation.m
            power = rotation.n // max(rotation.m, 1)
            if not known or rotation.m * power != rotation.n or power & (power - 1):
                raise QuambaError(
                    f"no rotation of width {rotation.n} = {rotation.m} * 2^k by {rotation.matrix!r} is known"
                )
        self.rotation = rotation
        self._outer: dict[torch.device, Tensor] = {}

    @staticmethod
    def plan(width: int) -> Rotation:
        """The rotation to record for a width; every width has one."""
        return Rotation(width, *factor(width))

    def _matrix(self, device: torch.device) -> tuple[Tensor | None, int]:
        """What kernels take: the outer matrix and the number of blocks."""
        r = self.rotation
        assert r is not None
        if r.matrix in ("sylvester", "identity"):
            return None, r.m
        if device not in self._outer:
            self._outer[device] = outer_matrix(r.matrix).to(device)
        return self._outer[device], 1

    def _rotate(self, x: Tensor, inv: Tensor | None = None, back: bool = False) -> Tensor:
        if self.rotation is None:
            return x if inv is None else kernels.quantize(x, inv)
        outer, blocks = self._matrix(x.device)
        if back and outer is not None:  # the others are symmetric: their own inverses
            outer = outer.T.contiguous()
        return kernels.hadamard(x, outer, blocks, inv)

    def forward(self, x: Tensor, out: Output):
        if self.rotation is not None and out.per_token:
            return QTensor(*kernels.hadamard_per_token(x, *self._matrix(x.device)), "token")
        return out.finish(self._rotate(x, out.inv))

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """`W Hᵀ`, so that `(x Hᵀ)(W Hᵀ)ᵀ = x Wᵀ`. Same dtype; computed in float32."""
        return self._rotate(weight.float()).to(weight.dtype)

    def turn(self, x: Tensor) -> Tensor:
        """`x Hᵀ` as a float tensor, outside any site: the residual stream on its way in."""
        return self._rotate(x)

    def turn_back(self, x: Tensor) -> Tensor:
        """`x H`, which undoes `turn`."""
        return self._rotate(x, back=True)
