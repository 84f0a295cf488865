"""Sort-and-cluster: the function stays, clusters against naive searches, and examples whose answer is known."""

import itertools
import math

import numpy as np
import pytest
import torch

from quamba.errors import QuambaError
from quamba.layers import Sites
from quamba.mixers.mamba2 import Mamba2, Mamba2Args
from quamba.plan import BlockPlan
from quamba.quantizer.reorder import (
    ChannelStatistic,
    best_runs,
    cluster_channels,
    cluster_heads,
    reorder_mamba2,
    sort_and_cluster,
)

HIDDEN = 20


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def make_mixer(**args):
    """A float mixer with every parameter random."""
    torch.manual_seed(3)
    shape = {"num_heads": 16, "head_dim": 6, "state_size": 5, "n_groups": 1, "norm_groups": 1}
    mixer = Mamba2(Mamba2Args(**(shape | args)), HIDDEN, BlockPlan())
    with torch.no_grad():
        for p in mixer.parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return mixer.requires_grad_(False)


def output(mixer, u):
    return mixer(u, Sites(mixer.site_widths(mixer.args, HIDDEN), {}))


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"n_groups": 8, "norm_groups": 8},
        {"n_groups": 8, "norm_groups": 1},
        {"n_groups": 4, "norm_groups": 2},
        {"n_groups": 2, "norm_groups": 2, "norm_before_gate": True},
        {"D_has_hdim": True},
        {"n_groups": 8, "norm_groups": 8, "D_has_hdim": True},
        {"rms_norm": False},
        {"n_groups": 2, "norm_groups": 4, "rms_norm": False},
        {"use_bias": True},
        {"use_conv_bias": False, "num_heads": 3},
        {"num_heads": 4, "head_dim": 3},
        {"num_heads": 1, "head_dim": 24},
        {"dt_min": 0.1, "dt_max": 0.9},
    ],
    ids=str,
)
def test_the_mixer_computes_the_same(args):
    mixer, moved = make_mixer(**args), make_mixer(**args)
    a = mixer.args
    order = sort_and_cluster(rand(a.intermediate_size), a.num_heads, a.head_dim, a.n_groups)
    assert order.channels.tolist() != list(range(a.intermediate_size))
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    tensors = reorder_mamba2(mixer.state_dict(), order, a)
    assert all(torch.equal(mixer.state_dict()[name], tensor) for name, tensor in before.items())
    assert {n: t.dtype for n, t in tensors.items()} == {n: t.dtype for n, t in before.items()}
    moved.load_state_dict(tensors, strict=True)
    u = torch.randn(2, 11, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = output(mixer, u)
    assert expected.std() > 0.1
    torch.testing.assert_close(output(moved, u), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


def test_what_reaches_the_scan_is_the_old_channels_in_the_new_order():
    mixer, moved = make_mixer(n_groups=2), make_mixer(n_groups=2)
    order = sort_and_cluster(rand(96), 16, 6, 2)
    moved.load_state_dict(reorder_mamba2(mixer.state_dict(), order, mixer.args))
    seen = []
    for each in (mixer, moved):
        sites = Sites(each.site_widths(each.args, HIDDEN), {})
        values = {}
        for name in ("z", "x", "B", "C", "dt"):
            sites.observers[name] = lambda value, name=name, values=values: values.update({name: value.clone()})
        each(torch.randn(1, 4, HIDDEN, generator=torch.Generator().manual_seed(1)), sites)
        seen.append(values)
    before, after = seen
    for name, index in (("z", order.channels), ("x", order.channels), ("dt", order.heads)):
        torch.testing.assert_close(after[name], before[name][..., index])
    for name in ("B", "C"):
        torch.testing.assert_close(after[name], before[name])


@pytest.mark.parametrize("args", [{"n_groups": 1, "norm_groups": 4}, {"n_groups": 2, "norm_groups": 8}])
def test_a_norm_that_sees_less_than_an_ssd_group_is_refused(args):
    mixer = make_mixer(**args)
    order = sort_and_cluster(rand(96), 16, 6, mixer.args.n_groups)
    with pytest.raises(QuambaError, match=f"n_groups = {args['n_groups']} .* norm_groups = {args['norm_groups']}"):
        reorder_mamba2(mixer.state_dict(), order, mixer.args)


def test_a_norm_that_looks_at_each_head_allows_heads_to_move():
    # One norm group a head: moving whole heads leaves each group what it was.
    mixer, moved = make_mixer(norm_groups=16), make_mixer(norm_groups=16)
    order = sort_and_cluster(rand(96), 16, 6, 1)
    moved.load_state_dict(reorder_mamba2(mixer.state_dict(), order, mixer.args))
    u = torch.randn(1, 7, HIDDEN)
    torch.testing.assert_close(output(moved, u), output(mixer, u), rtol=1e-4, atol=1e-4)


def test_tensors_of_another_kind_are_refused():
    mixer = make_mixer()
    order = sort_and_cluster(rand(96), 16, 6, 1)
    with pytest.raises(QuambaError, match=r"in_proj\.weight_scale can't be reordered"):
        reorder_mamba2(mixer.state_dict() | {"in_proj.weight_scale": torch.ones(3)}, order, mixer.args)


STATISTICS = {
    "random": lambda n: rand(n),
    "skewed": lambda n: rand(n) ** 8 * 100,
    "zeros": lambda n: torch.zeros(n),
    "constant": lambda n: torch.full((n,), 3.0),
    "half zeros": lambda n: rand(n) * (torch.arange(n) % 2),
    "dead heads": lambda n: rand(n) * (torch.arange(n) < n // 2),
    "one channel": lambda n: (torch.arange(n) == 5).float(),
    "tiny": lambda n: rand(n) * 1e-38,
    "huge": lambda n: rand(n) * 1e38,
}


@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize(
    ("heads", "dim", "ssd"), [(16, 8, 1), (16, 8, 2), (8, 5, 8), (6, 3, 2), (24, 64, 1), (6, 1, 1)]
)
def test_an_order_is_well_formed(kind, heads, dim, ssd):
    statistic = STATISTICS[kind](heads * dim)
    order = sort_and_cluster(statistic, heads, dim, ssd)
    per = heads // ssd
    assert {t.dtype for t in (order.channels, order.heads, order.groups)} == {torch.int64}
    assert sorted(order.channels.tolist()) == list(range(heads * dim))
    assert sorted(order.heads.tolist()) == list(range(heads))
    previous, cuts = -1, []
    for place, head in enumerate(order.heads.tolist()):
        assert place // per == head // per  # heads stay in their SSD group
        here = slice(place * dim, (place + 1) * dim)
        channels, groups = order.channels[here].tolist(), order.groups[here].tolist()
        assert {c // dim for c in channels} == {head}
        sizes = [float(statistic[c]) for c in channels]
        assert sizes == sorted(sizes)
        assert groups == sorted(groups)
        assert {g // 16 for g in groups} == {head // per}
        (cluster,) = {g // 4 for g in groups}
        assert cluster >= previous
        if cluster == previous:
            assert groups == cuts  # heads of one cluster are cut alike
        previous, cuts = cluster, groups


def test_the_same_statistic_gives_the_same_order():
    one, two = (sort_and_cluster(rand(24 * 64, seed=9), 24, 64, 2) for _ in range(2))
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("channels", "heads", "groups"))


def test_heads_of_equal_shape_come_together():
    # Four shapes, dealt out in turn at eight loudnesses, every head's channels shuffled.
    shapes = torch.tensor(
        [
            [1, 1, 2, 2, 5, 5, 9, 9],  # cuts in the middle: k-means finds them
            [1, 1, 1, 10, 10, 20, 20, 40],  # two equal first centres: the dynamic programme does
            [3, 3, 3, 3, 3, 3, 3, 3],
            [0, 0, 0, 0, 0, 0, 0, 7],
        ],
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(8, generator=generator) for _ in range(8)])
    statistic = torch.zeros(8, 8)
    for head in range(8):
        statistic[head, places[head]] = shapes[head % 4] * 2.0**head
    order = sort_and_cluster(statistic.flatten(), 8, 8, 1)
    assert order.heads.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    groups = order.groups.view(4, 2, 8)
    assert torch.equal(groups[:, 0], groups[:, 1])
    assert groups[0, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert groups[1, 0].tolist() == [4, 4, 4, 5, 5, 6, 6, 7]
    assert len(set(groups[3, 0, :-1].tolist()) & {int(groups[3, 0, -1])}) == 0  # the loud one is alone


def test_heads_of_an_ssd_group_that_are_few_are_each_their_own_cluster():
    order = sort_and_cluster(rand(6 * 3), 6, 3, 2)
    assert order.heads.tolist() == list(range(6))
    assert order.groups.tolist() == [16 * (h // 3) + 4 * (h % 3) + c for h in range(6) for c in range(3)]


def spread(rows):
    """Summed squared distance from the mean."""
    return float(((rows - rows.mean(axis=0)) ** 2).sum())


def naive_ward(rows, clusters):
    """Merge the two clusters whose union adds the least spread, until few enough are left."""
    parts = [[i] for i in range(len(rows))]
    while len(parts) > clusters:
        pairs = itertools.combinations(range(len(parts)), 2)
        i, j = min(
            pairs,
            key=lambda p: (
                spread(rows[parts[p[0]] + parts[p[1]]]) - spread(rows[parts[p[0]]]) - spread(rows[parts[p[1]]])
            ),
        )
        parts[i] += parts.pop(j)
    return sorted(sorted(part) for part in parts)


@pytest.mark.parametrize("seed", range(4))
def test_heads_are_clustered_by_ward(seed):
    rows = np.random.default_rng(seed).random((14, 6))
    label = cluster_heads(rows, 4)
    assert [np.flatnonzero(label == k).tolist() for k in range(4)] == naive_ward(rows, 4)


def naive_kmeans(points, clusters):
    """Lloyd's iterations from the published first centres, until nothing changes."""
    centres = [points[i * len(points) // clusters] for i in range(clusters)]
    label = None
    while True:
        new = [min(range(clusters), key=lambda k: float(((p - centres[k]) ** 2).sum())) for p in points]
        if new == label:
            return label
        label = new
        centres = [np.mean([p for p, own in zip(points, label) if own == k], axis=0) for k in range(clusters)]


@pytest.mark.parametrize("seed", range(4))
def test_channels_are_clustered_by_k_means_of_their_own_heads(seed):
    points = np.sort(np.random.default_rng(seed).random((19, 3)) ** 2, axis=0)
    assert cluster_channels(points, 4).tolist() == naive_kmeans(points, 4)
    # In a whole order, too: the cuts of each cluster follow from the heads that are in it.
    size = rand(12, 10, seed=seed).double() ** 3
    order = sort_and_cluster(size.flatten(), 12, 10, 1)
    unit = size.sort(dim=1).values / size.norm(dim=1, keepdim=True)
    groups = order.groups.view(12, 10)
    for cluster in range(4):
        inside = (groups[:, 0] // 4 == cluster).nonzero().flatten()
        points = unit[order.heads[inside]].T.numpy()
        assert (groups[inside[0]] - 4 * cluster).tolist() == naive_kmeans(points, 4)


@pytest.mark.parametrize("count", [4, 5, 9])
@pytest.mark.parametrize("seed", range(3))
def test_the_best_runs_are_those_of_brute_force(count, seed):
    points = np.sort(np.random.default_rng(seed).random((count, 2)), axis=0)
    cuts = min(
        itertools.combinations(range(1, count), 3),
        key=lambda cuts: sum(spread(part) for part in np.split(points, cuts)),
    )
    expected = [sum(row >= cut for cut in cuts) for row in range(count)]
    assert best_runs(points, 4).tolist() == expected


def rounding_error(x, scale):
    codes = (x / scale).round().clamp(-128, 127)
    return float((codes * scale - x).square().mean())


@pytest.mark.parametrize("ssd", [1, 2])
def test_scales_by_group_lose_less_than_one_scale_and_less_than_unsorted_groups(ssd):
    # Heads of four shapes, from flat to a few loud channels, shuffled; channels inside each head shuffled, too.
    heads, dim = 16, 32
    generator = torch.Generator().manual_seed(2)
    kind = torch.randperm(heads, generator=generator) % 4
    size = torch.linspace(-1, 0, dim).mul(kind[:, None] * 2).exp() + 0.05 * torch.rand(heads, dim, generator=generator)
    size = torch.stack([row[torch.randperm(dim, generator=generator)] for row in size])
    x = torch.randn(200, heads * dim, generator=generator) * size.flatten()
    statistic = ChannelStatistic(heads * dim)
    statistic.add(x[None])
    order = sort_and_cluster(statistic.value(), heads, dim, ssd)
    sorted_x = x[:, order.channels]

    def error(x, groups):
        absmax = torch.zeros(heads * dim)
        for g in set(groups.tolist()):
            absmax[groups == g] = x[:, groups == g].abs().max()
        assert (absmax <= x.abs().max()).all()
        return rounding_error(x, absmax / 127)

    channel = torch.arange(heads * dim)
    quarters = (channel // dim * 4 // (heads // ssd)) * 4 + channel % dim * 4 // dim
    assert len(quarters.unique()) == 16 * ssd
    grouped = error(sorted_x, order.groups)
    assert grouped < 0.4 * error(x, torch.zeros_like(channel))
    assert grouped < 0.6 * error(x, quarters)


def test_the_statistic_is_the_largest_mean_of_any_sample():
    x = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))
    expected = [max(sum(abs(float(v)) for v in x[s, :, c]) / 7 for s in range(5)) for c in range(3)]
    for pieces in ([x], x.split(1), x.split(2), [x.flip(0)]):
        statistic = ChannelStatistic(3)
        for piece in pieces:
            statistic.add(piece)
        torch.testing.assert_close(statistic.value(), torch.tensor(expected))


def test_the_statistic_does_not_depend_on_the_batching():
    x = torch.randn(6, 33, 50, generator=torch.Generator().manual_seed(0))
    values = []
    for size in (1, 4, 6):
        statistic = ChannelStatistic(50)
        for piece in x.split(size):
            statistic.add(piece)
        values.append(statistic.value())
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_refused(bad):
    x = torch.zeros(1, 2, 3)
    x[0, 1, 2] = bad
    with pytest.raises(QuambaError, match="NaN or infinite"):
        ChannelStatistic(3).add(x)
