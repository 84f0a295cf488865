"""Mamba1's mixer (arXiv 2312.00752, section 3.4): selective state space with a short convolution and a gate.

Letters: B batch, L tokens, D hidden size, I intermediate size, N state size, R rank of dt, K taps of the convolution.

    x, z     = split(in_proj(u))                  sites conv_in, z        [B, L, I] each
    x        = silu(conv1d(x))                    site  x
    dt, B, C = split(x_proj(x))                   site  x_proj_out        R, N, N
    dt       = dt_proj(dt)                        site  dt                softplus and bias inside the scan
    y        = scan(x, dt, A, B, C, D) * silu(z)
    out      = out_proj(y Hᵀ)                     site  out_proj_in

With `norm_epsilon` (FalconMamba), dt, B and C are each divided by their root mean square before they go on.

Site `state` is the recurrent state [B, I, N] between two calls. Kept in float32 whatever the model's dtype: A_log, D, the
bias of dt, every scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import quamba_kernels as kernels
from quamba.errors import QuambaError
from quamba.layers import CausalConv1d, Hadamard, Sites
from quamba.mixers.mixer import Mixer
from quamba.plan import BlockPlan, Rotation
from quamba.qtensor import QTensor, parts, real
from quamba.state import LayerState


@dataclass(frozen=True)
class Mamba1Args:
    intermediate_size: int
    state_size: int = 16
    conv_kernel: int = 4
    time_step_rank: int = 16
    use_bias: bool = False
    use_conv_bias: bool = True
    norm_epsilon: float | None = None


class Mamba1(Mixer):
    """Parameters: in_proj `[2I, D]` (rows x, z), conv1d `[I, 1, K]`, x_proj `[R+2N, I]` (rows dt, B, C),
    dt_proj `[I, R]` with bias, A_log `[I, N]`, D `[I]`, out_proj `[D, I]`."""

    Args = Mamba1Args

    reads: ClassVar = {
        "in_proj": "mixer_in",
        "conv1d": "conv_in",
        "x_proj": "x",
        "dt_proj": "x_proj_out",
        "out_proj": "out_proj_in",
    }
    vectors: ClassVar = {"conv_bias": "conv1d.bias", "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D"}
    products = ("mixer_in", "x_proj_out", "out_proj_in")
    elementwise = ("conv_in", "x", "z")
    converted = ("dt",)

    def __init__(self, args: Mamba1Args, hidden_size: int, plan: BlockPlan):
        super().__init__()
        if args.norm_epsilon is not None and not plan.site("x_proj_out").is_float:
            raise QuambaError(
                "dt, B and C are normed in this model (norm_epsilon, as FalconMamba): its site x_proj_out can't be "
                "integer, as the recipe has it (quamba1-w8a8 does; w8a8 doesn't)"
            )
        self.args, self.plan = args, plan
        inner, states, rank = args.intermediate_size, args.state_size, args.time_step_rank
        self.x_scale_in_weight = _folds_x(plan)
        self.in_proj = self.linear("in_proj", hidden_size, 2 * inner, args.use_bias)
        self.conv1d = CausalConv1d(
            inner, args.conv_kernel, args.use_conv_bias, plan.weight("conv1d"), plan.weight("conv_bias")
        )
        self.x_proj = self.linear("x_proj", inner, rank + 2 * states, False)
        self.dt_proj = self.linear("dt_proj", rank, inner, True, precise_bias=True, bias_spec=plan.weight("dt_bias"))
        self.add_vector("A_log", (inner, states), plan.weight("A_log"))
        self.add_vector("D", (inner,), plan.weight("D"))
        self.rotation = Hadamard(plan.rotations.get("out_proj"))
        self.out_proj = self.linear("out_proj", inner, hidden_size, args.use_bias)

    def reset_parameters(self) -> None:
        """Random weights with the published initial A and dt (S4D-real; dt between 0.001 and 0.1)."""
        inner, states = self.args.intermediate_size, self.args.state_size
        if self.plan.weights:  # integers come from a checkpoint
            return
        with torch.no_grad():
            self.vector("A_log").copy_(torch.arange(1, states + 1).float().log().expand(inner, states))
            self.vector("D").fill_(1.0)
            dt = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            self.dt_proj.vector("bias").copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

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
            "state": inner,
        }

    @staticmethod
    def state_shapes(args: Mamba1Args) -> dict[str, tuple[int, ...]]:
        inner = args.intermediate_size
        return {"conv": (inner, args.conv_kernel - 1), "recurrent": (inner, args.state_size)}

    @staticmethod
    def rotations(args: Mamba1Args) -> dict[str, Rotation]:
        """The online rotations this family permits, by the linear they stand in front of."""
        return {"out_proj": Hadamard.plan(args.intermediate_size)}

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
        if args.norm_epsilon is not None:
            low, B, C = (_normed(piece, args.norm_epsilon) for piece in (low, B, C))
        dt, B, C = real(self.dt_proj(low, sites("dt"), add_bias=False)), real(B), real(C)
        u_codes, u_scale = parts(x)
        z_codes, z_scale = parts(z)
        A, D, dt_bias = -torch.exp(self.vector("A_log")), self.vector("D"), self.dt_proj.vector("bias")

        def scan(tokens: slice, recurrent: Tensor | None) -> Tensor:
            return kernels.selective_scan(
                u_codes[:, tokens],
                dt[:, tokens],
                A,
                B[:, tokens],
                C[:, tokens],
                D,
                z_codes[:, tokens],
                dt_bias,
                state=recurrent,
                mask=None if mask is None else mask[:, tokens],
                u_scale=u_scale,
                z_scale=z_scale,
            )

        y = self.recur(scan, sites, state, u_codes.shape[1])
        return self.out_proj(self.rotation(y, sites("out_proj_in")))

    @torch.no_grad()
    def fold_scales(self, scales: dict[str, Tensor], plan: BlockPlan) -> None:
        """Multiply x's channel scales `[I]` into x_proj's columns, so that x_proj can read x's bare codes."""
        if _folds_x(plan):
            self.x_proj.get_parameter("weight").mul_(scales["x"])


def _folds_x(plan: BlockPlan) -> bool:
    """Whether x_proj's columns hold x's channel scales: an integer linear takes no channel scales on its input."""
    return plan.site("x").axis == "channel" and not plan.weight("x_proj").is_float


def _normed(x: Tensor | QTensor, eps: float) -> Tensor:
    """x over its root mean square, in x's dtype."""
    x = real(x)
    return kernels.rms_norm(x, torch.ones(x.shape[-1], dtype=x.dtype, device=x.device), eps)
