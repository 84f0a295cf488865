"""The parameterised pieces that mixers and models are made of. Precision travels with the tensors they are given."""

from quamba.layers.conv1d import CausalConv1d
from quamba.layers.embedding import Embedding
from quamba.layers.hadamard import Hadamard
from quamba.layers.linear import Linear
from quamba.layers.mlp import GatedMLP
from quamba.layers.norm import GatedRMSNorm, RMSNorm
from quamba.layers.precise import PreciseModule
from quamba.layers.sites import Output, Sites
from quamba.layers.weight import WeightedModule

__all__ = [
    "CausalConv1d",
    "Embedding",
    "GatedMLP",
    "GatedRMSNorm",
    "Hadamard",
    "Linear",
    "Output",
    "PreciseModule",
    "RMSNorm",
    "Sites",
    "WeightedModule",
]
