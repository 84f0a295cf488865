"""Mamba2's scan: state space duality (Dao & Gu 2024, arXiv 2405.21060): matrix products over chunks of tokens."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.rounding import real
from quamba_kernels.reference.state import check_state_scale, load_state, store_state

# Longer chunks cost more than they save on CPUs: work inside a chunk grows with its square.
MOST = 64


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    state: Tensor | None = None,
    state_scale: Tensor | None = None,
    mask: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 256,
    x_scale: Tensor | None = None,
    B_scale: Tensor | None = None,
    C_scale: Tensor | None = None,
) -> Tensor:
    check_state_scale(state, state_scale)
    x, B, C = (_real(v, scale) for v, scale in ((x, x_scale), (B, B_scale), (C, C_scale)))
    dt = F.softplus(dt.float() + dt_bias)
    if dt_limit != (0.0, math.inf):
        dt = dt.clamp(*dt_limit)
    if mask is not None:
        x, dt = x * mask[:, :, None, None], dt * mask[:, :, None]
    batch, length, heads, width = x.shape
    h = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else load_state(state, state_scale)
    step = min(chunk_size, length, MOST)
    scan = _token if step == 1 else _chunk
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for t in range(0, length, max(step, 1)):
        now = slice(t, t + step)
        y[:, now], h = scan(x[:, now] * dt[:, now, :, None], dt[:, now] * A, B[:, now], C[:, now], h)
    if state is not None and length > 0:
        store_state(h, state, state_scale)
    return y.addcmul_(x, (D if D.ndim == 2 else D[:, None]).expand(heads, width))


def _real(x: Tensor, scale: Tensor | None) -> Tensor:
    """float32 `[B, L, *, *]`; scale None, 0-d, or a vector over the last two axes together."""
    return real(x, scale if scale is None or scale.ndim == 0 else scale.view(x.shape[2:]))


def _token(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token by the recurrence (section 2, eq. 2): u = dt x `[B, 1, H, P]`, log_decay = dt A `[B, 1, H]`, B, C
    `[B, 1, G, N]`, h `[B, H, P, N]`. Returns y `[B, 1, H, P]` and the next h."""
    heads = u.shape[2] // B.shape[2]
    B, C = B[:, 0].repeat_interleave(heads, dim=1), C[:, 0].repeat_interleave(heads, dim=1)  # [B, H, N]
    h = (u[:, 0, :, :, None] * B[:, :, None]).addcmul_(log_decay[:, 0, :, None, None].exp(), h)
    return torch.matmul(h, C.unsqueeze(-1)).squeeze(-1).unsqueeze(1), h


def _chunk(u: Tensor, log_decay: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """T tokens at once (section 6, listing 1), shapes as in `_token` with T for 1. Heads of one group share B and C, and
    so stand side by side in the products with them: R heads a group, `[B, G, T, R*P]`."""
    batch, length, heads, width = u.shape
    groups, states = B.shape[2:]
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # [B, G, T, N]
    # float64, because decays between neighbours are differences of sums over the whole chunk.
    total = log_decay.double().transpose(1, 2).cumsum(-1)  # [B, H, T]

    # 1. Inside the chunk: y = (C Bᵀ ∘ L) u, where L[i, j] = exp(sum of log_decay over j+1..i), 0 above the diagonal.
    above = torch.ones(length, length, dtype=torch.bool, device=u.device).triu(1)
    L = (total[..., :, None] - total[..., None, :]).float().masked_fill_(above, -math.inf).exp_()  # [B, H, T, T]
    scores = C @ B.transpose(2, 3)  # [B, G, T, T]
    weights = L.unflatten(1, (groups, -1)).mul_(scores.unsqueeze(2)).flatten(1, 2)
    y = (weights @ u.transpose(1, 2)).transpose(1, 2)  # [B, T, H, P]

    # 2. From the state before the chunk: y += exp(total) C h.
    from_start = total.exp().float().transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    read = C @ h.reshape(batch, groups, heads // groups * width, states).transpose(2, 3)  # [B, G, T, R*P]
    y = y.addcmul(from_start, read.transpose(1, 2).reshape(batch, length, heads, width))

    # 3. The state after it: h = exp(total[T]) h + sum over tokens of exp(total[T] - total) u Bᵀ.
    to_end = (total[..., -1:] - total).exp().float().transpose(1, 2).unsqueeze(-1)  # [B, T, H, 1]
    inputs = (u * to_end).reshape(batch, length, groups, heads // groups * width).permute(0, 2, 3, 1)  # [B, G, R*P, T]
    added = (inputs @ B).reshape(batch, heads, width, states)
    return y, added.addcmul_(total[..., -1, None, None].exp().float(), h)
