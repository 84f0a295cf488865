"""What stands between a malformed call and C."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT8 = (torch.int8,)
FLOATS_OR_INT8 = (*FLOATS, torch.int8)
BOOL = (torch.bool,)


def check(name: str, t: Tensor, dtypes: Sequence[torch.dtype], *shape: int) -> None:
    """Raise TypeError for a tensor of another dtype or device, ValueError for another shape; -1 stands for any size."""
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(t.dtype).removeprefix("torch.") if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected {wanted}, got {got}")
    if not t.is_cpu:
        raise TypeError(f"{name}: expected a tensor in main memory, got one on {t.device}")
    if t.shape == shape:
        return
    if t.dim() != len(shape) or any(want not in (-1, have) for want, have in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("*" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(t.shape)}")


def last_axis(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> int:
    """Size of the last axis of a tensor of any other shape, checked like `check`."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise ValueError(f"{name}: expected a tensor with at least one axis")
    check(name, x, dtypes, *[-1] * x.dim())
    return x.shape[-1]


def vector(name: str, t: Tensor, size: int) -> tuple[Tensor, int]:
    """A scale or inv: float32, 0-d or `[size]`. Returns it contiguous with its stride, 0 or 1."""
    if isinstance(t, Tensor) and t.numel() == 1 and t.dim() <= 1:
        check(name, t, FLOAT32, *t.shape)
        return t, 0
    check(name, t, FLOAT32, size)
    return t.contiguous(), 1


def code_scale(name: str, x: Tensor, scale: Tensor | None, size: int) -> tuple[Tensor | None, int]:
    """The scale that belongs to int8 codes `x` and not to floats, as `vector` returns it."""
    if (x.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"{name}_scale: belongs to int8 codes, and {name} is {x.dtype}")
    return (None, 0) if scale is None else vector(f"{name}_scale", scale, size)


def float_vector(name: str, t: Tensor, size: int) -> Tensor:
    """A parameter `[size]` in any float dtype, as contiguous float32."""
    check(name, t, FLOATS, size)
    return t.float().contiguous()


def tokens(t: Tensor) -> Tensor:
    """`[B, L, C]` ready for C: float32 or int8, the last stride 1, the others as they are."""
    t = t if t.dtype == torch.int8 else t.float()
    return t if t.stride(-1) == 1 else t.contiguous()


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for C to write to, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=dtype, device="cpu")


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to see this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
