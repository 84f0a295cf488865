"""Mamba2's mixer (arXiv 2405.21060, section 7): heads that share B and C by groups, and a norm with the gate in it.

Letters: B batch, L tokens, D hidden size, I intermediate size = H*P, H heads of P channels, G groups, N state size,
K taps of the convolution.

    z, x B C, dt = split(in_proj(u))              sites z, conv_in, dt    [B, L, I], [B, L, I + 2GN], [B, L, H]
    x, B, C      = split(silu(conv1d(x B C)))     sites x, B, C           I, GN, GN
    y            = scan(x, dt, A, B, C, D)        softplus, bias and limits of dt inside the scan
    y            = norm(y * silu(z))              per group of I / norm_groups channels
    out          = out_proj(y Hᵀ)                 site  out_proj_in

Site `state` is the recurrent state [B, H, P, N] between two calls. Kept in float32 whatever the model's dtype: A_log, D,
dt_bias, every scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import quamba_kernels as kernels
from quamba.errors import QuambaError
from quamba.layers import CausalConv1d, GatedRMSNorm, Hadamard, Sites
from quamba.mixers.mixer import Mixer
from quamba.plan import BlockPlan, Rotation
from quamba.qtensor import QTensor, parts, real
from quamba.state import LayerState


@dataclass(frozen=True)
class Mamba2Args:
    """n_groups: groups of heads that share B and C; norm_groups: runs of channels that the gated norm looks at one by
    one; dt_min, dt_max: limits of dt after softplus, None for no limit; D_has_hdim: D per channel, not per head."""

    num_heads: int
    head_dim: int
    state_size: int
    n_groups: int
    norm_groups: int
    conv_kernel: int = 4
    chunk_size: int = 256
    use_bias: bool = False
    use_conv_bias: bool = True
    D_has_hdim: bool = False
    rms_norm: bool = True
    norm_before_gate: bool = False
    norm_epsilon: float = 1e-5
    dt_min: float = 0.0
    dt_max: float | None = None

    def __post_init__(self) -> None:
        sizes = ("num_heads", "head_dim", "state_size", "n_groups", "norm_groups", "conv_kernel", "chunk_size")
        for name in sizes:
            if getattr(self, name) < 1:
                raise QuambaError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.n_groups:
            raise QuambaError(f"{self.num_heads} heads can't be shared out among n_groups = {self.n_groups}")
        if self.intermediate_size % self.norm_groups:
            raise QuambaError(f"{self.intermediate_size} channels can't be cut into norm_groups = {self.norm_groups}")
        if not 0 <= self.dt_min <= self.dt_limit[1]:
            raise QuambaError(f"dt can't be limited to between {self.dt_min} and {self.dt_max}")

    @property
    def intermediate_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def group_width(self) -> int:
        """Channels of B, and of C."""
        return self.n_groups * self.state_size

    @property
    def conv_width(self) -> int:
        return self.intermediate_size + 2 * self.group_width

    @property
    def dt_limit(self) -> tuple[float, float]:
        return self.dt_min, math.inf if self.dt_max is None else self.dt_max


class Mamba2(Mixer):
    """Parameters: in_proj `[2I + 2GN + H, D]` (rows z, x, B, C, dt), conv1d `[I + 2GN, 1, K]` (rows x, B, C), A_log `[H]`,
    dt_bias `[H]`, D `[H]` or `[I]`, norm `[I]` unless rms_norm is off, out_proj `[D, I]`."""

    Args = Mamba2Args

    reads: ClassVar = {"in_proj": "mixer_in", "conv1d": "conv_in", "out_proj": "out_proj_in"}
    vectors: ClassVar = {"conv_bias": "conv1d.bias", "A_log": "A_log", "D": "D"}
    products = ("mixer_in", "out_proj_in")
    elementwise = ("conv_in", "z", "x", "B", "C")
    converted = ("dt",)

    def __init__(self, args: Mamba2Args, hidden_size: int, plan: BlockPlan):
        super().__init__()
        self.args, self.plan = args, plan
        inner, heads = args.intermediate_size, args.num_heads
        self.in_proj = self.linear("in_proj", hidden_size, inner + args.conv_width + heads, args.use_bias)
        self.conv1d = CausalConv1d(
            args.conv_width, args.conv_kernel, args.use_conv_bias, plan.weight("conv1d"), plan.weight("conv_bias")
        )
        self.add_vector("A_log", (heads,), plan.weight("A_log"))
        self.add_vector("dt_bias", (heads,))
        self.add_vector("D", (inner if args.D_has_hdim else heads,), plan.weight("D"))
        self.norm = None
        if args.rms_norm:
            self.norm = GatedRMSNorm(inner, args.norm_epsilon, args.norm_groups, args.norm_before_gate)
        self.rotation = Hadamard(plan.rotations.get("out_proj"))
        self.out_proj = self.linear("out_proj", inner, hidden_size, args.use_bias)

    def reset_parameters(self) -> None:
        """Random weights with the published initial A (between -1 and -16) and dt (between 0.001 and 0.1)."""
        heads = self.args.num_heads
        if self.plan.weights:  # integers come from a checkpoint
            return
        with torch.no_grad():
            self.vector("A_log").copy_((1 + 15 * torch.rand(heads)).log())
            self.vector("D").fill_(1.0)
            dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
            self.vector("dt_bias").copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    @staticmethod
    def site_widths(args: Mamba2Args, hidden_size: int) -> dict[str, int]:
        inner = args.intermediate_size
        return {
            "mixer_in": hidden_size,
            "z": inner,
            "conv_in": args.conv_width,
            "dt": args.num_heads,
            "x": inner,
            "B": args.group_width,
            "C": args.group_width,
            "out_proj_in": inner,
            "state": inner,
        }

    @staticmethod
    def splits(args: Mamba2Args) -> dict[str, list[int]]:
        inner, width = args.intermediate_size, args.group_width
        conv = [inner, width, width]
        return {"in_proj": [inner, inner, width, width, args.num_heads], "conv1d": conv, "conv_bias": conv}

    @staticmethod
    def groupings(args: Mamba2Args) -> dict[str, tuple[Tensor, int]]:
        """conv_in: x, B, C apart. B, C: by SSD group. x, state: four groups of channels in each of four groups of heads
        of an SSD group, as many channels in each as can be; `quamba.quantizer.reorder` finds better ones."""
        inner, width = args.intermediate_size, args.group_width
        ssd = torch.arange(width) // args.state_size
        channel = torch.arange(inner)
        head, place = channel // args.head_dim, channel % args.head_dim
        per_group = args.num_heads // args.n_groups
        x = head // per_group * 16 + head % per_group * 4 // per_group * 4 + place * 4 // args.head_dim
        conv = torch.repeat_interleave(torch.arange(3), torch.tensor([inner, width, width]))
        by_ssd, by_cluster = (ssd, args.n_groups), (x, 16 * args.n_groups)
        return {"conv_in": (conv, 3), "x": by_cluster, "B": by_ssd, "C": by_ssd, "state": by_cluster}

    @staticmethod
    def state_shapes(args: Mamba2Args) -> dict[str, tuple[int, ...]]:
        return {
            "conv": (args.conv_width, args.conv_kernel - 1),
            "recurrent": (args.num_heads, args.head_dim, args.state_size),
        }

    @staticmethod
    def rotations(args: Mamba2Args) -> dict[str, Rotation]:
        """The online rotations this family permits, by the linear they stand in front of."""
        return {"out_proj": Hadamard.plan(args.intermediate_size)}

    def forward(
        self, u: Tensor | QTensor, sites: Sites, state: LayerState | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """u `[B, L, D]`; state holds `conv` and `recurrent`, updated in place; mask bool `[B, L]`. Returns `[B, L, D]`."""
        args = self.args
        heads, groups = (args.num_heads, args.head_dim), (args.n_groups, args.state_size)
        z, xBC, dt = self.in_proj(u, sites("z", "conv_in", "dt"))
        dt = real(dt)
        pieces = self.conv1d(xBC, sites("x", "B", "C"), None if state is None else state.conv, mask)
        (x, x_scale), (B, B_scale), (C, C_scale) = (parts(piece) for piece in pieces)
        x, B, C = x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)
        A, D = -torch.exp(self.vector("A_log")), self.vector("D")
        D = D.unflatten(0, heads) if args.D_has_hdim else D

        def scan(tokens: slice, recurrent: Tensor | None) -> Tensor:
            return kernels.ssd_scan(
                x[:, tokens],
                dt[:, tokens],
                A,
                B[:, tokens],
                C[:, tokens],
                D,
                self.vector("dt_bias"),
                state=recurrent,
                mask=None if mask is None else mask[:, tokens],
                dt_limit=args.dt_limit,
                chunk_size=args.chunk_size,
                x_scale=x_scale,
                B_scale=B_scale,
                C_scale=C_scale,
            )

        y = self.recur(scan, sites, state, x.shape[1]).flatten(-2)
        out = sites("out_proj_in")
        if self.norm is None:
            gate, gate_scale = parts(z)
            y = kernels.gate(y, gate, z_scale=gate_scale)
        else:
            y = self.norm(y, z, precise=out.integer)
        return self.out_proj(self.rotation(y, out))
