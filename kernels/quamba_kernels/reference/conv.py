"""Depthwise causal convolution with SiLU, float or int8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quamba_kernels.reference.rounding import finish


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    mask: Tensor | None = None,
    x_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    inv: Tensor | None = None,
) -> Tensor:
    (batch, length, channels), taps = x.shape, weight.shape[1]
    if mask is not None:
        x = x * mask.unsqueeze(-1)
    past = x.new_zeros(batch, taps - 1, channels) if state is None else state.transpose(1, 2)
    window = torch.cat([past, x], dim=1)  # [B, K-1+L, C]
    if state is not None:
        state.copy_(window[:, length:].transpose(1, 2))

    integer = not x.is_floating_point()
    if not integer == (not weight.is_floating_point()) == (x_scale is not None) == (weight_scale is not None):
        raise TypeError("x and weight are both float, or both codes with their scales")
    window = window.to(torch.int32 if integer else torch.float32)
    w = weight.to(window.dtype)
    y = window[:, :length] * w[:, 0]
    for k in range(1, taps):
        y.addcmul_(window[:, k : k + length], w[:, k].expand_as(y))
    if weight_scale is not None and x_scale is not None:
        y = (y.float() * weight_scale) * x_scale
    if bias is not None:
        y = y + bias.float()
    y = F.silu(y)
    if mask is not None:
        y = y * mask.unsqueeze(-1)
    y = finish(y, inv)
    return y if integer or inv is not None else y.to(x.dtype)
