"""The gated MLP that some models have after a mixer (mamba-ssm's `GatedMLP`)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.errors import RecipeError
from quamba.layers.hadamard import Hadamard
from quamba.layers.linear import Linear
from quamba.layers.sites import Sites
from quamba.plan import BlockPlan, SiteSpec, WeightSpec
from quamba.qtensor import QTensor


class GatedMLP(nn.Module):
    """`fc2((a * silu(g)) Hᵀ)` with `a, g = split(fc1(x))`. fc1 `[2M, D]`, fc2 `[D, M]`, without biases."""

    reads: ClassVar = {"fc1": "mlp_in", "fc2": "fc2_in"}

    def __init__(self, width: int, inner: int, plan: BlockPlan):
        super().__init__()

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, False, plan.weight(name), not plan.site(self.reads[name]).is_float)

        self.fc1 = linear("fc1", width, 2 * inner)
        self.rotation = Hadamard(plan.rotations.get("fc2"))
        self.fc2 = linear("fc2", inner, width)

    @classmethod
    def check_recipe(cls, sites: dict[str, SiteSpec], weights: dict[str, WeightSpec]) -> None:
        """RecipeError where a combination of precisions has no arithmetic."""
        for name, site in cls.reads.items():
            spec = sites.get(site, SiteSpec())
            if spec.axis != "tensor":
                raise RecipeError(f"sites.{site}: the input of an integer linear needs axis: tensor, or scale: token")
            if not spec.is_float and weights.get(name, WeightSpec()).is_float:
                raise RecipeError(f"sites.{site} is integer, so weights.{name} must be, too")

    @staticmethod
    def site_widths(width: int, inner: int) -> dict[str, int]:
        return {"mlp_in": width, "fc2_in": inner}

    def forward(self, x: Tensor | QTensor, sites: Sites) -> Tensor:
        """x `[B, L, D]` to `[B, L, D]`."""
        a, gate = self.fc1(x).chunk(2, dim=-1)
        y = kernels.gate(a, gate)
        out = sites("fc2_in")
        return self.fc2(self.rotation(y if out.integer else y.to(a.dtype), out))
