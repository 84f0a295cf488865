"""What the kernels share: rounding, elementary functions, and how they are launched."""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from quamba_kernels.recording import listening

EXACT = {"enable_fp_fusion": False}
"""Options of kernels that promise the reference's roundings: no product is fused with a sum. FUSED is for the others."""
FUSED = {"enable_fp_fusion": True}


@triton.jit
def to_codes(y, inv):
    """int8 codes of float32 `y`: `y * inv` saturated and rounded half to even, as adding 1.5 * 2^23 does."""
    q = tl.minimum(tl.maximum(y * inv, -128.0), 127.0)
    return ((q + 12582912.0) - 12582912.0).to(tl.int32).to(tl.int8)


@triton.jit
def largest(y):
    """The largest magnitude in each row of float32 [R, C], NaN where there is one: bits of positive floats are ordered as
    the floats are, and NaN's come last."""
    return tl.max(tl.abs(y).to(tl.int32, bitcast=True), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def row_codes(y):
    """int8 codes of float32 y [R, C], and the scale of each row [R]."""
    most = largest(y)
    return to_codes(y, tl.div_rn(127.0, tl.maximum(most, 1e-10))[:, None]), tl.div_rn(most, 127.0)


@triton.jit
def load_state(state, scale, row, column, row_inside, column_inside, width):
    """float32 [R, C] of entries `column` of `row` in state [rows, width], which has a scale for each row if it is codes; 0 for
    what isn't inside, and without a state."""
    inside = row_inside[:, None] & column_inside[None, :]
    if state is None:
        h = tl.zeros(inside.shape, tl.float32)
    else:
        h = tl.load(state + row[:, None] * width + column[None, :], mask=inside, other=0).to(tl.float32)
        if scale is not None:
            h = h * tl.load(scale + row, mask=row_inside, other=0.0)[:, None]
    return h


@triton.jit
def store_state(h, state, scale, row, column, row_inside, column_inside, width):
    """Write float32 h [R, C] where `load_state` reads it. What isn't inside must be 0."""
    if scale is not None:
        v, s = row_codes(h)
        tl.store(scale + row, s, mask=row_inside)
    elif state.dtype.element_ty == tl.float16:
        v = tl.clamp(h, -65504.0, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    else:
        v = h
    inside = row_inside[:, None] & column_inside[None, :]
    tl.store(state + row[:, None] * width + column[None, :], v, mask=inside)


@triton.jit
def silu(y):
    return y / (1.0 + tl.exp(-y))


@triton.jit
def softplus(y):
    """`log(1 + exp(y))`: max(y, 0) + log(1 + e) with e = exp(-|y|), the logarithm as the series of 2 atanh(e / (2 + e)), which
    keeps the digits of a small e. Above 20 it is the identity to the last bit."""
    e = tl.exp(-tl.abs(y))
    s = e / (2.0 + e)
    q = s * s
    tail = 0.14285715 + q * (0.11111111 + q * (0.09090909 + q * (0.07692308 + q * 0.06666667)))
    return tl.maximum(y, 0.0) + 2.0 * s * (1.0 + q * (0.33333334 + q * (0.2 + q * tail)))


@triton.jit
def store_rows(y, row, column, inside, rows, width, out, scale, inv, INV_STRIDE: tl.constexpr):
    """Write float32 y [R, C], entries `column` of `row`, to out [rows, width]: codes with a scale for each row when scale is
    given, codes by inv when that is, else floats. What isn't inside [R, C] must be 0."""
    if scale is not None:
        v, s = row_codes(y)
        tl.store(scale + row, s, mask=row < rows)
    elif inv is not None:
        v = to_codes(y, tl.load(inv + column * INV_STRIDE, mask=column < width, other=0.0)[None, :])
    else:
        v = y.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * width + column[None, :], v, mask=inside)


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is launched with, by name: its arguments and Triton's options."""

    kernel: Any
    grid: tuple[int, ...]
    given: dict[str, Any]

    def __call__(self) -> None:
        x = self.given[self.kernel.arg_names[0]]
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            self.kernel[self.grid](**self.given)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **given: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor; tell a recorder of it."""
    step = Launch(kernel, grid, dict(zip(kernel.arg_names, args, strict=False)) | given)
    recorder = listening.to
    if recorder is None:
        step()
        return
    recorder.paused = True  # the interpreter moves its arguments about with torch
    try:
        step()
    finally:
        recorder.paused = False
    recorder.note(step)


FEW_ROWS = 16
"""Up to so many tokens a kernel that needs whole rows takes one at a time, as do kernels that do its work at their end."""


ON_AMD = tl.constexpr(torch.version.hip is not None)


@triton.jit
def last_to_arrive(count, expected):
    """Whether this program is the last of `expected` to come here; the count, at first 0, is then 0 again. What the others
    wrote before can then be read, past the nearest cache: cache_modifier=".cg"."""
    if ON_AMD:  # a barrier waits for no stores there, and a release only for those of the wave that makes it
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, 0", "=v,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    last = tl.atomic_add(count, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(count, 0)
    return last


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """`[rows, width]` of `[..., width]`, the last stride 1."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def tile_rows(rows: int, columns: int, entries: int) -> tuple[int, int]:
    """How many rows of so many columns a program holds, `entries` in all unless the rows are few, and its warps: 32 registers
    a thread for them, at most 512 threads."""
    if rows <= FEW_ROWS:
        return 1, 4 if columns <= 8192 else 16
    R = max(1, entries // columns)
    return R, min(16, max(4, R * columns // 1024))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; 1 for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def product_precision() -> str:
    """How kernels multiply float32 matrices: AMD's matrix instructions take float32; NVIDIA's take it in three products of
    TF32, which lose 2^-21 of each product of two entries."""
    return "ieee" if torch.version.hip else "tf32x3"


def write_back(work: Tensor | None, given: Tensor | None) -> None:
    """Copy what a kernel wrote to where it belongs, if that is elsewhere."""
    if work is not None and given is not None and work.data_ptr() != given.data_ptr():
        given.copy_(work)
