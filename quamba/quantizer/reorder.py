"""Sort-and-cluster (Quamba2, arXiv 2503.22879): channels and heads of a Mamba2 block in an order in which 4 x 4 groups of
an SSD group, each with one scale, fit them well.

Letters: I channels = H heads * P channels, G SSD groups, N state size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quamba.errors import QuambaError
from quamba.mixers.mamba2 import Mamba2Args


class ChannelStatistic:
    """The largest, over samples, of the mean of |x| over a sample's tokens, channel by channel."""

    def __init__(self, width: int):
        self._value = torch.zeros(width)

    def add(self, x: Tensor) -> None:
        """x float `[samples, tokens, I]`. Raises QuambaError for NaN or Inf."""
        for sample in x.detach().float().abs():  # one by one: sums then don't depend on the batching
            mean = sample.mean(dim=0).cpu()
            if not bool(torch.isfinite(mean).all()):
                raise QuambaError("calibration met NaN or infinite values at x: the model or its input is broken")
            self._value = torch.maximum(self._value, mean)

    def value(self) -> Tensor:
        """float32 `[I]`."""
        return self._value


@dataclass(frozen=True)
class Order:
    """New positions. channels int64 `[I]`: the old channel at each; heads int64 `[H]`: the old head at each; groups int64
    `[I]`: the scale group of each new channel, `(SSD group * 4 + cluster of the head) * 4 + cluster of the channel`."""

    channels: Tensor
    heads: Tensor
    groups: Tensor


def sort_and_cluster(statistic: Tensor, heads: int, head_dim: int, n_groups: int, clusters: int = 4) -> Order:
    """The order for a nonnegative size of each channel, `[I]`: channels ascending inside their head, heads of like shape
    side by side inside their SSD group.

    Ward clustering of the sorted, normalised heads, then k-means of the channel positions of each cluster of heads. There
    are fewer than `clusters` of either where there are fewer heads or channels.
    """
    size = statistic.detach().cpu().double().view(heads, head_dim)
    place = size.argsort(dim=1, stable=True)
    ascending = size.gather(1, place)
    norm = ascending.norm(dim=1, keepdim=True)
    shape = (ascending / torch.where(norm > 0, norm, 1.0)).numpy()

    per_group = heads // n_groups
    order, groups = [], []
    for ssd in range(n_groups):
        members = np.arange(ssd * per_group, (ssd + 1) * per_group)
        label = cluster_heads(shape[members], clusters)
        for cluster in range(label.max() + 1):
            alike = members[label == cluster]
            channel = cluster_channels(shape[alike].T, clusters)
            order.append(alike)
            groups.append(np.tile((ssd * clusters + cluster) * clusters + channel, len(alike)))
    new_heads = torch.from_numpy(np.concatenate(order))
    channels = (new_heads[:, None] * head_dim + place[new_heads]).flatten()
    return Order(channels, new_heads, torch.from_numpy(np.concatenate(groups)))


def cluster_heads(shape: np.ndarray, clusters: int) -> np.ndarray:
    """Ward clusters int64 `[heads]` of the rows of `[heads, P]`, numbered by their first head."""
    if len(shape) <= clusters:
        return np.arange(len(shape))
    from sklearn.cluster import AgglomerativeClustering

    with warnings.catch_warnings(action="ignore"):  # as many equal heads as channels look like distances to scipy
        label = AgglomerativeClustering(clusters, metric="euclidean", linkage="ward").fit(shape).labels_
    first = np.unique(label, return_index=True)[1]
    return first.argsort().argsort()[label]


def cluster_channels(points: np.ndarray, clusters: int) -> np.ndarray:
    """K-means clusters int64 `[P]` of the rows of `[P, heads]`, columns ascending: runs of rows, numbered in order."""
    count = len(points)
    if count <= clusters:
        return np.arange(count)
    from sklearn.cluster import KMeans

    first = points[np.arange(clusters) * count // clusters]
    with warnings.catch_warnings(action="ignore"):  # fewer different rows than clusters
        label = KMeans(clusters, init=first, n_init=1, random_state=0).fit(points).labels_.astype(np.int64)
    # Columns ascend, so k-means keeps the order of its first centres, unless one of them attracts no row and is moved.
    return label if (np.diff(label) >= 0).all() else best_runs(points, clusters)


def best_runs(points: np.ndarray, clusters: int) -> np.ndarray:
    """The cut of the rows of `[P, heads]` into runs with the least variance inside them, by dynamic programming: the run
    int64 `[P]` of each row."""
    count = len(points)
    total = np.zeros((count + 1, points.shape[1]))
    total[1:] = points.cumsum(axis=0)
    square = np.concatenate([[0.0], (points**2).sum(axis=1).cumsum()])
    start, end = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
    spread = ((total[None] - total[:, None]) ** 2).sum(axis=2) / np.maximum(end - start, 1)
    cost = np.where(end > start, (square[None] - square[:, None] - spread).clip(min=0), np.inf)

    best, cuts = cost[0], []
    for _ in range(clusters - 1):
        both = best[:, None] + cost  # [where the last run starts, where it ends]
        cuts.append(both.argmin(axis=0))
        best = both.min(axis=0)
    label = np.zeros(count, dtype=np.int64)
    cut = count
    for where in reversed(cuts):
        cut = where[cut]
        label[cut:] += 1
    return label


@torch.no_grad()
def reorder_mamba2(mixer_tensors: dict[str, Tensor], order: Order, args: Mamba2Args) -> dict[str, Tensor]:
    """The float tensors of a mixer in a new order, under the same names; what it computes stays the same. For weights not
    yet rotated. Raises QuambaError where the gated norm looks at runs of channels that the order takes apart."""
    inner, width = args.intermediate_size, 2 * args.group_width
    if args.rms_norm:
        seen_with = (order.channels // (inner // args.norm_groups)).view(args.norm_groups, -1)
        if bool((seen_with != seen_with[:, :1]).any()):
            raise QuambaError(
                f"channels can't be reordered: heads move inside n_groups = {args.n_groups} groups, and the gated norm "
                f"has norm_groups = {args.norm_groups}"
            )
    x = torch.cat([order.channels, inner + torch.arange(width)])
    zx = torch.cat([order.channels, inner + x, 2 * inner + width + order.heads])
    rows = {
        "in_proj.weight": zx,
        "in_proj.bias": zx,
        "conv1d.weight": x,
        "conv1d.bias": x,
        "A_log": order.heads,
        "dt_bias": order.heads,
        "D": order.channels if args.D_has_hdim else order.heads,
        "norm.weight": order.channels,
    }
    done = {}
    for name, tensor in mixer_tensors.items():
        if name in rows:
            done[name] = tensor[rows[name].to(tensor.device)]
        elif name == "out_proj.weight":
            done[name] = tensor[:, order.channels.to(tensor.device)]
        elif name == "out_proj.bias":
            done[name] = tensor
        else:
            raise QuambaError(f"{name} can't be reordered: it isn't one of a float Mamba2 mixer's tensors")
    return done
