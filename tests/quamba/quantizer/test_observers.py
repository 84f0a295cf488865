"""Scales from activations: against naive maths, and the clipping search against brute force over the raw values."""

import pytest
import torch

from quamba.errors import QuambaError
from quamba.plan import SiteSpec
from quamba.quantizer.observers import Observer

TENSOR = SiteSpec(8, "static", "tensor")
CHANNEL = SiteSpec(8, "static", "channel")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale_of(*batches, spec=TENSOR, method="minmax"):
    observer = Observer("block 0, x", batches[0].shape[-1], spec, method)
    for batch in batches:
        observer.add(batch)
    return observer.scale()


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_minmax_is_the_largest_magnitude_of_all_batches(method):
    batches = [randn(2, 5, 6, seed=s) * (s + 1) for s in range(3)]
    values = torch.cat([b.reshape(-1, 6) for b in batches])
    whole, channels = scale_of(*batches, method=method), scale_of(*batches, spec=CHANNEL, method=method)
    assert (whole.shape, channels.shape) == ((), (6,))
    assert whole.dtype == channels.dtype == torch.float32
    if method == "minmax":
        assert whole == max(abs(v) for v in values.flatten().tolist()) / torch.tensor(127.0)
        assert channels.tolist() == [max(abs(v) for v in column.tolist()) / torch.tensor(127.0) for column in values.T]
    else:
        assert whole <= values.abs().max() / 127
        assert (channels <= values.abs().amax(dim=0) / 127).all()


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL])
def test_order_and_batching_do_not_matter(method, spec):
    x = randn(12, 7, 5) ** 3
    whole = scale_of(x, spec=spec, method=method)
    for pieces in (x.split(1), x.split(5), x.flip(0).split(4), [x.flatten(0, 1)]):
        assert torch.equal(scale_of(*pieces, spec=spec, method=method), whole)


def squared_error(values, scale):
    codes = (values / scale).round().clamp(-128, 127)
    return (codes * scale - values).square().sum()


HEAVY = {
    "normal": lambda x: x,
    "cubed": lambda x: x**3,
    "one outlier": lambda x: torch.cat([x.flatten(), torch.tensor([40.0])]).view(-1, 1),
    "many outliers": lambda x: torch.where(x.abs() > 2.8, x * 20, x),
    "uniform": lambda x: torch.erf(x),
    "two levels": lambda x: torch.where(x > 0, 3.0, -0.1),
}


@pytest.mark.parametrize("kind", HEAVY)
def test_the_searched_clipping_is_within_3_percent_of_brute_force(kind):
    # The search sees a histogram of 1/16 octaves instead of the values; 100 thresholds over the raw values are the truth.
    values = HEAVY[kind](randn(20_000, 1, seed=4)).double()
    found = squared_error(values, scale_of(values.float(), method="mse").double())
    largest = values.abs().max() / 127
    brute = min(squared_error(values, largest * ratio) for ratio in torch.linspace(1 / 3, 1, 100, dtype=torch.float64))
    if kind == "two levels":
        # A bin doesn't know where in it a value lies, so exact grids are out of reach; half a step is not.
        assert found <= len(values) * (largest / 2) ** 2
    else:
        assert found <= 1.03 * brute
    assert found <= 1.0001 * squared_error(values, largest)


def test_clipping_pays_off_for_heavy_tails_and_is_left_alone_for_uniform_values():
    tails = randn(50_000, 1) ** 3
    assert scale_of(tails, method="mse") < 0.9 * scale_of(tails)
    flat = torch.linspace(-1, 1, 50_001)[:, None]
    assert scale_of(flat, method="mse") > 0.97 * scale_of(flat)


def test_channels_are_searched_each_for_itself():
    x = randn(4000, 3) * torch.tensor([1.0, 0.5, 8.0])
    together = scale_of(x, spec=CHANNEL, method="mse")
    apart = torch.stack([scale_of(x[:, i : i + 1], spec=CHANNEL, method="mse")[0] for i in range(3)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_names_the_site(bad):
    x = randn(3, 4)
    x[1, 2] = bad
    with pytest.raises(QuambaError, match="NaN or infinite values at block 3, conv_in"):
        Observer("block 3, conv_in", 4, CHANNEL, "minmax").add(x)


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL])
@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 4), torch.full((3, 4), -2.5), randn(1, 4), torch.full((1, 4), 1e-42), torch.full((2, 4), 3e38)],
    ids=["zeros", "constant", "one sample", "denormal", "huge"],
)
def test_scales_and_their_inverses_are_finite_and_positive(method, spec, x):
    scale = scale_of(x, spec=spec, method=method)
    assert (scale > 0).all()
    assert torch.isfinite(scale).all()
    assert torch.isfinite(1 / scale).all()


def test_a_constant_is_represented_within_a_code():
    scale = scale_of(torch.full((3, 4), -2.5), method="minmax")
    assert (-2.5 / scale).round() == -127


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_a_channel_never_seen_active_keeps_a_thousandth_of_the_range(method):
    x = randn(50, 3)
    x[:, 1] = 0
    scale = scale_of(x, spec=CHANNEL, method=method)
    assert scale[1] == pytest.approx(float(x.abs().max()) / 1024 / 127, rel=1e-6 if method == "minmax" else 0.7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_taken_as_they_are(dtype):
    x = randn(6, 5).to(dtype)
    assert scale_of(x) == x.float().abs().max() / 127
