"""GPTQ (arXiv 2210.17323): round a weight column by column, and let the columns to come make up for each one's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.plan import WeightSpec
from quamba.quantizer.weights import (
    group_factors,
    grouped,
    int4_scales,
    int8_scale,
    round_codes,
    store_int4,
    store_int8,
    weighing,
)

BLOCK = 128
"""Columns between two updates of all the columns after them. Every group size divides it."""

ROWS = 8192
"""Rows rounded at a time: rows don't depend on each other."""

ATTEMPTS = 4
"""How often the damping is raised tenfold before the Hessian is given up."""


class Hessian:
    """Second derivatives of a linear's squared output error by any one row of its weight: `2/n XᵀX` for inputs X
    `[n, K]`. Sums are float64 and depend on the order and size of the batches in their last bits only."""

    def __init__(self, inputs: int):
        self.inputs, self.count = inputs, 0
        self._sum: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """x float `[..., K]`. Raises QuambaError for NaN or Inf."""
        rows = x.reshape(-1, self.inputs).float()
        product = rows.T @ rows
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise QuambaError("GPTQ met NaN or infinite inputs: the model or its calibration text is broken")
        if self._sum is None:
            self._sum = torch.zeros_like(product, dtype=torch.float64)
        self._sum += product
        self.count += len(rows)

    def matrix(self) -> Tensor:
        """float64 `[K, K]`. Raises QuambaError if there was no input."""
        return self._total() * (2 / self.count)

    def diagonal(self) -> Tensor:
        """The mean square of each input, float64 `[K]`. Raises QuambaError if there was no input."""
        return self._total().diagonal() / self.count

    def _total(self) -> Tensor:
        if self._sum is None or self.count == 0:
            raise QuambaError("GPTQ has seen no inputs: calibration needs at least one sample")
        return self._sum


@torch.no_grad()
def gptq(
    weight: Tensor,
    spec: WeightSpec,
    hessian: Hessian,
    *,
    splits: Sequence[int] | None = None,
    clip: str = "search",
    damping: float = 0.01,
    act_order: bool = False,
) -> dict[str, Tensor]:
    """The tensors of `quantize_weight` for `weight`, float `[out, in]`, chosen for small errors of the outputs.

    damping: added to the Hessian's diagonal, a share of its mean. act_order: inputs of large mean square first; then all
    scales come from the original weight. Otherwise only row scales do, and a group's factor is found when its turn comes,
    with the errors so far made up for. Weights of inputs that are always 0 become 0.

    Raises QuambaError where the Hessian can't be inverted.
    """
    power = hessian.diagonal().to(weight.device)
    rows = weight * (power > 0)
    order, matrix = torch.arange(rows.shape[1], device=rows.device), hessian.matrix().to(rows.device)
    if act_order:
        order = power.argsort(descending=True, stable=True)
        matrix = matrix[order][:, order]
    upper = inverse_root(matrix, damping).float()

    group = spec.group or rows.shape[1]
    weigh = weighing(power, rows, group)
    if spec.bits == 8:
        row_scale = int8_scale(rows, spec, splits, clip, power)
        factor = torch.ones_like(row_scale)[:, None]
    else:
        row_scale, factor = int4_scales(rows, spec, clip, power)

    def choose(run: int, columns: Tensor, row_scale: Tensor) -> Tensor:
        return group_factors(grouped(columns.T.contiguous(), group), row_scale, spec, clip, weigh[run])[0][:, 0]

    codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    fixed = spec.bits == 8 or act_order
    for start in range(0, len(rows), ROWS):
        part = slice(start, start + ROWS)
        scales = row_scale[part], factor[part]
        codes[part] = round_columns(rows[part], *scales, spec, upper, order, None if fixed else choose)
    return store_int8(codes, row_scale, spec) if spec.bits == 8 else store_int4(codes, row_scale, factor, spec)


def round_columns(
    rows: Tensor,
    row_scale: Tensor,
    factor: Tensor,
    spec: WeightSpec,
    upper: Tensor,
    order: Tensor,
    choose: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Codes int8 `[out, in]` of `rows` float `[out, in]`, column by column.

    row_scale `[out]` times factor `[out, groups]` is a group's step; order: the columns in the order they are rounded;
    upper: `inverse_root` of the Hessian in that order. choose(group, columns, row_scale), if given, gives the factors
    `[out]` of a group, `columns` `[group, out]`, when its first column's turn comes; they replace those in `factor`.
    """
    group = spec.group or rows.shape[1]
    left = rows[:, order].T.float().contiguous()  # a column's weights side by side in memory
    codes = torch.empty(left.shape, dtype=torch.int8, device=rows.device)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        error = torch.empty_like(left[start:stop])
        for k, column in enumerate(order[start:stop].tolist(), start):
            run = column // group
            if choose is not None and column % group == 0:
                factor[:, run] = choose(run, left[k : k + group], row_scale)
            step = row_scale * factor[:, run]
            code = round_codes(left[k], step, spec.bits)
            codes[column] = code.to(torch.int8)
            torch.addcmul(left[k], code, step, value=-1, out=error[k - start]).div_(upper[k, k])
            left[k + 1 : stop].addcmul_(upper[k, k + 1 : stop, None], error[k - start], value=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, error, alpha=-1)
    return codes.T


def inverse_root(matrix: Tensor, damping: float) -> Tensor:
    """Upper U, float64 `[K, K]`, with `UᵀU` the inverse of a symmetric matrix, float64, plus `damping` times its mean
    diagonal; 0 on the diagonal counts as 1. Damping is raised where it doesn't suffice; QuambaError if that doesn't help.
    """
    diagonal = torch.where(matrix.diagonal() > 0, matrix.diagonal(), 1.0)
    for attempt in range(ATTEMPTS):
        share = damping * 10**attempt
        damped = matrix.diagonal_scatter(diagonal + share * diagonal.mean())
        # The matrix, turned by 180 degrees, is LLᵀ; so it is RRᵀ with R the turned L, upper, and U is the inverse of R.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and bool(torch.isfinite(lower).all()):
            identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
            return torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    raise QuambaError(
        f"GPTQ: the Hessian of {len(matrix)} inputs can't be inverted, even with damping {share:g}: calibrate with more "
        "samples, or raise gptq.damping"
    )
