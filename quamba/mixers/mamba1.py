"""Mamba1's mixer (arXiv 2312.00752, section 3.4): selective state space with a short convolution and a gate.

Letters: B batch, L tokens, D hidden size, I intermediate size, N state size, R rank of dt, K taps of the convolution.

    x, z     = split(in_proj(u))                  sites conv_in, z        [B, L, I] each
    x        = silu(conv1d(x))                    site  x
    dt, B, C = split(x_proj(x))                   site  x_proj_out        R, N, N
    dt       = dt_proj(dt)                        site  dt                softplus and bias inside the scan
    y        = scan(x, dt, A, B, C, D) * silu(z)
    out      = out_proj(y Hᵀ)                     site  out_proj_in

Kept in float32 whatever the model's dtype: A_log, D, the bias of dt, every scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

import quamba_kernels as kernels
from quamba.errors import RecipeError
from quamba.layers import CausalConv1d, Hadamard, Linear, PreciseModule, Sites
from quamba.plan import BlockPlan, Rotation, SiteSpec, WeightSpec
from quamba.qtensor import QTensor
from quamba.schema import choice
from quamba.state import LayerState


@dataclass(frozen=True)
class Mamba1Args:
    intermediate_size: int
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int = 16
    use_bias: bool = False
    use_conv_bias: bool = True


class Mamba1(PreciseModule):
    """Parameters: in_proj `[2I, D]` (rows x, z), conv1d `[I, 1, K]`, x_proj `[R+2N, I]` (rows dt, B, C),
    dt_proj `[I, R]` with bias, A_log `[I, N]`, D `[I]`, out_proj `[D, I]`."""

    Args = Mamba1Args
    precise = ("A_log", "D")

    reads: ClassVar = {
        "in_proj": "mixer_in",
        "conv1d": "conv_in",
        "x_proj": "x",
        "dt_proj": "x_proj_out",
        "out_proj": "out_proj_in",
    }
    integer_sites = ("mixer_in", "conv_in", "x", "z", "out_proj_in")

    def __init__(self, args: Mamba1Args, hidden_size: int, plan: BlockPlan):
        super().__init__()
        self.args, self.plan = args, plan
        inner, states, rank = args.intermediate_size, args.state_size, args.time_step_rank
        self.x_scale_in_weight = _folds_x(plan)

        def linear(name: str, inputs: int, outputs: int, bias: bool) -> Linear:
            integer = not plan.site(self.reads[name]).is_float
            return Linear(inputs, outputs, bias, plan.weight(name), integer, precise_bias=name == "dt_proj")

        self.in_proj = linear("in_proj", hidden_size, 2 * inner, args.use_bias)
        self.conv1d = CausalConv1d(inner, args.conv_kernel, args.use_conv_bias, plan.weight("conv1d"))
        self.x_proj = linear("x_proj", inner, rank + 2 * states, False)
        self.dt_proj = linear("dt_proj", rank, inner, True)
        self.A_log = nn.Parameter(torch.empty(inner, states))
        self.D = nn.Parameter(torch.empty(inner))
        self.rotation = Hadamard(plan.rotations.get("out_proj"))
        self.out_proj = linear("out_proj", inner, hidden_size, args.use_bias)

    def reset_parameters(self) -> None:
        """Random weights with the published initial A and dt (S4D-real; dt between 0.001 and 0.1)."""
        inner, states = self.A_log.shape
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, states + 1).float().log().expand(inner, states))
            self.D.fill_(1.0)
            dt = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            assert self.dt_proj.bias is not None
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    @staticmethod
    def site_widths(args: Mamba1Args, hidden_size: int) -> dict[str, int]:
        inner = args.intermediate_size
        return {
            "mixer_in": hidden_size,
            "conv_in": inner,
            "z": inner,
            "x": inner,
            "x_proj_out": args.time_step_rank + 2 * args.state_size,
            "dt": inner,
            "out_proj_in": inner,
        }

    @staticmethod
    def state_shapes(args: Mamba1Args) -> dict[str, tuple[int, ...]]:
        inner = args.intermediate_size
        return {"conv": (inner, args.conv_kernel - 1), "recurrent": (inner, args.state_size)}

    @staticmethod
    def rotations(args: Mamba1Args) -> dict[str, Rotation]:
        """The online rotations this family permits, by the linear they stand in front of."""
        return {"out_proj": Hadamard.plan(args.intermediate_size)}

    @classmethod
    def check_recipe(cls, sites: dict[str, SiteSpec], weights: dict[str, WeightSpec]) -> None:
        """RecipeError where a combination of precisions has no arithmetic in this family."""
        for name in weights:
            choice("weights", name, tuple(cls.reads))
        for name, spec in sites.items():
            choice("sites", name, cls.integer_sites)
            if name in ("mixer_in", "out_proj_in") and spec.axis == "channel":
                raise RecipeError(f"sites.{name}: the input of an integer linear needs axis: tensor, or scale: token")
            if name in ("conv_in", "x", "z") and spec.scale == "token":
                raise RecipeError(f"sites.{name}: convolution and scan take static scales only")
        for weight, site in cls.reads.items():
            if not sites.get(site, SiteSpec()).is_float and weights.get(weight, WeightSpec()).is_float:
                raise RecipeError(f"sites.{site} is integer, so weights.{weight} must be, too")
        if weights.get("conv1d", WeightSpec()).bits == 8 and sites.get("conv_in", SiteSpec()).is_float:
            raise RecipeError("weights.conv1d is integer, so sites.conv_in must be, too")

    def forward(
        self, u: Tensor | QTensor, sites: Sites, state: LayerState | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """u `[B, L, D]`; state holds `conv` and `recurrent`, updated in place; mask bool `[B, L]`. Returns `[B, L, D]`."""
        args = self.args
        x, z = self.in_proj(u, sites("conv_in", "z"))
        x = self.conv1d(x, sites("x"), None if state is None else state.conv, mask)
        x_in = x.with_unit_scale() if self.x_scale_in_weight else x
        dt_B_C = self.x_proj(x_in, sites("x_proj_out"))
        low, B, C = dt_B_C.split([args.time_step_rank, args.state_size, args.state_size], dim=-1)
        dt = self.dt_proj(low, sites("dt"), add_bias=False)
        u_codes, u_scale = _parts(x)
        z_codes, z_scale = _parts(z)
        dt_bias = self.dt_proj.bias
        assert dt_bias is not None
        y = kernels.selective_scan(
            u_codes,
            dt,
            -torch.exp(self.A_log),
            B,
            C,
            self.D,
            z_codes,
            dt_bias,
            state=None if state is None else state.recurrent,
            mask=mask,
            u_scale=u_scale,
            z_scale=z_scale,
        )
        return self.out_proj(self.rotation(y, sites("out_proj_in")))

    @torch.no_grad()
    def fold_norm(self, weight: Tensor) -> None:
        """Multiply the norm's weight `[D]` into in_proj's columns (float weights; the norm then has weight 1)."""
        for rows in self.in_proj.weight.split(256):  # a float64 copy of all of it would be the peak of memory
            rows.copy_(rows.double() * weight.double())

    @torch.no_grad()
    def rotate(self, rotations: dict[str, Rotation]) -> None:
        """Switch the named online rotations on, and turn the weights behind them to match."""
        for name, rotation in rotations.items():
            self.rotation = Hadamard(rotation)
            self.out_proj.weight.copy_(self.rotation.rotate_weight(getattr(self, name).weight))

    @torch.no_grad()
    def fold_scales(self, scales: dict[str, Tensor], plan: BlockPlan) -> None:
        """Multiply x's channel scales `[I]` into x_proj's columns, so that x_proj can read x's bare codes."""
        if _folds_x(plan):
            self.x_proj.weight.mul_(scales["x"])


def _folds_x(plan: BlockPlan) -> bool:
    """Whether x_proj's columns hold x's channel scales: an integer linear takes no channel scales on its input."""
    return plan.site("x").axis == "channel" and not plan.weight("x_proj").is_float


def _parts(x: Tensor | QTensor) -> tuple[Tensor, Tensor | None]:
    return (x.values, x.scale) if isinstance(x, QTensor) else (x, None)
