"""Scans with states in float16, and in int8 with a scale for each row, found anew at every store."""

import pytest
import torch

from quamba_kernels import triton
from tests.gpu import scans
from tests.gpu.cases import close, large, stable

pytestmark = pytest.mark.gpu

# op, then batch, tokens and the rest of the shape
SHAPES = [
    ("selective_scan", (2, 33, 50, 16)),
    ("selective_scan", (1, 1, 300, 16)),
    ("selective_scan", (1, 5, 9, 3)),
    ("ssd_scan", (2, 7, 4, 16, 2, 8)),
    ("ssd_scan", (2, 1, 6, 33, 3, 20)),
    ("ssd_scan", (1, 70, 2, 80, 1, 128)),
]
REAL = large(
    ("selective_scan", (64, 1, 5120, 16)),
    ("selective_scan", (1, 2048, 5120, 16)),
    ("ssd_scan", (64, 1, 128, 64, 8, 128)),
    ("ssd_scan", (1, 2048, 128, 64, 8, 128)),
)


def case(rng, op, shape, codes):
    """Inputs, and the shape of the state."""
    batch, _, *rest = shape
    rows = (batch, *rest) if op == "selective_scan" else (batch, *rest[:2], rest[3])
    return getattr(scans, op)(rng, *shape, codes=codes), rows


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("op", "shape"), SHAPES + REAL, ids=str)
def test_float16(rng, op, shape, codes):
    inputs, rows = case(rng, op, shape, codes)
    start = rng.normal(*rows, dtype=torch.float16)
    for mask in (None, rng.mask(*shape[:2])):
        y, end = stable(lambda mask=mask: scans.run(op, inputs, start, mask=mask))
        want, wanted_end = scans.exact(op, inputs, start, mask)
        close(y, want)
        assert end.dtype == torch.float16
        close(end, wanted_end)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize(("op", "shape"), SHAPES + REAL, ids=str)
def test_int8(rng, op, shape, codes):
    inputs, rows = case(rng, op, shape, codes)
    start, scale = rng.integers(-127, 127, *rows), rng.uniform(*rows[:-1]) / 50
    start[0, -1], scale[0, -1] = 0, 0  # rows of a state that nothing has been written to
    for mask in (None, rng.mask(*shape[:2])):

        def run(mask=mask):
            state, scales = start.clone(), scale.clone()
            y = getattr(triton, op)(**inputs, state=state, state_scale=scales, mask=mask)
            return y, state, scales

        y, end, scales = stable(run)
        want, wanted_end = scans.exact(op, inputs, start.double() * scale.double().unsqueeze(-1), mask)
        close(y, want)
        most = wanted_end.abs().amax(-1)
        close(scales, most / 127)
        # Codes of the float32 end, itself within 1e-5 of the largest entry, which is up to 127 * (largest / row's largest).
        slack = 2e-5 * 127 * float(wanted_end.abs().max()) / most.clamp(min=1e-30)
        off = (end.double() - wanted_end * (127 / most.clamp(min=1e-10)).unsqueeze(-1)).abs().amax(-1)
        assert bool((off <= 0.5 + slack).all())


@pytest.mark.parametrize("op", ["selective_scan", "ssd_scan"])
def test_a_state_of_zeros_stays_finite(rng, op):
    shape = (2, 3, 20, 16) if op == "selective_scan" else (2, 3, 4, 10, 2, 16)
    inputs, rows = case(rng, op, shape, codes=True)
    inputs["u" if op == "selective_scan" else "x"].zero_()
    state, scale = torch.zeros(rows, dtype=torch.int8, device=inputs["dt"].device), rng.uniform(*rows[:-1])
    y = getattr(triton, op)(**inputs, state=state, state_scale=scale)
    assert bool((y == 0).all()) and bool((state == 0).all()) and bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("op", ["selective_scan", "ssd_scan"])
def test_errors_of_many_stores_stay_bounded(rng, op):
    """Each store is off by at most half a code, and what follows decays: the sum of the decayed errors bounds the drift."""
    shape = (2, 60, 20, 16) if op == "selective_scan" else (2, 60, 4, 10, 2, 16)
    inputs, rows = case(rng, op, shape, codes=False)
    inputs["A"].clamp_(max=-0.5)
    inputs["dt_bias"].fill_(1.0)  # decays of about exp(-0.65) and less a token
    state = torch.zeros(rows, dtype=torch.int8, device=inputs["dt"].device)
    scale, most = torch.zeros(rows[:-1], device=state.device), 0.0
    per_token = scans.PER_TOKEN[op]
    for t in range(shape[1]):
        token = {name: x[:, t : t + 1] if name in per_token else x for name, x in inputs.items()}
        getattr(triton, op)(**token, state=state, state_scale=scale)
        most = max(most, float(scale.max()))
    _, end = scans.exact(op, inputs, None)
    drift = float((state.double() * scale.double().unsqueeze(-1) - end).abs().max())
    slowest = float(torch.exp(torch.nn.functional.softplus(inputs["dt"] + 1.0).min() * -0.5))
    assert drift <= 0.5 * most / (1 - slowest) + 1e-5
