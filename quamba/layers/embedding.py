"""Token embedding, float, int8 or int4."""

from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.layers.weight import WeightedModule
from quamba.plan import WeightSpec


class Embedding(WeightedModule):
    """weight `[V, D]` as in `quamba.layers.weight`. Integer rows come back as float32 reals."""

    def __init__(self, vocabulary: int, width: int, spec: WeightSpec = WeightSpec()):
        super().__init__()
        self.vocabulary, self.width = vocabulary, width
        self.hold_weight(spec, vocabulary, width)

    def reset_parameters(self) -> None:
        if self.spec.is_float:
            nn.init.normal_(self.weight, std=0.02)  # type: ignore[arg-type]

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 `[B, L]` to `[B, L, D]`."""
        if self.spec.is_float:
            return kernels.embedding(ids, self.weight)
        scale = self.row_scale(self.vocabulary)
        if self.spec.bits == 8:
            return kernels.embedding(ids, self.weight, scale)
        return kernels.embedding(ids, self.weight_packed, scale, self.weight_group_scale, self.width)
