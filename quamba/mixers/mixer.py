"""What all mixers share: their linears, their rotations, their checks, and how they treat the recurrent state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

import quamba_kernels as kernels
from quamba.errors import RecipeError
from quamba.layers import CausalConv1d, Hadamard, Linear, PreciseModule, Sites
from quamba.plan import BlockPlan, Rotation, SiteSpec, WeightSpec
from quamba.schema import choice
from quamba.state import LayerState

OBSERVE_STATE_EVERY = 16
"""Tokens between two looks at the recurrent state during calibration."""


class Mixer(PreciseModule):
    """Base of the families. A family lists

    * `reads`: its weights in the order they are quantized, each with the site it reads;
    * `vectors`: its small parameters that may be int8, with their places in it;
    * `products`: its sites that are multiplied by an integer weight; `elementwise`: those that are read channel by
      channel, and so may have a scale per channel; `converted`: those that are made real again before they are used.
    """

    Args: ClassVar[Any]
    reads: ClassVar[dict[str, str]] = {}
    vectors: ClassVar[dict[str, str]] = {}
    products: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[tuple[str, ...]] = ()
    converted: ClassVar[tuple[str, ...]] = ()

    args: Any
    plan: BlockPlan
    in_proj: Linear
    conv1d: CausalConv1d
    rotation: Hadamard
    out_proj: Linear

    @classmethod
    def integer_sites(cls) -> tuple[str, ...]:
        """Sites that may be integer."""
        return (*cls.products, *cls.elementwise, *cls.converted, "state")

    def linear(self, name: str, inputs: int, outputs: int, bias: bool, **kwargs: Any) -> Linear:
        integer = not self.plan.site(self.reads[name]).is_float
        return Linear(inputs, outputs, bias, self.plan.weight(name), integer, **kwargs)

    @staticmethod
    def site_widths(args: Any, hidden_size: int) -> dict[str, int]:
        """Channels at each site."""
        raise NotImplementedError

    @staticmethod
    def state_shapes(args: Any) -> dict[str, tuple[int, ...]]:
        """Shapes, without the batch, of the `conv` and the `recurrent` state."""
        raise NotImplementedError

    @staticmethod
    def rotations(args: Any) -> dict[str, Rotation]:
        """The online rotations the family permits, by the linear they stand in front of."""
        raise NotImplementedError

    @staticmethod
    def splits(args: Any) -> dict[str, list[int]]:
        """Weights and vectors whose outputs are several things side by side: how many rows each has."""
        return {}

    @staticmethod
    def groupings(args: Any) -> dict[str, tuple[Tensor, int]]:
        """Sites that may have scales by group: the group of each channel, int64 `[width]`, and the number of groups."""
        return {}

    @classmethod
    def check_recipe(cls, sites: dict[str, SiteSpec], weights: dict[str, WeightSpec]) -> None:
        """RecipeError where a combination of precisions has no arithmetic in this family."""
        for name, weight in weights.items():
            choice("weights", name, (*cls.reads, *cls.vectors))
            split = (WeightSpec(8, "split"),) if name == "conv_bias" else ()
            if name in cls.vectors and weight not in (WeightSpec(), WeightSpec(8, "tensor"), *split):
                ways = "tensor or split" if split else "tensor"
                raise RecipeError(f"weights.{name}: choose bits: 16, or bits: 8 with axis: {ways}")
        for name, spec in sites.items():
            choice("sites", name, cls.integer_sites())
            if name in cls.products and spec.axis != "tensor":
                raise RecipeError(f"sites.{name}: the input of an integer linear needs axis: tensor, or scale: token")
            if name not in cls.products and spec.scale == "token":
                raise RecipeError(f"sites.{name}: convolution, scan, gate and state take static scales only")
            if name in ("state", "B", "C") and spec.axis == "channel":
                raise RecipeError(f"sites.{name}: choose axis: tensor or group")  # products sum over the state's index
        for name, site in cls.reads.items():
            spec, weight = sites.get(site, SiteSpec()), weights.get(name, WeightSpec())
            if not spec.is_float and weight.is_float:
                raise RecipeError(f"sites.{site} is integer, so weights.{name} must be, too")
        conv, conv_in = weights.get("conv1d", WeightSpec()), sites.get("conv_in", SiteSpec())
        if conv.bits == 4:
            raise RecipeError("weights.conv1d: its taps are too few for bits: 4; choose 8 or 16")
        if not conv.is_float and conv_in.is_float:
            raise RecipeError("weights.conv1d is integer, so sites.conv_in must be, too")

    def recur(
        self, scan: Callable[[slice, Tensor | None], Tensor], sites: Sites, state: LayerState | None, length: int
    ) -> Tensor:
        """y `[B, L, ...]` of `scan(tokens, recurrent)`, which updates the float32 `recurrent` in place.

        An int8 state is made real before and rounded after each call. While its site is observed, the scan pauses every
        16 tokens, so that the state is seen along the whole sequence.
        """
        everything = slice(None)
        if "state" in sites.observers and state is not None:
            pieces, looks = [], []
            for start in range(0, length, OBSERVE_STATE_EVERY):
                pieces.append(scan(slice(start, start + OBSERVE_STATE_EVERY), state.recurrent))
                looks.append(state.recurrent.flatten(1, -2).clone())
            sites.observers["state"](torch.stack(looks, dim=1))
            return torch.cat(pieces, dim=1)
        if state is None or sites.specs["state"].is_float:
            return scan(everything, None if state is None else state.recurrent)
        codes, scale = state.recurrent, sites.scale("state")
        scale = scale.view(codes.shape[1:]) if scale.ndim else scale
        real = codes.float() * scale
        y = scan(everything, real)
        inv = (1.0 / scale).flatten() if scale.ndim else 1.0 / scale
        codes.copy_(kernels.quantize(real.flatten(1), inv).view_as(codes))
        return y

    @torch.no_grad()
    def fold_norm(self, weight: Tensor) -> None:
        """Multiply the block norm's weight `[D]` into in_proj's columns (the norm then has weight 1)."""
        scale_columns(self.in_proj, weight)

    @torch.no_grad()
    def rotate(self, rotations: dict[str, Rotation]) -> None:
        """Switch the online rotation before out_proj on, and turn its columns to match."""
        if "out_proj" in rotations:
            self.rotation = Hadamard(rotations["out_proj"])
            turn_columns(self.out_proj, self.rotation)

    @torch.no_grad()
    def rotate_residual(self, rotation: Hadamard) -> None:
        """Read from and write to a residual stream turned by `rotation`."""
        turn_columns(self.in_proj, rotation)
        turn_rows(self.out_proj, rotation)

    @torch.no_grad()
    def fold_scales(self, scales: dict[str, Tensor], plan: BlockPlan) -> None:
        """Multiply scales of sites into weights that read bare codes. None by default."""


def scale_columns(linear: Linear, factors: Tensor) -> None:
    """Multiply the columns of a float weight by `factors [in]`, rounding once."""
    for rows in linear.get_parameter("weight").split(256):  # a float64 copy of all of it would be the peak of memory
        rows.copy_(rows.double() * factors.double())


def turn_columns(linear: Linear, rotation: Hadamard) -> None:
    """`W Hᵀ`, for inputs `x Hᵀ`."""
    weight = linear.get_parameter("weight")
    weight.copy_(rotation.rotate_weight(weight))


def turn_rows(linear: Linear, rotation: Hadamard) -> None:
    """`H W` and `H b`, for outputs `y Hᵀ`."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    weight.copy_(rotation.rotate_weight(weight.T.contiguous()).T)
    if isinstance(bias, Tensor):
        bias.copy_(rotation.rotate_weight(bias))
