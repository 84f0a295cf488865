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


class Observer:
    """Statistics of one site: `add` activations, then `scale()`.

    method "minmax": absmax / 127. method "mse": the clipping threshold, out of 64 between 1/3 and all of absmax, with
    the least expected squared error over the histogram of magnitudes.
    """

    def __init__(self, name: str, width: int, spec: SiteSpec, method: str):
        self.name, self.spec, self.method = name, spec, method
        self.rows = width if spec.axis == "channel" else 1
        self.absmax = torch.zeros(self.rows)
        self.histogram = torch.zeros(self.rows, BINS, dtype=torch.int64) if method == "mse" else None

    def add(self, x: Tensor) -> None:
        """x float `[..., width]`. Raises QuambaError, naming the site, for NaN or Inf."""
        x = x.detach().reshape(-1, x.shape[-1]).float().abs()
        absmax = x.amax(dim=0)
        if not bool(torch.isfinite(absmax).all()):
            raise QuambaError(
                f"calibration met NaN or infinite values at {self.name}: the model or its input is broken"
            )
        if self.rows == 1:
            absmax, x = absmax.amax().reshape(1), x.reshape(-1, 1)
        torch.maximum(self.absmax, absmax, out=self.absmax)
        if self.histogram is not None:
            bins = ((x.log2() - LOWEST) * BINS_PER_OCTAVE).clamp(0, BINS - 1).to(torch.int64)
            bins += torch.arange(self.rows) * BINS
            self.histogram += torch.bincount(bins.flatten(), minlength=self.rows * BINS).view(self.rows, BINS)

    def scale(self) -> Tensor:
        """float32, positive and finite: 0-d for axis tensor, `[width]` for axis channel."""
        largest = self.absmax.max()
        floor = largest * QUIET_CHANNEL if largest > 0 else torch.ones(())
        absmax = self.absmax.clamp(min=floor).clamp(min=2.0**LOWEST)
        threshold = absmax if self.histogram is None else best_clipping(self.histogram, absmax)
        scale = (threshold / 127.0).to(torch.float32)
        return scale if self.spec.axis == "channel" else scale.reshape(())


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
