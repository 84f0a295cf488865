"""Models of random weights, written with `quamba_kernels` alone, as `quamba/mixers` and `quamba/model.py` compute them.

Letters: B batch, L tokens, D hidden size, I inner size, N states, H heads, P channels of a head, G groups, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpu_shapes import Format, Shape
from torch import Tensor

import quamba_kernels as kernels
from quamba_kernels.hadamard_matrices import factor, outer_matrix

EPS = 1e-5
INV = 32.0  # static activations: codes of -4 to 4
GROUP = 32


class Matrix:
    """A weight `[outputs, inputs]` in 16, 8 or 4 bits. Products with inputs of unit size have unit size."""

    def __init__(self, outputs: int, inputs: int, bits: int, device: torch.device):
        self.outputs, self.inputs, self.bits = outputs, inputs, bits
        size, options = inputs**-0.5, {"device": device}
        if bits == 16:
            self.weight = torch.empty(outputs, inputs, dtype=torch.float16, **options).normal_(std=size)
        elif bits == 8:
            self.weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, **options)
            self.scale = torch.full((outputs,), size / 73, **options)
        else:
            groups = -(-inputs // GROUP)
            self.weight = torch.randint(0, 256, (outputs, groups * GROUP // 2), dtype=torch.uint8, **options)
            self.groups = torch.randint(1, 16, (outputs, groups), dtype=torch.int8, **options)
            self.scale = torch.full((outputs,), size / 42, **options)

    def __call__(
        self, x: Tensor, x_scale: Tensor | None = None, inv: Tensor | None = None, rows: slice = slice(None)
    ) -> Tensor:
        """Outputs `rows` of x, float or codes with their scale: float, or codes by inv."""
        if self.bits == 16:
            return kernels.linear(x, self.weight)
        weight, scale = self.weight[rows], self.scale[rows]
        if self.bits == 8:
            if x_scale is None:
                return kernels.w8_linear(x, weight, scale, None, inv)
            return kernels.w8a8_linear(x, x_scale, weight, scale, None, inv)
        if x_scale is None:
            return kernels.w4_linear(x, weight, self.groups[rows], scale, None, inv)
        return kernels.w4a8_linear(x, x_scale, weight, self.groups[rows], scale, None, inv)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows `ids`, float32."""
        if self.bits == 16:
            return kernels.embedding(ids, self.weight).float()
        if self.bits == 8:
            return kernels.embedding(ids, self.weight, self.scale)
        return kernels.embedding(ids, self.weight, self.scale, self.groups, self.inputs)


@dataclass
class State:
    """One layer's: conv `[B, C, K-1]`; recurrent float32, or int8 with a float32 scale for each row."""

    conv: Tensor
    recurrent: Tensor
    scale: Tensor | None = None

    @property
    def options(self) -> dict[str, Tensor]:
        return {"state": self.recurrent} | ({} if self.scale is None else {"state_scale": self.scale})

    @property
    def tensors(self) -> list[Tensor]:
        return [self.conv, self.recurrent, *([] if self.scale is None else [self.scale])]


def recurrent_states(shape: Shape, dtype: str, batch: int, device: torch.device) -> list[tuple[Tensor, Tensor | None]]:
    """For each layer what `State` holds of it; formats may share them, for none depends on what is in them."""
    sizes = (batch, *shape.recurrent)
    if dtype == "float32":
        return [(torch.empty(sizes, device=device).normal_(std=0.1), None) for _ in range(shape.layers)]
    return [
        (torch.randint(-127, 128, sizes, dtype=torch.int8, device=device), torch.full(sizes[:-1], 1e-3, device=device))
        for _ in range(shape.layers)
    ]


class Block:
    """What the families have in common: norm, in_proj, convolution, rotation, out_proj."""

    def __init__(self, shape: Shape, format: Format, outputs: int, device: torch.device):
        self.shape, self.format = shape, format
        dtype = torch.float32 if format.integer else torch.float16
        self.norm = torch.ones(shape.hidden, dtype=dtype, device=device)
        self.in_proj = Matrix(outputs, shape.hidden, format.bits, device)
        self.out_proj = Matrix(shape.hidden, shape.inner, format.bits, device)
        self.bias = torch.zeros(shape.conv, device=device)
        taps = (shape.conv, shape.taps)
        if format.integer:
            self.conv = torch.randint(-127, 128, taps, dtype=torch.int8, device=device)
            self.conv_scale = torch.full((shape.conv,), 1 / 150, device=device)
        else:  # int4 products come out in float32
            self.conv_dtype = torch.float16 if format.bits == 16 else torch.float32
            self.conv = torch.empty(taps, dtype=self.conv_dtype, device=device).normal_(std=0.5)
        order, name = factor(shape.inner)
        self.outer = None if name in ("sylvester", "identity") else outer_matrix(name).to(device)
        self.blocks = order if name == "identity" else 1

    def inv(self, channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Static scales of a site: inverse and scale `[channels]`."""
        return torch.full((channels,), INV, device=device), torch.full((channels,), 1 / INV, device=device)

    def state(self, batch: int, recurrent: tuple[Tensor, Tensor | None]) -> State:
        size, device = (batch, self.shape.conv, self.shape.taps - 1), self.norm.device
        if self.format.integer:
            return State(torch.randint(-127, 128, size, dtype=torch.int8, device=device), *recurrent)
        return State(torch.randn(size, device=device).to(self.conv_dtype), *recurrent)

    def normed(self, x: Tensor) -> tuple[Tensor, ...]:
        """What in_proj reads of the residual stream: floats, or codes and their scale."""
        if self.format.integer:
            return kernels.rms_norm_per_token(x, self.norm, EPS)
        return (kernels.rms_norm(x, self.norm, EPS),)

    def write(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream after out_proj of y, rotated where weights are quantized."""
        if self.format.integer:
            y = self.out_proj(*kernels.hadamard_per_token(y, self.outer, self.blocks))
        elif self.format.bits < 16:
            y = self.out_proj(kernels.hadamard(y, self.outer, self.blocks))
        else:
            y = self.out_proj(y)
        return x + y.to(x.dtype)


class Mamba1Block(Block):
    def __init__(self, shape: Shape, format: Format, device: torch.device):
        inner, states, rank = shape.inner, shape.states, shape.rank
        super().__init__(shape, format, 2 * inner, device)
        self.x_proj = Matrix(rank + 2 * states, inner, format.bits, device)
        self.dt_proj = Matrix(inner, rank, max(8, format.bits), device)
        self.A = -torch.arange(1, states + 1, device=device).float().expand(inner, states).contiguous()
        self.D, self.dt_bias = torch.ones(inner, device=device), torch.full((inner,), -4.0, device=device)
        self.xz_inv, _ = self.inv(2 * inner, device)
        self.x_inv, self.x_scale = self.inv(inner, device)
        self.one = torch.ones((), device=device)

    def __call__(self, x: Tensor, state: State) -> Tensor:
        """x float32 `[B, L, D]`, the residual stream."""
        shape, integer = self.shape, self.format.integer
        u, z = self.in_proj(*self.normed(x), inv=self.xz_inv if integer else None).chunk(2, dim=-1)
        options = {"x_scale": self.x_scale, "weight_scale": self.conv_scale, "inv": self.x_inv} if integer else {}
        u = kernels.causal_conv1d(u, self.conv, self.bias, state=state.conv, **options)
        low, B, C = self.x_proj(u, self.one if integer else None).split([shape.rank, shape.states, shape.states], -1)
        dt = self.dt_proj(low)
        scales = {"u_scale": self.x_scale, "z_scale": self.x_scale} if integer else {}
        y = kernels.selective_scan(u, dt, self.A, B, C, self.D, z, self.dt_bias, **state.options, **scales)
        return self.write(x, y)


class Mamba2Block(Block):
    def __init__(self, shape: Shape, format: Format, device: torch.device):
        inner, heads, width = shape.inner, shape.heads, shape.groups * shape.states
        super().__init__(shape, format, inner + shape.conv + heads, device)
        self.gate_norm = torch.ones(inner, dtype=self.norm.dtype, device=device)
        self.A = -torch.linspace(1, 16, heads, device=device)
        self.D, self.dt_bias = torch.ones(heads, device=device), torch.full((heads,), -4.0, device=device)
        self.coded = inner + shape.conv  # rows of in_proj whose outputs are rounded, those of z and of the convolution
        self.coded_inv, _ = self.inv(self.coded, device)
        self.conv_inv, self.x_scale = self.inv(shape.conv, device)
        self.z_scale, self.group_scale = self.x_scale[:inner].clone(), self.x_scale[:width].clone()

    def __call__(self, x: Tensor, state: State) -> Tensor:
        """x float32 `[B, L, D]`, the residual stream."""
        shape, integer, width = self.shape, self.format.integer, self.shape.groups * self.shape.states
        given, options = self.normed(x), {}
        if integer:
            z, u = self.in_proj(*given, self.coded_inv, slice(self.coded)).split([shape.inner, shape.conv], -1)
            dt = self.in_proj(*given, rows=slice(self.coded, None))
            options = {"x_scale": self.x_scale, "weight_scale": self.conv_scale, "inv": self.conv_inv}
        else:
            z, u, dt = self.in_proj(*given).split([shape.inner, shape.conv, shape.heads], -1)
        u = kernels.causal_conv1d(u, self.conv, self.bias, state=state.conv, **options)
        u, B, C = u.split([shape.inner, width, width], -1)
        u = u.unflatten(-1, (shape.heads, shape.head_dim))
        B, C = (v.unflatten(-1, (shape.groups, shape.states)) for v in (B, C))
        scales = {"x_scale": self.z_scale, "B_scale": self.group_scale, "C_scale": self.group_scale} if integer else {}
        y = kernels.ssd_scan(u, dt, self.A, B, C, self.D, self.dt_bias, **state.options, **scales).flatten(-2)
        z_scale = self.z_scale if integer else None
        y = kernels.gated_rms_norm(y, z, self.gate_norm, EPS, shape.groups, z_scale=z_scale)
        return self.write(x, y)


class Model:
    """Embedding, blocks, final norm, head."""

    def __init__(self, shape: Shape, format: Format, device: torch.device):
        self.shape, self.format, bits = shape, format, format.head_bits(shape)
        self.embedding = Matrix(shape.vocabulary, shape.hidden, bits, device)
        self.head = self.embedding if shape.tied else Matrix(shape.vocabulary, shape.hidden, bits, device)
        kind = Mamba2Block if shape.family == "mamba2" else Mamba1Block
        self.blocks = [kind(shape, format, device) for _ in range(shape.layers)]
        self.integer_head = format.integer and bits < 16
        self.norm = torch.ones(shape.hidden, dtype=torch.float32 if self.integer_head else torch.float16, device=device)

    def states(self, batch: int, recurrent: list[tuple[Tensor, Tensor | None]]) -> list[State]:
        return [block.state(batch, r) for block, r in zip(self.blocks, recurrent, strict=True)]

    def __call__(self, ids: Tensor, states: list[State]) -> Tensor:
        """ids `[B, L]` to the last token's logits `[B, 1, V]`; the states move on."""
        x = self.embedding.lookup(ids)
        for block, state in zip(self.blocks, states, strict=True):
            x = block(x, state)
        x = x[:, -1:]
        if self.integer_head:
            return self.head(*kernels.rms_norm_per_token(x, self.norm, EPS))
        return self.head(kernels.rms_norm(x, self.norm, EPS))

    @property
    def memory(self) -> int:
        """Bytes of all weights."""
        return sum(_sizes(self).values())

    @property
    def read_once(self) -> int:
        """Bytes of the weights that a step reads: of an embedding that is not the head, next to none."""
        return sum((_sizes(self.blocks) | _sizes(self.head) | _sizes(self.norm)).values())

    @property
    def block_products(self) -> int:
        """Multiplications that a token's projections take."""
        matrices = [m for block in self.blocks for m in vars(block).values() if isinstance(m, Matrix)]
        return sum(m.outputs * m.inputs for m in matrices)

    @property
    def head_products(self) -> int:
        return self.head.outputs * self.head.inputs


def _sizes(thing: Any) -> dict[int, int]:
    """Bytes of every tensor in it, by address."""
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        return {storage.data_ptr(): storage.nbytes()}
    parts = (
        thing if isinstance(thing, list) else vars(thing).values() if isinstance(thing, Matrix | Block | Model) else []
    )
    return {place: size for part in parts for place, size in _sizes(part).items()}
