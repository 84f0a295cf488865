"""A Linear of transformers' model with integer weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers import Linear
from quamba.plan import SiteSpec, WeightSpec
from quamba.qtensor import QTensor

WHY = "quamba's kernels are called through C, which the compiler can't look into; what is around them is compiled"


class InPlaceLinear(Linear):
    """`y = x Wᵀ + b` for float `x [..., in]`; y `[..., out]` in x's dtype. Without gradients.

    Tensors as in `quamba.layers.weight`. site: int8 with a scale a token, or float. loads_float: `weight` is there as
    well, float `[out, in]`, where a checkpoint's own tensor is looked for; `RoundToNearest` takes it away.
    """

    def __init__(
        self, inputs: int, outputs: int, bias: bool, spec: WeightSpec, site: SiteSpec, loads_float: bool = False
    ):
        super().__init__(inputs, outputs, bias, spec)
        self.site = site
        if loads_float:  # earlier transformers (5.17) cast what they read to this parameter's type, then round it
            self.register_parameter("weight", nn.Parameter(torch.empty(outputs, inputs), requires_grad=False))

    @property
    def in_features(self) -> int:
        return self.inputs

    @property
    def out_features(self) -> int:
        return self.outputs

    @torch.compiler.disable(reason=WHY)
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            given = x if self.site.is_float else QTensor(*kernels.quantize_per_token(x), "token")
            return super().forward(given).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, input {self.site}"
