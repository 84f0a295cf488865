"""The ops in float64, as their definitions say and no faster (`quamba_kernels/__init__.py` names the equations).

All arguments are float64, masks bool.
"""

import torch
from torch import Tensor


def real(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """The value of floats, or of codes and their scale over the last axis."""
    return x.double() if scale is None else x.double() * scale.double()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.clamp(x, min=0) + torch.log1p(torch.exp(-x.abs()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, norm_before_gate: bool) -> Tensor:
    y = x if norm_before_gate else x * silu(z)
    g = y.unflatten(-1, (groups, -1))
    y = (g / torch.sqrt((g * g).mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    return y * silu(z) if norm_before_gate else y


def int4(packed: Tensor, group_scale: Tensor, inputs: int) -> Tensor:
    """`group_scale * q` [N, inputs], byte j of a group holding elements j and j + group/2."""
    groups = group_scale.shape[1]
    both = packed.long().unflatten(1, (groups, -1))
    nibbles = torch.cat([both & 15, both >> 4], -1)
    q = torch.where(nibbles > 7, nibbles - 16, nibbles)
    return (q.double() * group_scale.double().unsqueeze(-1)).flatten(1)[:, :inputs]


def sylvester(order: int, device: torch.device) -> Tensor:
    """H[i, j] = (-1)^(number of bits that i and j have in common)."""
    i = torch.arange(order, device=device)
    common, ones = i[:, None] & i[None, :], torch.zeros(order, order, dtype=torch.long, device=device)
    for bit in range(order.bit_length()):
        ones += (common >> bit) & 1
    return (1 - 2 * (ones % 2)).double()


def hadamard(x: Tensor, outer: Tensor | None, blocks: int) -> Tensor:
    order = 1 if outer is None else outer.shape[0]
    n = x.shape[-1] // blocks
    H = sylvester(n // order, x.device)
    if outer is not None:
        H = torch.kron(outer.contiguous(), H)
    return (x.unflatten(-1, (blocks, n)) @ H.T).flatten(-2) / n**0.5


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y `[B, L, C]` and the last K-1 tokens `[B, C, K-1]` of x `[B, L, C]` behind past `[B, C, K-1]`."""
    length, taps = x.shape[1], weight.shape[1]
    keep = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1).double()
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if past is None else past.transpose(1, 2)
    line = torch.cat([before, x * keep], 1)
    y = torch.zeros_like(x)
    for k in range(taps):
        y += line[:, k : k + length] * weight[:, k]
    return silu(y if bias is None else y + bias) * keep, line[:, length:].transpose(1, 2)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y `[B, L, I]` and the end `[B, I, N]`, token by token."""
    d = softplus(dt + dt_bias)
    if mask is not None:
        u, d = u * mask.unsqueeze(-1), d * mask.unsqueeze(-1)
    h = u.new_zeros(u.shape[0], *A.shape) if state is None else state
    y = torch.zeros_like(u)
    for t in range(u.shape[1]):
        h = torch.exp(d[:, t, :, None] * A) * h + (d[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        y[:, t] = (h * C[:, t, None, :]).sum(-1)
    return (y + D * u) * silu(z), h


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """y `[B, L, H, P]` and the end `[B, H, P, N]`, token by token."""
    d = softplus(dt + dt_bias).clamp(*dt_limit)
    if mask is not None:
        x, d = x * mask[..., None, None], d * mask.unsqueeze(-1)
    batch, length, heads, width = x.shape
    shared = heads // B.shape[2]
    h = x.new_zeros(batch, heads, width, B.shape[-1]) if state is None else state
    y = torch.zeros_like(x)
    for t in range(length):
        b, c = (v[:, t].repeat_interleave(shared, dim=1)[:, :, None, :] for v in (B, C))  # [B, H, 1, N]
        h = torch.exp(d[:, t] * A)[..., None, None] * h + (d[:, t, :, None] * x[:, t])[..., None] * b
        y[:, t] = (h * c).sum(-1)
    return y + (D if D.ndim == 2 else D[:, None]) * x, h
