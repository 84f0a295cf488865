"""Rounding weights to int8."""

import pytest
import torch

from quamba.quantizer.weights import round_to_nearest


def naive(weight):
    """Row by row with Python's numbers: `round` is half to even, too."""
    codes, scales = [], []
    for row in weight.double().flatten(1).tolist():
        largest = max(abs(v) for v in row)
        scale = float(torch.tensor(largest / 127 if largest else 1.0, dtype=torch.float32))
        codes.append([max(-127, min(127, round(v / scale))) for v in row])
        scales.append(scale)
    return torch.tensor(codes).view(weight.shape), torch.tensor(scales)


@pytest.mark.parametrize("shape", [(7, 33), (64, 1, 4), (1, 1), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_codes_equal_naive_maths_and_err_by_half_a_step_at_most(shape, dtype):
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    codes, scale = round_to_nearest(weight)
    expected_codes, expected_scale = naive(weight)
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (torch.int8, torch.float32, shape, shape[:1])
    # absmax / 127 in float32 may differ from the double's rounding by one unit in the last place.
    torch.testing.assert_close(scale, expected_scale, rtol=1.2e-7, atol=0)
    assert (codes - expected_codes).abs().max() <= 1
    assert ((codes - expected_codes) != 0).float().mean() < 0.01
    steps = scale.double().view(-1, *[1] * (len(shape) - 1))
    error = (codes.double() * steps - weight.double()).abs()
    assert (error <= steps * (0.5 + 1e-5)).all()


def test_the_largest_magnitude_of_a_row_is_attained_whatever_its_sign():
    weight = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, 4.0], [-1.0, -2.0, -3.0]])
    codes, scale = round_to_nearest(weight)
    assert torch.equal(codes.abs().amax(dim=1), torch.full((3,), 127, dtype=torch.int8))
    torch.testing.assert_close(scale * 127, torch.tensor([3.0, 4.0, 3.0]))
    assert codes[0, 1] == codes[2, 2] == -127
    assert codes.min() >= -127


def test_halves_round_to_even():
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert round_to_nearest(weight)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


def test_rows_of_zeros_and_of_almost_nothing():
    weight = torch.zeros(4, 5)
    weight[1] = 1e-44
    weight[2, 3] = torch.finfo(torch.float32).tiny
    weight[3] = torch.finfo(torch.float32).max
    codes, scale = round_to_nearest(weight)
    assert scale[0] == 1.0
    assert not codes[0].any()
    assert (scale > 0).all()
    assert torch.isfinite(1 / scale).all()
    error = (codes.double() * scale[:, None].double() - weight.double()).abs()
    assert (error <= scale[:, None] * 0.50001).all()
    assert (codes[3] == 127).all()
