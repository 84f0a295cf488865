"""What stands between a malformed call and a kernel: each error names the tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from quamba_kernels.reference.int4 import group_size
from quamba_kernels.reference.state import check_state_scale

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FLOAT32 = (torch.float32,)
INT8 = (torch.int8,)
FLOATS_OR_INT8 = (*FLOATS, torch.int8)
BOOL = (torch.bool,)
STATES = (torch.float32, torch.float16, torch.int8)

MAX_INPUTS = 2**17 - 1  # more products of -128 * -128 overflow int32


def check(name: str, t: Tensor, dtypes: Sequence[torch.dtype], *shape: int, device: torch.device | None = None) -> None:
    """Raise TypeError for a tensor of another dtype or device, ValueError for another shape; -1 stands for any size.

    device: where the tensor has to be; in main memory when None. The other checks pass theirs on.
    """
    if not isinstance(t, Tensor) or t.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(t.dtype).removeprefix("torch.") if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name}: expected {wanted}, got {got}")
    if not (t.is_cpu if device is None else t.device == device):
        raise TypeError(
            f"{name}: expected a tensor {f'on {device}' if device else 'in main memory'}, got one on {t.device}"
        )
    if t.shape == shape:
        return
    if t.dim() != len(shape) or any(want not in (-1, have) for want, have in zip(shape, t.shape, strict=True)):
        wanted = ", ".join("*" if n == -1 else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(t.shape)}")


def last_axis(name: str, x: Tensor, dtypes: Sequence[torch.dtype], device: torch.device | None = None) -> int:
    """Size of the last axis of a tensor of any other shape, checked like `check`."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise ValueError(f"{name}: expected a tensor with at least one axis")
    check(name, x, dtypes, *[-1] * x.dim(), device=device)
    return x.shape[-1]


def vector(name: str, t: Tensor, size: int, device: torch.device | None = None) -> tuple[Tensor, int]:
    """A scale or inv: float32, 0-d or `[size]`. Returns it contiguous with its stride, 0 or 1."""
    if isinstance(t, Tensor) and t.numel() == 1 and t.dim() <= 1:
        check(name, t, FLOAT32, *t.shape, device=device)
        return t, 0
    check(name, t, FLOAT32, size, device=device)
    return t.contiguous(), 1


def code_scale(
    name: str, x: Tensor, scale: Tensor | None, size: int, device: torch.device | None = None
) -> tuple[Tensor | None, int]:
    """The scale that belongs to int8 codes `x` and not to floats, as `vector` returns it."""
    if (x.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"{name}_scale: belongs to int8 codes, and {name} is {x.dtype}")
    return (None, 0) if scale is None else vector(f"{name}_scale", scale, size, device)


def float_vector(name: str, t: Tensor, size: int, device: torch.device | None = None) -> Tensor:
    """A parameter `[size]` in any float dtype, as contiguous float32."""
    check(name, t, FLOATS, size, device=device)
    return t.float().contiguous()


def check_sums(inputs: int) -> None:
    """ValueError for so many inputs that a sum of int8 products could overflow int32."""
    if inputs > MAX_INPUTS:
        raise ValueError(f"x: {inputs} inputs could overflow int32, the most is {MAX_INPUTS}")


def check_epilogue(outputs: int, weight_scale: Tensor, bias: Tensor | None, device: torch.device | None = None) -> None:
    check("weight_scale", weight_scale, FLOAT32, outputs, device=device)
    if bias is not None:
        check("bias", bias, FLOAT32, outputs, device=device)


def check_x_scale(x: Tensor, x_scale: Tensor, device: torch.device | None = None) -> None:
    """float32, 0-d or one entry, or one for each token of x."""
    whole = isinstance(x_scale, Tensor) and x_scale.numel() == 1
    check("x_scale", x_scale, FLOAT32, *(x_scale.shape if whole else (*x.shape[:-1], 1)), device=device)


def check_codes(x: Tensor, weight: Tensor, device: torch.device | None = None) -> tuple[int, int]:
    """(outputs, inputs) of the product of int8 codes x `[..., K]` and weight `[N, K]`."""
    inputs = last_axis("x", x, INT8, device)
    check("weight", weight, INT8, -1, inputs, device=device)
    check_sums(inputs)
    return weight.shape[0], inputs


def check_packed(packed: Tensor, group_scale: Tensor, inputs: int, device: torch.device | None = None) -> int:
    """The group size of packed int4 codes."""
    check("packed", packed, (torch.uint8,), -1, -1, device=device)
    check("group_scale", group_scale, (torch.int8, torch.float16), packed.shape[0], -1, device=device)
    return group_size(packed, group_scale, inputs)


def check_state(
    state: Tensor | None, state_scale: Tensor | None, *shape: int, device: torch.device | None = None
) -> None:
    """A scan's state of that shape, float32, float16, or int8 codes with a scale for each row."""
    if state is not None:
        check("state", state, STATES, *shape, device=device)
    check_state_scale(state, state_scale)
    if state_scale is not None:
        check("state_scale", state_scale, FLOAT32, *shape[:-1], device=device)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd would have to see this call."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
