"""Mamba1's selective scan: a chunk of discretised inputs at a time, then one fused multiply-add per token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.rounding import real
from quamba_kernels.reference.state import check_state_scale, load_state, store_state

# A chunk's [T, B, I, N] temporaries should stay in the last-level cache.
CHUNK_ELEMENTS = 1 << 18


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    mask: Tensor | None = None,
    u_scale: Tensor | None = None,
    z_scale: Tensor | None = None,
) -> Tensor:
    check_state_scale(state, state_scale)
    u, z, B, C = real(u, u_scale), real(z, z_scale), B.float(), C.float()
    dt = F.softplus(dt.float() + dt_bias)
    if mask is not None:
        u, dt = u * mask.unsqueeze(-1), dt * mask.unsqueeze(-1)
    batch, length, inner = u.shape
    h = u.new_zeros(batch, inner, A.shape[1]) if state is None else load_state(state, state_scale)
    y = torch.empty_like(u)
    step = max(1, min(64, CHUNK_ELEMENTS // max(1, batch * A.numel())))
    dt_t, dtu_t, B_t = dt.transpose(0, 1), (dt * u).transpose(0, 1), B.transpose(0, 1)  # token first
    for t in range(0, length, step):
        # 1. Discretise: decay exp(dt A) and input dt B u, both [T, B, I, N].
        decay = torch.exp(dt_t[t : t + step, :, :, None] * A)
        hs = dtu_t[t : t + step, :, :, None] * B_t[t : t + step, :, None, :]
        # 2. Recur in place: hs[i] becomes the state after token t + i.
        previous = h
        for now, a in zip(hs.unbind(0), decay.unbind(0), strict=True):
            previous = now.addcmul_(a, previous)
        h = previous
        # 3. Read out y = C h.
        c = C[:, t : t + step].transpose(0, 1).unsqueeze(-1)  # [T, B, N, 1]
        y[:, t : t + step] = torch.matmul(hs, c).squeeze(-1).transpose(0, 1)
    if state is not None and length > 0:
        store_state(h, state, state_scale)
    return (y + D * u) * F.silu(z)
