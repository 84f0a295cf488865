"""From activations seen during calibration to static scales."""

from __future__ import annotations

import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.plan import SiteSpec

# Magnitudes are counted in bins of 1/16 octave from 2^-40 to 2^40. Counts are integers, so a histogram doesn't depend
# on the order or the batching of what it saw, and any number of tokens fits.
BINS_PER_OCTAVE = 16
LOWEST = -40
BINS = 80 * BINS_PER_OCTAVE

# A channel that calibration never saw active must not get a scale so small that any later value saturates.
QUIET_CHANNEL = 2.0**-10

# The published moving average over samples, and its least threshold.
MOMENTUM = 0.01
LEAST = 1e-5


class Observer:
    """Statistics of one site: `add` activations, then `scale()`.

    index int64 `[width]`: for axis group, the group of each channel. depth: how many values each channel has that get
    scales of their own in axis group (the state index of the recurrent state); the other axes take them together.

    method "minmax": absmax / 127. method "mse": the clipping threshold, out of 64 between 1/3 and all of absmax, with
    the least expected squared error over the histogram of magnitudes. method "percentile" (Quamba, arXiv 2410.13229):
    q = quantile(|x|, percentile) of every sample; the first is w, then w <- w + 0.01 (q - w) sample after sample; w / 127.

    How samples are dealt out to calls changes nothing; their order matters to "percentile" alone.
    """

    def __init__(
        self,
        name: str,
        width: int,
        spec: SiteSpec,
        method: str = "minmax",
        *,
        index: Tensor | None = None,
        depth: int = 1,
        percentile: float = 0.9995,
    ):
        self.name, self.method, self.percentile = name, method, percentile
        channel = torch.arange(width).repeat_interleave(depth)
        self.shape: tuple[int, ...]
        if spec.axis == "tensor":
            self.row, self.shape = torch.zeros_like(channel), ()
        elif spec.axis == "channel":
            self.row, self.shape = channel, (width,)
        else:
            if index is None:
                raise QuambaError(f"{name}: scales by group need the group of each channel")
            self.row = index.cpu().long()[channel] * depth + torch.arange(depth).repeat(width)
            self.shape = (spec.groups, depth) if depth > 1 else (spec.groups,)
        self.rows = torch.Size(self.shape).numel()
        self.absmax = torch.zeros(self.rows)
        self.histogram = torch.zeros(self.rows, BINS, dtype=torch.int64) if method == "mse" else None
        self.quantile: Tensor | None = None
        self.members = members(self.row, self.rows) if method == "percentile" else []

    def add(self, x: Tensor) -> None:
        """x float `[samples, ..., width]`, or `[samples, ..., width, depth]`. Raises QuambaError, naming the site, for
        NaN or Inf."""
        x = x.detach().float().abs().reshape(x.shape[0], -1, len(self.row))
        absmax = x.amax(dim=(0, 1)).cpu()
        if not bool(torch.isfinite(absmax).all()):
            raise QuambaError(
                f"calibration met NaN or infinite values at {self.name}: the model or its input is broken"
            )
        self.absmax.scatter_reduce_(0, self.row, absmax, "amax")
        if self.histogram is not None:
            bins = ((x.log2() - LOWEST) * BINS_PER_OCTAVE).clamp(0, BINS - 1).to(torch.int64)
            bins += self.row.to(x.device) * BINS
            self.histogram += torch.bincount(bins.flatten(), minlength=self.histogram.numel()).cpu().view(-1, BINS)
        if self.method == "percentile":
            found = torch.zeros(len(x), self.rows, dtype=torch.float64)
            for rows, cells in self.members:
                values = x[:, :, cells.to(x.device)].transpose(1, 2).flatten(2)
                found[:, rows] = quantile(values, self.percentile).cpu()
            for q in found:
                self.quantile = q if self.quantile is None else self.quantile + MOMENTUM * (q - self.quantile)

    def scale(self) -> Tensor:
        """float32, positive and finite: 0-d for axis tensor, `[width]` for axis channel, `[groups]` for axis group, or
        `[groups, depth]` where there is a depth."""
        seen, least = self.absmax, 2.0**LOWEST
        if self.quantile is not None:
            seen, least = self.quantile.to(torch.float32), LEAST
        largest = seen.max()
        quiet = largest * QUIET_CHANNEL if largest > 0 or self.method == "percentile" else torch.ones(())
        threshold = seen.clamp(min=quiet).clamp(min=least)
        if self.histogram is not None:
            threshold = best_clipping(self.histogram, threshold)
        return (threshold / 127.0).to(torch.float32).reshape(self.shape)


def members(row: Tensor, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Which cells belong to each row, given the row of each cell: pairs (rows `[n]`, their cells `[n, size]`), one pair
    for each size above 0."""
    sizes = torch.bincount(row, minlength=rows)
    cells = row.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    pairs = []
    for size in sizes[sizes > 0].unique().tolist():
        same = (sizes == size).nonzero().flatten()
        pairs.append((same, cells[starts[same][:, None] + torch.arange(size)]))
    return pairs


def quantile(x: Tensor, q: float) -> Tensor:
    """float64 quantile along the last axis of x, between neighbours by linear interpolation, for any number of values."""
    place = q * (x.shape[-1] - 1)
    below = int(place)
    top = x.topk(x.shape[-1] - below, dim=-1).values.double()
    low, high = top[..., -1], top[..., -2:][..., 0]
    return low + (high - low) * (place - below)


def best_clipping(histogram: Tensor, absmax: Tensor, candidates: int = 64) -> Tensor:
    """Threshold `[rows]` with the least expected squared rounding plus clipping error.

    A magnitude v in a bin rounds with error `(v - s rint(v/s))^2`, or s^2/12 where the bin is wider than a step;
    above the threshold it loses `(v - threshold)^2`.
    """
    centre = 2.0 ** ((torch.arange(BINS, dtype=torch.float64) + 0.5) / BINS_PER_OCTAVE + LOWEST)
    width = centre * (2.0 ** (0.5 / BINS_PER_OCTAVE) - 2.0 ** (-0.5 / BINS_PER_OCTAVE))
    seen = histogram.any(dim=0)
    centre, width, counts = centre[seen], width[seen], histogram[:, seen].double()
    best, best_error = absmax.double(), torch.full_like(absmax, torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(1.0, 1 / 3, candidates, dtype=torch.float64):
        threshold = absmax.double() * ratio
        step = (threshold / 127.0)[:, None]
        rounding = torch.where(width > step, step**2 / 12, (centre - step * (centre / step).round()) ** 2)
        excess = (centre - threshold[:, None]).clamp(min=0)
        error = (counts * torch.where(excess > 0, excess**2, rounding)).sum(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, threshold, best), torch.where(better, error, best_error)
    return best.to(torch.float32)
