"""What the tests on a GPU share: the device, fresh inputs on it, and comparisons with float64 results.

Without a device the files that import this are skipped. In Triton's interpreter (TRITON_INTERPRET=1) they run in main memory,
all but the large sizes: slowly, to see that the tests themselves are right.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quamba_kernels import reference, triton

INTERPRETED = triton.interpreting()
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA or ROCm device", allow_module_level=True)
if not triton.available():
    pytest.skip(triton.why_not(), allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
RUNS = 2 if INTERPRETED else 10
LARGE = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")
COMPILED = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GROUPS = [(group, kind) for group in (32, 64, 128) for kind in (torch.int8, torch.float16)]


def large(*sizes: tuple) -> list:
    """Parameters that only a device takes."""
    return [pytest.param(*size, marks=LARGE) for size in sizes]


class Random:
    """Tensors on the device, drawn from a seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=DEVICE)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        """From low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator, device=DEVICE, dtype=dtype)

    def codes(self, *shape: int) -> Tensor:
        return self.integers(-128, 127, *shape)

    def mask(self, batch: int, length: int) -> Tensor:
        """bool [batch, length]: each row's first tokens are padding, from none to all but one; the first row has none."""
        padding = self.integers(0, max(0, length - 1), batch, 1, dtype=torch.int64)
        padding[0] = 0
        return torch.arange(length, device=DEVICE) >= padding

    def int4(self, outputs: int, inputs: int, group: int, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """packed, group_scale and weight_scale: all 16 codes, scales of both signs; float ones round and saturate."""
        groups = -(-inputs // group)
        q = self.integers(-8, 7, outputs, inputs)
        scale = self.integers(-15, 15, outputs, groups)
        if kind == torch.float16:
            scale = (self.normal(outputs, groups) * 10).half()
        return reference.pack_int4(q, group), scale, self.uniform(outputs) / inputs + 1e-4


def stable(call: Callable[[], Tensor | tuple[Tensor, ...]]):
    """`call()`, which gives the same bits in every run. What it overwrites it has to copy first."""
    first = call()
    for _ in range(RUNS - 1):
        again = call()
        pairs = zip(_flat(first), _flat(again), strict=True)
        assert all(same_bits(a, b) for a, b in pairs), "not the same bits in every run"
    return first


def _flat(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def same_bits(a: Tensor, b: Tensor) -> bool:
    a_bytes, b_bytes = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a_bytes, b_bytes)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Floats within `tolerance` of the largest entry of the float64 `want`, and half a unit in their own last place."""
    assert want.dtype == torch.float64 and got.is_floating_point()
    assert got.shape == want.shape, f"{list(got.shape)}, not {list(want.shape)}"
    if got.numel() == 0:
        return
    assert bool(torch.isfinite(got).all()), f"{int((~torch.isfinite(got)).sum())} of {got.numel()} aren't finite"
    kind, largest = torch.finfo(got.dtype), float(want.abs().max())
    unit = 1.0 if INTERPRETED and got.dtype == torch.bfloat16 else 0.5  # the interpreter cuts off what it can't keep
    off = (got.double() - want).abs() - want.abs() * (unit * kind.eps) - kind.smallest_normal * kind.eps
    assert float(off.max()) <= tolerance * largest, (
        f"off by {float(off.max()) / max(largest, 1e-300):.2e} of the largest"
    )


def rounded(got: Tensor, value: Tensor, tolerance: float = 1e-5) -> None:
    """int8 codes of the float64 `value`, not yet saturated, which is known within `tolerance` of its largest entry: where
    both neighbours are possible, either."""
    assert got.dtype == torch.int8 and value.dtype == torch.float64
    assert got.shape == value.shape, f"{list(got.shape)}, not {list(value.shape)}"
    if got.numel() == 0:
        return
    off = (got.double() - value.clamp(-128, 127)).abs().max()
    assert float(off) <= 0.5 + tolerance * float(value.abs().max()), f"off by {float(off):.4f} codes"


def per_token(got: tuple[Tensor, Tensor], value: Tensor, tolerance: float) -> None:
    """Codes and scales float32 `[..., 1]` of the float64 rows `value`."""
    codes, scale = got
    want = value.abs().amax(-1, keepdim=True)
    assert scale.dtype == torch.float32 and scale.shape == want.shape
    assert bool(((scale.double() * 127 - want).abs() <= (tolerance + 2e-7) * want).all())
    rounded(codes, value * (127 / want.clamp(min=1e-10)), tolerance + 2e-7)
