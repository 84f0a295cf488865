"""Tensors that stay float32 whatever dtype the model is cast to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quamba.plan import WeightSpec


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

    def add_vector(
        self,
        name: str,
        shape: tuple[int, ...],
        spec: WeightSpec = WeightSpec(),
        make: Callable[..., Tensor] = torch.empty,
        precise: bool = True,
    ) -> None:
        """A small parameter that isn't multiplied as a matrix: float, or int8 codes with `<name>_scale`: one, or
        (axis split) one an entry."""
        if spec.is_float:
            dtype = torch.float32 if precise else None  # else torch's default, which from_config changes
            self.register_parameter(name, nn.Parameter(make(shape, dtype=dtype)))
            self.precise = (*self.precise, name) if precise else self.precise
        else:
            self.register_parameter(name, frozen(*shape, dtype=torch.int8))
            scales = () if spec.axis == "tensor" else shape
            self.register_parameter(f"{name}_scale", frozen(*scales, dtype=torch.float32))
            self.precise = (*self.precise, f"{name}_scale")

    def vector(self, name: str) -> Tensor:
        """The value of such a parameter, float."""
        codes = self.get_parameter(name)
        return codes if codes.is_floating_point() else codes.float() * self.get_parameter(f"{name}_scale")


def frozen(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter without gradient: integer codes, or scales."""
    return nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
