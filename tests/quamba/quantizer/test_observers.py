"""Scales from activations: against naive maths, and the clipping search against brute force over the raw values."""

import numpy as np
import pytest
import torch

from quamba.errors import QuambaError
from quamba.plan import SiteSpec
from quamba.quantizer.observers import Observer

TENSOR = SiteSpec(8, "static", "tensor")
CHANNEL = SiteSpec(8, "static", "channel")
GROUPS = SiteSpec(8, "static", "group", groups=4)
INDEX = torch.tensor([2, 0, 2, 3, 0])  # nothing is in group 1
METHODS = ["minmax", "mse", "percentile"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scale_of(*batches, spec=TENSOR, method="minmax", depth=1, percentile=0.9995):
    width = batches[0].shape[-1 if depth == 1 else -2]
    index = INDEX if spec.axis == "group" else None
    observer = Observer("block 0, x", width, spec, method, index=index, depth=depth, percentile=percentile)
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL, GROUPS])
@pytest.mark.parametrize("depth", [1, 3])
def test_batching_does_not_matter(method, spec, depth):
    x = randn(12, 7, 5, depth).squeeze(-1) ** 3
    whole = scale_of(x, spec=spec, method=method, depth=depth)
    for size in (1, 2, 5):
        assert torch.equal(scale_of(*x.split(size), spec=spec, method=method, depth=depth), whole)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(scale_of(strided, spec=spec, method=method, depth=depth), whole)
    if method != "percentile":
        for pieces in (x.flip(0).split(4), [x.flatten(0, 1)]):
            assert torch.equal(scale_of(*pieces, spec=spec, method=method, depth=depth), whole)


def cells_of(spec, depth):
    """Which (channel, depth) cells share each scale, by the shape that the scales have."""
    every = [(c, d) for c in range(5) for d in range(depth)]
    if spec.axis == "tensor":
        return {(): every}
    if spec.axis == "channel":
        return {(c,): [cell for cell in every if cell[0] == c] for c in range(5)}
    by_depth = [()] if depth == 1 else [(d,) for d in range(depth)]
    return {
        (g, *key): [(c, d) for c, d in every if INDEX[c] == g and key in ((), (d,))]
        for g in range(4)
        for key in by_depth
    }


def naive_average(x, cells, percentile):
    """The published formula over x [samples, tokens, width, depth], with numpy's quantile; 0 for no cells."""
    if not cells:
        return 0.0
    w = None
    for sample in x.double().numpy():
        q = np.quantile(np.abs(np.concatenate([sample[:, c, d] for c, d in cells])), percentile)
        w = q if w is None else w + 0.01 * (q - w)
    return w


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL, GROUPS])
@pytest.mark.parametrize("depth", [1, 3])
def test_each_row_of_an_axis_has_the_scale_of_its_own_values(method, spec, depth):
    x = randn(6, 40, 5, depth, seed=7) * torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5])[:, None]
    scale = scale_of(x.squeeze(-1) if depth == 1 else x, spec=spec, method=method, depth=depth, percentile=0.93)
    shape = {"tensor": (), "channel": (5,), "group": (4,) if depth == 1 else (4, depth)}[spec.axis]
    assert scale.shape == shape
    assert scale.dtype == torch.float32
    rows = cells_of(spec, depth)
    assert len(rows) == scale.numel()
    seen = {key: torch.cat([x[:, :, c, d].flatten() for c, d in cells]) for key, cells in rows.items() if cells}
    if method == "percentile":
        truth = {key: naive_average(x, cells, 0.93) for key, cells in rows.items()}
    elif method == "minmax":
        truth = {key: max(abs(v) for v in values.tolist()) for key, values in seen.items()}
    else:
        truth = {key: float(scale_of(values[None, :, None], method="mse")) * 127 for key, values in seen.items()}
    largest = max(truth.values()) if method == "percentile" else float(x.abs().max())
    for key in rows:
        assert float(scale[key]) == pytest.approx(max(truth.get(key, 0.0), largest / 1024) / 127, rel=1e-6)


@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.5, 0.9, 0.9995, 0.99999, 1.0])
@pytest.mark.parametrize("tokens", [1, 2, 11, 2001])
def test_percentiles_are_numpys(percentile, tokens):
    x = randn(1, tokens, 1, seed=tokens) + 2
    expected = max(np.quantile(x.abs().double().numpy(), percentile), 1e-5) / 127
    assert float(scale_of(x, method="percentile", percentile=percentile)) == pytest.approx(expected, rel=1e-6)


def test_percentile_1_is_the_moving_average_of_the_largest_magnitudes():
    x = randn(9, 30, 5, seed=3) ** 3
    w = float(x[0].abs().max())
    for sample in x[1:]:
        w += 0.01 * (float(sample.abs().max()) - w)
    assert float(scale_of(x, method="percentile", percentile=1.0)) == pytest.approx(w / 127, rel=1e-6)
    assert float(scale_of(x, method="percentile", percentile=1.0)) != pytest.approx(float(scale_of(x)), rel=1e-2)


def test_the_first_sample_sets_the_average_and_later_ones_move_it_by_a_hundredth():
    x = torch.tensor([1.0, 3.0, -5.0]).view(3, 1, 1).expand(3, 4, 2)
    after_two = 1 + 0.01 * 2
    expected = (after_two + 0.01 * (5 - after_two)) / 127
    assert float(scale_of(x, method="percentile")) == pytest.approx(expected, rel=1e-6)


def test_a_percentile_of_more_values_than_2_to_the_24():
    count = 2**24 + 40_001
    x = (torch.arange(20_000, 20_000 - count, -1).clamp(min=0) / 16).view(
        1, -1, 1
    )  # the ranks asked for are all different
    place = 0.9995 * (count - 1)
    below, above = x[0, count - 1 - int(place), 0], x[0, count - 2 - int(place), 0]
    expected = float(below) + (place % 1) * (float(above) - float(below))
    assert float(scale_of(x, method="percentile")) == pytest.approx(expected / 127, rel=1e-7)


def test_a_percentile_of_nothing_but_zeros_is_the_least_threshold():
    assert float(scale_of(torch.zeros(2, 3, 4), method="percentile")) == pytest.approx(1e-5 / 127)


def test_one_outlier_moves_the_percentile_little():
    x = randn(1, 10_000, 1)
    spoiled = x.clone()
    spoiled[0, 17] = 1e4
    assert scale_of(spoiled, method="percentile") < 1.1 * scale_of(x, method="percentile")


def test_groups_need_an_index():
    with pytest.raises(QuambaError, match="block 0, x: scales by group need the group of each channel"):
        Observer("block 0, x", 5, GROUPS)


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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL, GROUPS])
def test_a_value_that_is_no_number_names_the_site(bad, method, spec):
    x = randn(3, 5)
    x[1, 2] = bad
    with pytest.raises(QuambaError, match="NaN or infinite values at block 3, conv_in"):
        Observer("block 3, conv_in", 5, spec, method, index=INDEX).add(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [TENSOR, CHANNEL, GROUPS])
@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 5), torch.full((3, 5), -2.5), randn(1, 5), torch.full((1, 5), 1e-42), torch.full((2, 5), 3e38)],
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", [CHANNEL, GROUPS])
def test_what_was_never_seen_active_keeps_a_thousandth_of_the_range(method, spec):
    x = randn(1, 50, 5)
    x[..., 3] = 0
    scale = scale_of(x, spec=spec, method=method, percentile=1.0)
    assert scale[3] == pytest.approx(float(x.abs().max()) / 1024 / 127, rel=0.7 if method == "mse" else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_are_taken_as_they_are(dtype):
    x = randn(6, 5).to(dtype)
    assert scale_of(x) == x.float().abs().max() / 127
