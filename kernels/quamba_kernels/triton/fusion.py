"""Fewer launches in a recorded token: neighbouring steps that one kernel can do become one.

| steps | kernel |
|---|---|
| two products of the same x with neighbouring rows of a weight, codes and floats | `_linear` with rest |
| a product, its conversion, the sum with the residual | `_linear` with total |
| that, and the next block's norm | `_linear` with normed |
| a token's convolution and the product that reads it | `conv_product` |
| the product that makes dt, and a token's scan | `_scan_step` with rank |
| a token's scan, [gate, norm,] Hadamard transform | `_scan_step`, `_ssd_step` with turned |

Only few rows are treated so: then launches are what costs time. Every step still writes what it wrote, but for conversions
that nobody else reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor

from quamba_kernels.recording import aten, tensors
from quamba_kernels.triton.common import EXACT, FEW_ROWS, Launch, cdiv, power_of_two
from quamba_kernels.triton.convolution import _conv, conv_product
from quamba_kernels.triton.matmul import TYPES, _linear, work
from quamba_kernels.triton.rotation import _hadamard
from quamba_kernels.triton.rows import _gate, _norm
from quamba_kernels.triton.steps import _scan_step, _ssd_step

MOST_COLUMNS = 512  # of dt's product in a scan
CONV_COLUMNS = 64  # of the weight that a program multiplies after its convolution


@dataclass(frozen=True)
class Operation:
    """A call of torch, with what it reads and writes in `args` and `kwargs`."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self) -> None:
        self.function(*self.args, **self.kwargs)


Step = Launch | Operation
Uses = Counter[int]


def fused(steps: list[Step], result: Tensor) -> list[Step]:
    """The same in fewer steps. result: what is read when they are done."""
    uses: Uses = Counter(t.untyped_storage().data_ptr() for step in steps for t in touched(step))
    uses[result.untyped_storage().data_ptr()] += 1
    rules: tuple[tuple[Callable, int], ...] = (
        (_neighbours, 2),
        (_converted_residual, 3),
        (_residual, 2),
        (_norm_after, 2),
        (_conv_before, 2),
        (_dt_before, 2),
        (_gate_after, 2),
        (_hadamard_after, 2),
    )
    for rule, size in rules:
        done: list[Step] = []
        while steps:
            new = rule(*steps[:size], uses) if len(steps) >= size else None
            done.append(steps[0] if new is None else new)
            steps = steps[1 if new is None else size :]
        steps = done
    return steps


def touched(step: Step) -> Iterable[Tensor]:
    return tensors(step.given.values()) if isinstance(step, Launch) else tensors([*step.args, *step.kwargs.values()])


def _is(step: Step, *kernels: Any) -> TypeGuard[Launch]:
    return isinstance(step, Launch) and any(step.kernel is kernel for kernel in kernels)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are the same entries in the same order, in whatever shape."""
    if a is None or b is None:
        return a is b
    dense = a.is_contiguous() and b.is_contiguous()
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype and a.numel() == b.numel() and dense


def _joined(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """One tensor for two that lie one after the other along the first axis; ValueError if they don't."""
    if a is None and b is None:
        return None
    if a is None or b is None or a.stride() != b.stride() or a.dtype != b.dtype:
        raise ValueError("not of one kind")
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr() or len(a) * a.stride(0) != (
        b.storage_offset() - a.storage_offset()
    ):
        raise ValueError("not neighbours")
    return a.as_strided((len(a) + len(b), *a.shape[1:]), a.stride())


def _extended(step: Launch, kernel: Any = None, **given: Any) -> Launch:
    return replace(step, kernel=kernel or step.kernel, given=step.given | given)


def _wider(step: Launch, other: Launch) -> bool:
    """Whether its rows need the registers of more warps than the other has."""
    return step.given["num_warps"] > other.given["num_warps"]


def _count(x: Tensor, entries: int = 1) -> Tensor:
    return torch.zeros(entries, dtype=torch.int32, device=x.device)


def _neighbours(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _linear) or not _is(b, _linear):
        return None
    p, q = a.given, b.given
    shared = ("GROUP", "T", "SUM", "rows", "columns", "x_stride")
    if p["x"].data_ptr() != q["x"].data_ptr() or any(p[name] != q[name] for name in shared):
        return None
    if not _same(p["x_scale"], q["x_scale"]) or p["rows"] > FEW_ROWS or p["inv"] is None or q["inv"] is not None:
        return None
    if p["rest"] is not None or q["out"].dtype != torch.float32:
        return None
    try:
        joined = {name: _joined(p[name], q[name]) for name in ("weight", "group_scale", "weight_scale", "bias")}
    except ValueError:
        return None
    outputs, x = p["outputs"] + q["outputs"], p["x"]
    dtype = next(dtype for dtype, kind in TYPES.items() if kind == p["T"])
    grid, given, options = work(p["rows"], outputs, p["columns"], dtype, p["GROUP"], x.device)
    return Launch(_linear, grid, p | joined | given | options | {"outputs": outputs, "rest": q["out"]})


def _add(step: Step) -> tuple[Tensor, Tensor, Tensor] | None:
    """The two summands and the sum of an addition."""
    if not isinstance(step, Operation) or step.function is not aten.add.out or set(step.kwargs) != {"out"}:
        return None
    a, b, out = *step.args, step.kwargs["out"]
    return (a, b, out) if isinstance(b, Tensor) and a.shape == b.shape == out.shape else None


def _converted_residual(a: Step, copy: Step, add: Step, uses: Uses) -> Launch | None:
    if not _is(a, _linear) or not isinstance(copy, Operation) or copy.function is not aten.copy_.default:
        return None
    to, source = copy.args[:2]
    if not _same(a.given["out"], source) or uses[to.untyped_storage().data_ptr()] != 2:  # here and in the sum
        return None
    return _with_total(a, to, add)


def _residual(a: Step, add: Step, uses: Uses) -> Launch | None:
    return _with_total(a, a.given["out"], add) if _is(a, _linear) else None


def _with_total(a: Launch, y: Tensor, add: Step) -> Launch | None:
    found = _add(add)
    p = a.given
    if found is None or p["rows"] > FEW_ROWS or p["inv"] is not None or p.get("total") is not None:
        return None
    residual = found[1] if _same(found[0], y) else found[0] if _same(found[1], y) else None
    total = found[2]
    if residual is None or not total.is_contiguous() or not residual.is_contiguous():
        return None
    if not total.dtype == residual.dtype == y.dtype:
        return None
    return _extended(a, residual=residual, total=total, residual_stride=p["outputs"])


def _norm_after(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _linear) or not _is(b, _norm) or a.given.get("total") is None:
        return None
    p, q = a.given, b.given
    if not _same(p["total"], q["x"]) or q["weight"] is None or p["row_tiles"] != 1 or q["R"] != 1 or _wider(b, a):
        return None
    return _extended(
        a,
        norm_weight=q["weight"],
        norm_inv=q["inv"],
        normed=q["out"],
        norm_scale=q["scale"],
        norm_arrived=_count(p["x"]),
        eps=q["eps"],
        NORM_INV_STRIDE=q["INV_STRIDE"],
        NORM_COLUMNS=q["C"],
    )


def _conv_before(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _conv) or not _is(b, _linear):
        return None
    p, q = a.given, b.given
    if p["length"] != 1 or p["mask"] is not None or p["state"] is None or not _same(p["out"], q["x"]):
        return None
    if q["rows"] > FEW_ROWS or q["rest"] is not None or q.get("total") is not None:
        return None
    x, BM, BN = p["x"], 16, 64
    programs = cdiv(q["columns"], CONV_COLUMNS)
    total = torch.int32 if q["x"].dtype == torch.int8 else torch.float32
    given = {name: q[name] for name in ("weight", "group_scale", "x_scale", "weight_scale", "bias", "inv", "out")}
    given |= {name: q[name] for name in ("rows", "outputs", "columns", "w_stride", "groups")}
    given |= {name: q[name] for name in ("X_SCALE_STRIDE", "INV_STRIDE", "GROUP", "T", "SUM")}
    given |= {name: p[name] for name in ("x", "state", "channels", "x_batch", "s_batch", "s_channel", "s_tap", "TAPS")}
    given |= {"conv_weight": p["weight"], "conv_bias": p["bias"], "conv_inv": p["inv"], "conved": p["out"]}
    given |= {"conv_x_scale": p["x_scale"], "conv_scale": p["weight_scale"], "CONV_SUM": p["SUM"]}
    given |= {"CONV_X_SCALE_STRIDE": p["X_SCALE_STRIDE"], "CONV_INV_STRIDE": p["INV_STRIDE"]}
    given |= {"parts": torch.empty(programs, q["rows"], q["outputs"], dtype=total, device=x.device)}
    given |= {"arrived": _count(x), "BM": BM, "BN": BN, "BK": CONV_COLUMNS, "num_warps": 4}
    return Launch(conv_product, (1, programs), given | EXACT)


def _dt_before(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _linear) or not _is(b, _scan_step):
        return None
    p, q = a.given, b.given
    plain = all(p.get(name) is None for name in ("x_scale", "bias", "inv", "rest", "total"))
    if not plain or not _same(p["out"], q["dt"]) or p["rows"] > FEW_ROWS or p["columns"] > MOST_COLUMNS:
        return None
    return _extended(
        b,
        rank=p["x"],
        dt_weight=p["weight"],
        dt_group_scale=p["group_scale"],
        dt_weight_scale=p["weight_scale"],
        inputs=p["inputs"],
        columns=p["columns"],
        rank_batch=p["x_stride"],
        w_stride=p["w_stride"],
        groups=p["groups"],
        GROUP=p["GROUP"],
        K=power_of_two(p["columns"]),
    )


def _gate_after(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _ssd_step) or not _is(b, _gate) or not _same(a.given["y"], b.given["x"]):
        return None
    q, batch = b.given, len(a.given["y"])
    if batch > FEW_ROWS or _wider(b, a):
        return None
    return _extended(
        a,
        z=q["z"],
        z_scale=q["z_scale"],
        weight=q["weight"],
        gated=q["out"],
        arrived=_count(q["x"], batch),
        unit=q["width"],
        units=q["groups"],
        z_stride=q["z_stride"],
        eps=q["eps"],
        Z_STRIDE=q["SCALE_STRIDE"],
        NORM=q["NORM"],
        UNIT_COLUMNS=power_of_two(q["width"]),
    )


def _hadamard_after(a: Step, b: Step, uses: Uses) -> Launch | None:
    if not _is(a, _scan_step, _ssd_step) or not _is(b, _hadamard):
        return None
    p, q = a.given, b.given
    of_ssd = a.kernel is _ssd_step
    read = p.get("gated") if of_ssd else p["y"]
    if read is None or not _same(read, q["x"]) or len(p["y"]) > FEW_ROWS or _wider(b, a):
        return None
    given = {name: q[name] for name in ("outer", "inv", "scale", "factor", "blocks", "order", "INV_STRIDE", "M")}
    given |= {"turned": q["out"], "BLOCKS": q["B"]}
    given |= {"RUN": q["P"], "LOG2_RUN": q["LOG2_P"]} if of_ssd else {"P": q["P"], "LOG2_P": q["LOG2_P"]}
    return _extended(a, **given, **({} if of_ssd else {"arrived": _count(p["y"], len(p["y"]))}))
