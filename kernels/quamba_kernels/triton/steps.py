"""One token of a recurrence: a program has some channels of one sequence with all their states.

In a recorded token (see `fusion`) the kernel also does what stands around it: Mamba1's dt from its low rank; and by the last
program of a sequence what needs the whole row: Mamba2's gate with its norm, and the Hadamard transform.
"""

import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels.triton.common import (
    EXACT,
    cdiv,
    last_to_arrive,
    launch,
    load_state,
    power_of_two,
    silu,
    softplus,
    store_state,
)
from quamba_kernels.triton.matmul import low, times_group
from quamba_kernels.triton.rotation import hadamard_rows
from quamba_kernels.triton.rows import gate_units

TILE = 512  # state entries of a program in Mamba1
SSD_TILE = 2048  # and in Mamba2, which reads B and C anew for each tile


@triton.jit
def few_products(
    x,
    weight,
    group_scale,
    weight_scale,
    i,
    inside,
    inputs,
    columns,
    w_stride,
    groups,
    GROUP: tl.constexpr,
    K: tl.constexpr,
):
    """float32 [I]: rows i of weight [., columns] times x [inputs], for so few inputs that K >= columns of them are one tile."""
    k = tl.arange(0, K)
    there = inside[:, None] & (k < columns)[None, :]
    w = tl.load(weight + i.to(tl.int64)[:, None] * w_stride + k[None, :], mask=there, other=0)
    if GROUP == 0:
        y = tl.sum(w.to(tl.float32) * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :], axis=1)
    else:
        HALF: tl.constexpr = GROUP // 2
        g = tl.load(group_scale + i.to(tl.int64)[:, None] * groups + (k // HALF)[None, :], mask=there, other=0)
        first = k // HALF * GROUP + k % HALF
        a = tl.load(x + first, mask=first < inputs, other=0.0).to(tl.float32)
        b = tl.load(x + first + HALF, mask=first + HALF < inputs, other=0.0).to(tl.float32)
        products = times_group(low(w), g, tl.float32) * a[None, :] + times_group(w >> 4, g, tl.float32) * b[None, :]
        y = tl.sum(products, axis=1)
    if weight_scale is not None:
        y = y * tl.load(weight_scale + i, mask=inside, other=0.0)
    return y


@triton.jit
def _scan_step(
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    dt_bias,
    state,
    state_scale,
    u_scale,
    z_scale,
    y,
    channels,
    states,
    u_batch,
    z_batch,
    dt_batch,
    B_batch,
    C_batch,
    U_STRIDE: tl.constexpr,
    Z_STRIDE: tl.constexpr,
    I: tl.constexpr,
    N: tl.constexpr,
    rank=None,
    dt_weight=None,
    dt_group_scale=None,
    dt_weight_scale=None,
    inputs=0,
    columns=0,
    rank_batch=0,
    w_stride=0,
    groups=0,
    GROUP: tl.constexpr = 0,
    K: tl.constexpr = 0,
    outer=None,
    inv=None,
    turned=None,
    scale=None,
    arrived=None,
    factor=1.0,
    blocks=1,
    order=1,
    INV_STRIDE: tl.constexpr = 0,
    BLOCKS: tl.constexpr = 0,
    M: tl.constexpr = 0,
    P: tl.constexpr = 0,
    LOG2_P: tl.constexpr = 0,
):
    """y [B, channels]; rank [B, inputs], times dt_weight, is dt, which is then written; turned is y transformed."""
    batch = tl.program_id(0).to(tl.int64)
    i, n = tl.program_id(1) * I + tl.arange(0, I), tl.arange(0, N)
    inside = i < channels
    entry = i.to(tl.int64)[:, None] * states + n[None, :]
    a = tl.load(A + entry, mask=inside[:, None] & (n < states)[None, :], other=0.0)
    if rank is not None:
        d = few_products(
            rank + batch * rank_batch,
            dt_weight,
            dt_group_scale,
            dt_weight_scale,
            i,
            inside,
            inputs,
            columns,
            w_stride,
            groups,
            GROUP,
            K,
        )
        d = d.to(dt.dtype.element_ty)
        tl.store(dt + batch * dt_batch + i, d, mask=inside)
    else:
        d = tl.load(dt + batch * dt_batch + i, mask=inside, other=0.0)
    d = softplus(d.to(tl.float32) + tl.load(dt_bias + i, mask=inside, other=0.0))
    v = tl.load(u + batch * u_batch + i, mask=inside, other=0).to(tl.float32)
    if u_scale is not None:
        v = v * tl.load(u_scale + i * U_STRIDE, mask=inside, other=0.0)
    b = tl.load(B + batch * B_batch + n, mask=n < states, other=0.0).to(tl.float32)
    c = tl.load(C + batch * C_batch + n, mask=n < states, other=0.0).to(tl.float32)
    row = batch * channels + i
    h = load_state(state, state_scale, row, n, inside, n < states, states)
    h = tl.exp(d[:, None] * a) * h + (d * v)[:, None] * b[None, :]
    if state is not None:
        tl.debug_barrier()  # every thread has read the state
        store_state(h, state, state_scale, row, n, inside, n < states, states)
    g = tl.load(z + batch * z_batch + i, mask=inside, other=0).to(tl.float32)
    if z_scale is not None:
        g = g * tl.load(z_scale + i * Z_STRIDE, mask=inside, other=0.0)
    read = (tl.sum(h * c[None, :], axis=1) + tl.load(D + i, mask=inside, other=0.0) * v) * silu(g)
    tl.store(y + row, read, mask=inside)
    if turned is not None:  # noqa: SIM102 (known when compiling)
        if last_to_arrive(arrived + batch, tl.num_programs(1)):
            hadamard_rows(
                y,
                outer,
                inv,
                turned,
                scale,
                batch,
                batch + 1,
                channels,
                channels,
                factor,
                blocks,
                order,
                INV_STRIDE,
                1,
                BLOCKS,
                M,
                P,
                LOG2_P,
            )


@triton.jit
def _ssd_step(
    x,
    dt,
    A,
    B,
    C,
    D,
    dt_bias,
    state,
    state_scale,
    x_scale,
    B_scale,
    C_scale,
    y,
    heads,
    width,
    states,
    shared,
    least,
    most,
    x_batch,
    dt_batch,
    B_batch,
    C_batch,
    X_STRIDE: tl.constexpr,
    B_STRIDE: tl.constexpr,
    C_STRIDE: tl.constexpr,
    D_PER_CHANNEL: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    z=None,
    z_scale=None,
    weight=None,
    gated=None,
    arrived=None,
    unit=0,
    units=0,
    z_stride=0,
    eps=0.0,
    Z_STRIDE: tl.constexpr = 0,
    NORM: tl.constexpr = "",
    UNIT_COLUMNS: tl.constexpr = 0,
    outer=None,
    inv=None,
    turned=None,
    scale=None,
    factor=1.0,
    blocks=1,
    order=1,
    INV_STRIDE: tl.constexpr = 0,
    BLOCKS: tl.constexpr = 0,
    M: tl.constexpr = 0,
    RUN: tl.constexpr = 0,
    LOG2_RUN: tl.constexpr = 0,
):
    """P channels of one head; y [B, heads, width]; `shared` heads have the same B and C. gated is y normed with its gate in
    `units` units of `unit` channels a row, turned is gated transformed."""
    head = tl.program_id(1)
    batch = tl.program_id(0).to(tl.int64)
    p, n = tl.program_id(2) * P + tl.arange(0, P), tl.arange(0, N)
    p_inside, n_inside = p < width, n < states
    d = tl.load(dt + batch * dt_batch + head).to(tl.float32) + tl.load(dt_bias + head)
    d = tl.minimum(tl.maximum(softplus(d), least), most)
    channel = tl.where(p_inside, head * width + p, 0)
    v = tl.load(x + batch * x_batch + channel, mask=p_inside, other=0).to(tl.float32)
    if x_scale is not None:
        v = v * tl.load(x_scale + channel * X_STRIDE)
    place = tl.where(n_inside, head // shared * states + n, 0)
    b = tl.load(B + batch * B_batch + place, mask=n_inside, other=0).to(tl.float32)
    if B_scale is not None:
        b = b * tl.load(B_scale + place * B_STRIDE)
    c = tl.load(C + batch * C_batch + place, mask=n_inside, other=0).to(tl.float32)
    if C_scale is not None:
        c = c * tl.load(C_scale + place * C_STRIDE)
    row = (batch * heads + head) * width + p
    h = load_state(state, state_scale, row, n, p_inside, n_inside, states)
    h = tl.exp(d * tl.load(A + head)) * h + (d * v)[:, None] * b[None, :]
    if state is not None:
        tl.debug_barrier()  # every thread has read the state
        store_state(h, state, state_scale, row, n, p_inside, n_inside, states)
    skip = tl.load(D + (channel if D_PER_CHANNEL else head))
    tl.store(y + row, tl.sum(h * c[None, :], axis=1) + skip * v, mask=p_inside)
    if gated is not None:  # noqa: SIM102 (known when compiling)
        if last_to_arrive(arrived + batch, tl.num_programs(1) * tl.num_programs(2)):
            total = heads * width
            for g in range(units):
                gate_units(
                    y,
                    z,
                    z_scale,
                    weight,
                    gated,
                    batch * units + g,
                    0,
                    (batch + 1) * units,
                    unit,
                    units,
                    total,
                    z_stride,
                    eps,
                    Z_STRIDE,
                    NORM,
                    1,
                    UNIT_COLUMNS,
                )
            if turned is not None:
                tl.debug_barrier()  # the whole row is gated
                hadamard_rows(
                    gated,
                    outer,
                    inv,
                    turned,
                    scale,
                    batch,
                    batch + 1,
                    total,
                    total,
                    factor,
                    blocks,
                    order,
                    INV_STRIDE,
                    1,
                    BLOCKS,
                    M,
                    RUN,
                    LOG2_RUN,
                )


def scan_step(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    state_scale: Tensor | None,
    u_scale: Tensor | None,
    z_scale: Tensor | None,
    y: Tensor,
    scale_strides: tuple[int, int],
) -> None:
    """`selective_scan` of one token `[B, 1, .]`, checked and dense as there, without a mask; scale_strides of u and z."""
    channels, states = A.shape
    N = power_of_two(states)
    I = min(power_of_two(channels), max(1, TILE // N))
    tensors = (dt, A, B, C, D, z, dt_bias, state, state_scale, u_scale, z_scale, y)
    sizes = (channels, states, *(t.stride(0) for t in (u, z, dt, B, C)), *scale_strides, I, N)
    launch(_scan_step, (len(u), cdiv(channels, I)), u, *tensors, *sizes, num_warps=4, **EXACT)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor | None,
    state_scale: Tensor | None,
    x_scale: Tensor | None,
    B_scale: Tensor | None,
    C_scale: Tensor | None,
    y: Tensor,
    states: int,
    groups: int,
    dt_limit: tuple[float, float],
    scale_strides: tuple[int, int, int],
) -> None:
    """`ssd_scan` of one token, x, B, C `[B, 1, channels]`, checked and dense as there, without a mask; y `[B, 1, H, P]`;
    scale_strides of x, B and C."""
    heads, width = y.shape[2:]
    N = power_of_two(states)
    P = min(power_of_two(width), max(1, SSD_TILE // N))
    tensors = (dt, A, B, C, D, dt_bias, state, state_scale, x_scale, B_scale, C_scale, y)
    sizes = (heads, width, states, heads // groups, *map(float, dt_limit), *(t.stride(0) for t in (x, dt, B, C)))
    shape = (*scale_strides, D.dim() == 2, P, N)
    launch(_ssd_step, (len(x), heads, cdiv(width, P)), x, *tensors, *sizes, *shape, num_warps=4, **EXACT)
