"""The published Quamba's stored weights, turned into ours: transposed int8, and int4 in the order of its GPU kernels.

Letters: K inputs, N outputs. Outputs are zero-padded to a multiple of 16 (int8), 64 (W4A8) or 256 (W4A16).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

import quamba_kernels as kernels

GROUP = 128
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring codes each nibble of a word holds, lowest nibble first."""


@cache
def _tile(precision: str) -> Tensor:
    """Where each of the 1024 codes of a tile of 16 inputs by 64 outputs stands: `packed[j] = tile[_tile[j]]`."""
    order: list[int] = []
    for i in range(32):
        if precision == "W4A8":
            rows = [4 * (i % 4) + r for r in range(4)]
        else:
            rows = [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1]
        eight = [16 * row + i // 4 + 8 * block for block in (0, 1) for row in rows]
        order += [entry + 256 * j for j in range(4) for entry in eight]
    return torch.tensor(order).view(-1, 8)[:, list(NIBBLES)].flatten()


_GROUP_SCALES = torch.tensor([i + 8 * j for i in range(8) for j in range(8)])
_CHANNEL_SCALES = torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])


def _unpermute(x: Tensor, order: Tensor) -> Tensor:
    """Undo `stored = x[order]` in runs along the last axis."""
    return x.reshape(-1, len(order))[:, torch.argsort(order)].reshape(x.shape)


def _nibbles(words: Tensor) -> Tensor:
    """int32 `[..., W]` to codes 0 .. 15, int8 `[..., 8 W]`, lowest nibble first; one at a time, as heads are large."""
    found = torch.empty(*words.shape, 8, dtype=torch.int8)
    for nibble in range(8):
        found[..., nibble] = (words >> 4 * nibble) & 15
    return found.flatten(-2)


def unpack(words: Tensor, precision: str) -> Tensor:
    """int32 `[K/16, 2N]` of precision W4A8 or W4A16 to codes int8 `[N, K]` in [-8, 7]."""
    inputs, outputs = words.shape[0] * 16, words.shape[1] // 2
    codes = _unpermute(_nibbles(words), _tile(precision)).view(inputs // 16, outputs // 16, 16, 16)
    return (codes.permute(0, 2, 1, 3).reshape(inputs, outputs).T - 8).contiguous()


def group_scales(scales: Tensor, outputs: int) -> Tensor:
    """`[K/128, N]` as stored to `[outputs, K/128]`."""
    return _unpermute(scales, _GROUP_SCALES).T[:outputs].contiguous()


def channel_scales(scales: Tensor, outputs: int) -> Tensor:
    """W4A8's `[1, N]` as stored to `[outputs]`."""
    return _unpermute(scales.flatten(), _CHANNEL_SCALES)[:outputs]


def repack(words: Tensor, precision: str, outputs: int) -> Tensor:
    """The stored words as our `weight_packed`, groups of 128."""
    return kernels.pack_int4(unpack(words, precision)[:outputs], GROUP)


def int8_codes(words: Tensor, scales: Tensor, outputs: int) -> Tensor:
    """What W4A8 multiplies by: `round(code * group scale)`, int8 `[outputs, K]`."""
    packed = repack(words, "W4A8", outputs)
    return kernels.expand_int4(packed, group_scales(scales, outputs), words.shape[0] * 16)


def embedding_codes(words: Tensor) -> Tensor:
    """int32 `[V, D/8]` of a 4-bit embedding to codes int8 `[V, D]`: nibble j of a word is its column NIBBLES[j]."""
    nibbles = _nibbles(words).view(words.shape[0], -1, 8)
    return nibbles[..., torch.argsort(torch.tensor(NIBBLES))].flatten(1) - 8
