"""The scans' recurrent state in memory: float32, float16, or int8 codes with a scale for each row."""

import torch
from torch import Tensor

from quamba_kernels.reference.rounding import quantize_per_token, real

HALF_MAX = torch.finfo(torch.float16).max


def check_state_scale(state: Tensor | None, state_scale: Tensor | None) -> None:
    """ValueError for a scale without int8 codes, and for these without a scale."""
    integer = state is not None and state.dtype == torch.int8
    if integer and state_scale is None:
        raise ValueError("state_scale: missing, and state is int8 codes")
    if state_scale is not None and not integer:
        raise ValueError("state_scale: belongs to int8 codes, and state is not")


def load_state(state: Tensor, state_scale: Tensor | None) -> Tensor:
    """The float32 state `[..., N]`: `state` itself when it is that, else new. state_scale `[...]`, of codes only."""
    return real(state, None if state_scale is None else state_scale.unsqueeze(-1))


def store_state(h: Tensor, state: Tensor, state_scale: Tensor | None) -> None:
    """Overwrite state, and state_scale, with float32 `h [..., N]`."""
    if state_scale is not None:
        codes, scale = quantize_per_token(h)
        state.copy_(codes)
        state_scale.copy_(scale.squeeze(-1))
    elif state.dtype == torch.float16:
        state.copy_(h.clamp(-HALF_MAX, HALF_MAX))
    else:
        state.copy_(h)
