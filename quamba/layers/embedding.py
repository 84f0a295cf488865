"""Token embedding."""

import torch
from torch import Tensor, nn

import quamba_kernels as kernels


class Embedding(nn.Module):
    """weight `[V, D]`, float."""

    def __init__(self, vocabulary: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 `[B, L]` to `[B, L, D]`."""
        return kernels.embedding(ids, self.weight)
