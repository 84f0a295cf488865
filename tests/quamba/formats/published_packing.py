"""How the published format lays weights out in memory: int4 codes and scales in the order of its kernels. One statement a
formula, written from its description."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

INTERLEAVE = [0, 2, 4, 6, 1, 3, 5, 7]
GROUP = 128
COLUMNS = {"W8A8": 16, "W4A8": 64, "W4A16": 256}  # outputs are padded to a multiple of this


def permutation(precision: str) -> list[int]:
    """Where each of the 1024 codes of 16 x 64 tiles comes from."""
    perm = []
    for i in range(32):
        col = i // 4
        rows = [4 * (i % 4) + row for row in range(4)]
        if precision == "W4A16":
            rows = [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1]
        run = [16 * row + col + 8 * block for block in (0, 1) for row in rows]
        for j in range(4):
            perm += [entry + 256 * j for entry in run]
    return [perm[8 * run + k] for run in range(128) for k in INTERLEAVE]


def words(q: Tensor) -> Tensor:
    """Eight codes an int32, the first in the lowest bits."""
    total = sum(q[:, j::8].long() << (4 * j) for j in range(8))
    return torch.where(total >= 2**31, total - 2**32, total).int()


def pack(q: Tensor, precision: str) -> Tensor:
    """Codes [K, N] in [0, 15], N a multiple of 64, as int32 [K/16, 2N]."""
    k, n = q.shape
    tiles = q.reshape(k // 16, 16, n // 16, 16).permute(0, 2, 1, 3).reshape(-1, 1024)
    return words(tiles[:, permutation(precision)].reshape(k // 16, 16 * n))


def pack_embedding(q: Tensor) -> Tensor:
    """Codes [V, D] in [0, 15] as int32 [V, D/8]."""
    return words(q.reshape(len(q), -1, 8)[:, :, INTERLEAVE].reshape(q.shape))


def permute_group_scales(s: Tensor) -> Tensor:
    """`s_group` of W4A8 and `scale` of W4A16, [K/128, N], in runs of 64."""
    perm = [i + 8 * j for i in range(8) for j in range(8)]
    return s.reshape(-1, 64)[:, perm].reshape(s.shape)


def permute_channel_scales(s: Tensor) -> Tensor:
    """`s_channel` of W4A8, [1, N], in runs of 32."""
    perm = [2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)]
    return s.reshape(-1, 32)[:, perm].reshape(s.shape)


def f32(value: Tensor | float) -> float:
    return torch.as_tensor(value).float().item()


def scale_of(peak: Tensor) -> Tensor:
    """The float32 scale of every absolute maximum."""
    return (peak / 127).clamp(min=1e-6).float()


def codes8(w: Tensor) -> tuple[Tensor, float]:
    s = f32(w.abs().max().clamp(min=1e-5) / 127)
    return (w / s).round().clamp(-128, 127), s


def codes4(w: Tensor) -> tuple[Tensor, Tensor]:
    """w [N, K] as codes [K, N] and fp16-valued scales [K/128, N]."""
    groups = w.T.reshape(-1, GROUP, len(w))
    s = (2 * groups.abs().amax(1) / 15).half().double()
    u = ((groups / s[:, None]).round() + 8).clamp(0, 15)
    return u.reshape(w.T.shape), s


def columns(t: Tensor, precision: str, value: float = 0) -> Tensor:
    """Padding of the last dimension, the outputs."""
    return pad(t, (0, -t.shape[-1] % COLUMNS[precision]), value=value)
