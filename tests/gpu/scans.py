"""Inputs of both scans, and what float64 makes of them."""

import torch
from torch import Tensor

from quamba_kernels import triton
from tests.gpu import truth
from tests.gpu.cases import DEVICE, Random

PER_TOKEN = {"selective_scan": ("u", "dt", "B", "C", "z"), "ssd_scan": ("x", "dt", "B", "C")}
Inputs = dict[str, Tensor]


def selective_scan(
    rng: Random, batch: int, length: int, inner: int, states: int, dtype=torch.float32, codes=False
) -> Inputs:
    """What enters per token is in `dtype`; with codes u and z are int8."""
    i = {name: rng.normal(batch, length, inner, dtype=dtype) for name in ("u", "dt", "z")}
    i |= {name: rng.normal(batch, length, states, dtype=dtype) for name in ("B", "C")}
    i |= {"A": -rng.uniform(inner, states) * 16, "D": rng.normal(inner), "dt_bias": rng.normal(inner) - 3}
    if codes:
        i |= {"u": rng.codes(batch, length, inner), "z": rng.codes(batch, length, inner)}
        i |= {"u_scale": rng.uniform(inner) / 30, "z_scale": torch.tensor(0.04, device=DEVICE)}
    return i


def ssd_scan(
    rng: Random,
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    states: int,
    dtype=torch.float32,
    codes=False,
    D_per_channel=False,
) -> Inputs:
    """What enters per token is in `dtype`; with codes x, B and C are int8."""
    shapes = {"x": (heads, width), "dt": (heads,), "B": (groups, states), "C": (groups, states)}
    i = {name: rng.normal(batch, length, *shape, dtype=dtype) for name, shape in shapes.items()}
    i |= {"A": -rng.normal(heads).exp(), "D": rng.normal(heads, width) if D_per_channel else rng.normal(heads)}
    i["dt_bias"] = rng.normal(heads) - 2
    if codes:
        i |= {name: rng.codes(batch, length, *shapes[name]) for name in ("x", "B", "C")}
        i |= {"x_scale": rng.uniform(heads * width) / 64, "B_scale": rng.uniform(groups * states) / 64}
        i["C_scale"] = torch.tensor(0.01, device=DEVICE)
    return i


def exact(
    op: str, inputs: Inputs, state: Tensor | None, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """y and the end of the state in float64."""
    i = {name: t for name, t in inputs.items() if not name.endswith("_scale")}
    for name, t in i.items():
        scale = inputs.get(f"{name}_scale")
        if scale is not None and scale.ndim and op == "ssd_scan":
            scale = scale.view(t.shape[2:])
        i[name] = truth.real(t, scale)
    start = None if state is None else state.double()
    return getattr(truth, op)(**i, state=start, mask=mask, **options)


def run(op: str, inputs: Inputs, start: Tensor | None, **options) -> tuple[Tensor, ...]:
    """y and the end of the state of the kernel, which gets a copy of the start."""
    state = None if start is None else start.clone()
    y = getattr(triton, op)(**inputs, state=state, **options)
    return (y,) if state is None else (y, state)


def pieces(op: str, inputs: Inputs, cut: int) -> list[Inputs]:
    """The inputs of the tokens before and from `cut`."""
    parts = (slice(cut), slice(cut, None))
    return [{name: t[:, part] if name in PER_TOKEN[op] else t for name, t in inputs.items()} for part in parts]
