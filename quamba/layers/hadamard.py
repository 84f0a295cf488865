"""Online Hadamard rotation in front of a linear whose weight was rotated to match."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.errors import QuambaError
from quamba.layers.sites import Output
from quamba.plan import Rotation
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

    def _rotate(self, x: Tensor, inv: Tensor | None = None, back: bool = False) -> Tensor:
        r = self.rotation
        if r is None:
            return x if inv is None else kernels.quantize(x, inv)
        if r.matrix in ("sylvester", "identity"):  # symmetric: its own inverse
            return kernels.hadamard(x, None, blocks=r.m, inv=inv)
        if x.device not in self._outer:
            self._outer[x.device] = outer_matrix(r.matrix).to(x.device)
        outer = self._outer[x.device]
        return kernels.hadamard(x, outer.T.contiguous() if back else outer, inv=inv)

    def forward(self, x: Tensor, out: Output):
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
