"""Transforms of one float block that preserve its function: folded norms, online rotations, a turned residual stream."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.layers import Hadamard, Linear
from quamba.mixers.mixer import scale_columns, turn_columns, turn_rows
from quamba.model import Block
from quamba.plan import Rotation


@torch.no_grad()
def fold_norms(block: Block) -> None:
    """Move the weights of the block's norms into the linears behind them."""
    block.mixer.fold_norm(block.norm.weight)
    block.norm.weight.fill_(1.0)
    if block.mlp is not None and block.norm2 is not None:
        scale_columns(block.mlp.fc1, block.norm2.weight)
        block.norm2.weight.fill_(1.0)


@torch.no_grad()
def rotate_online(block: Block, rotations: dict[str, Rotation]) -> None:
    """Switch the named online rotations on, and turn the weights behind them to match."""
    block.mixer.rotate(rotations)
    if block.mlp is not None and "fc2" in rotations:
        block.mlp.rotation = Hadamard(rotations["fc2"])
        turn_columns(block.mlp.fc2, block.mlp.rotation)


@torch.no_grad()
def rotate_residual(block: Block, rotation: Rotation) -> None:
    """Read from and write to a residual stream `x Hᵀ`. The norms must have been folded: H turns channels into others."""
    turn = Hadamard(rotation)
    block.mixer.rotate_residual(turn)
    if block.mlp is not None:
        turn_columns(block.mlp.fc1, turn)
        turn_rows(block.mlp.fc2, turn)


@torch.no_grad()
def rotate_rows(weight: Tensor, rotation: Rotation) -> Tensor:
    """An embedding or head `[V, D]` for the turned stream: every row `e Hᵀ`."""
    return Hadamard(rotation).rotate_weight(weight)


@torch.no_grad()
def fold_final_norm(head: Linear, weight: Tensor) -> None:
    """Move the final norm's weight into the head's columns; only where the head is not the embedding."""
    scale_columns(head, weight)
