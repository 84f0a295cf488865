"""Tensors that stay float32 whatever dtype the model is cast to."""

import torch
from torch import Tensor, nn


def _move_only(fn, tensor: Tensor) -> Tensor:
    """`fn(tensor)` as far as device goes, with the dtype kept."""
    probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
    if probe.dtype == tensor.dtype:
        return fn(tensor)
    return tensor.to(probe.device)


class PreciseModule(nn.Module):
    """A module that lists, in `precise`, the parameters and buffers which `.half()` and `.to(dtype)` must not round.

    Scales, `A_log`, `D` and the bias of dt are such: their errors are multiplied into everything that follows.
    """

    precise: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        # `.data`, because casting a parameter replaces its data in place.
        held = {name: getattr(self, name).data for name in self.precise if getattr(self, name, None) is not None}
        super()._apply(fn, recurse)
        for name, tensor in held.items():
            moved = _move_only(fn, tensor)
            if name in self._parameters:
                self._parameters[name] = nn.Parameter(moved, requires_grad=False)
            else:
                self._buffers[name] = moved
        return self


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without gradient: integer codes, or scales."""
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)
