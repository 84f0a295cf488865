"""A block of the published layout, Mamba1's or Mamba2's, of any precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.limits import dt_limits
from quamba.formats.published.source import INT8, INT8_SPLIT, STATIC, Source, input_scale
from quamba.plan import BlockPlan, Rotation, SiteSpec, WeightSpec


class PublishedBlock:
    def __init__(self, source: Source, index: int, hidden: int, ssm: dict[str, Any]):
        self.source, self.hidden, self.ssm = source, hidden, ssm
        self.ours = f"backbone.layers.{index}."
        self.theirs, self.norm = self._places(index)
        self.sites: dict[str, SiteSpec] = {}
        self.weights: dict[str, WeightSpec] = {}

    def _places(self, index: int) -> tuple[str, str]:
        """Where mixer and norm lie: models of mixed precision keep them under the name of theirs."""
        at = f"backbone.layers.{index}."
        modes = {n[len(at) :].split(".")[1] for n in self.source.files.entries if n.startswith(f"{at}mixers.")}
        if len(modes) > 1:
            raise CheckpointError(
                f"block {index} holds mixers of several precisions ({', '.join(sorted(modes))}): one is needed"
            )
        mode = modes.pop() if modes else None
        return (f"{at}mixers.{mode}.", f"{at}norms.{mode}.") if mode else (f"{at}mixer.", f"{at}norm.")

    def read(self) -> tuple[dict[str, Any], BlockPlan]:
        source, m = self.source, self.theirs
        source.copy(f"{self.ours}norm.weight", f"{self.norm}weight")
        mamba1 = source.has(f"{m}x_proj.weight")
        integer = not source.has(f"{m}in_proj.scale")
        if integer:
            site = f"{self.ours}scales.mixer_in"
            self.sites["mixer_in"] = input_scale(source, f"{self.norm}output_scale", site, f"{m}in_proj")
        args = (self._mamba1 if mamba1 else self._mamba2)(integer)
        width = args["intermediate_size"] if mamba1 else args["num_heads"] * args["head_dim"]
        if integer:
            self._static("out_proj_in", f"{m}had.x_H_scale", f"{m}out_proj.a", f"{m}out_proj.input_scale")
        self.weights["out_proj"] = source.linear(f"{self.ours}mixer.out_proj", f"{m}out_proj", self.hidden)
        plan = BlockPlan(self.sites, self.weights, {"out_proj": rotation(width)})
        return {"mixer": "mamba1" if mamba1 else "mamba2", "args": args, "mlp": None}, plan

    def _static(self, site: str, *names: str) -> Tensor:
        scale = torch.tensor(self.source.scale(*names))
        self.source.constant(f"{self.ours}scales.{site}", scale)
        self.sites[site] = STATIC
        return scale

    def _grouped(self, site: str, scales: Tensor, groups: Tensor) -> None:
        """scales `[groups]` or `[groups, N]`; groups: that of each channel."""
        self.source.constant(f"{self.ours}scales.{site}", scales)
        self.source.constant(f"{self.ours}scales.{site}_group", groups.to(torch.int16))
        self.sites[site] = SiteSpec(8, "static", "group", scales.shape[0])

    def _linear(self, name: str, outputs: int, out: Tensor | None = None) -> None:
        place = f"{self.ours}mixer.{name}"
        self.weights[name] = self.source.linear(place, f"{self.theirs}{name}", outputs, out)

    def _vector(self, name: str, ours: str, theirs: str, scale: str) -> None:
        spec = self.source.vector(f"{self.ours}mixer.{ours}", f"{self.theirs}{theirs}", f"{self.theirs}{scale}")
        if not spec.is_float:
            self.weights[name] = spec

    def _mamba1(self, integer: bool) -> dict[str, Any]:
        source, m = self.source, self.theirs
        scan = f"{m}selective_scan." if integer else m
        inner, states = source.entry(f"{scan}A_log").shape
        # integer: [R, I] with padded I; float: [I, R]
        rank = source.entry(f"{m}dt_proj.weight").shape[0 if integer else 1]
        z = None
        if integer:
            conv_in = self._static("conv_in", f"{m}conv1d.input_scale", f"{scan}z_scale")
            z = self._static("z", f"{scan}z_scale", f"{m}conv1d.input_scale")
            self._static("x", f"{scan}u_scale", f"{m}conv1d.output_scale")
            x_proj = self._static("x_proj_out", f"{scan}B_scale", f"{scan}C_scale")
            dt = self._static("dt", f"{scan}dt_scale")
            self._static("state", f"{scan}ssm_state_scale")
            self._linear("in_proj", 2 * inner, torch.cat([conv_in.expand(inner), z.expand(inner)]))
            self._linear("x_proj", rank + 2 * states, x_proj)
            self._linear("dt_proj", inner, dt)
        else:
            self._linear("in_proj", 2 * inner)
            self._linear("x_proj", rank + 2 * states)
            source.copy(f"{self.ours}mixer.dt_proj.weight", f"{m}dt_proj.weight")
        taps = self._conv(inner)
        bias = "dt_bias" if integer else "dt_proj_bias"
        self._vector("dt_bias", "dt_proj.bias", f"{scan}{bias}".removeprefix(m), f"{scan}dt_bias_scale".removeprefix(m))
        self._vector("A_log", "A_log", f"{scan}A_log".removeprefix(m), f"{scan}A_scale".removeprefix(m))
        self._vector("D", "D", f"{scan}D".removeprefix(m), f"{scan}D_scale".removeprefix(m))
        return {
            "intermediate_size": inner,
            "state_size": states,
            "conv_kernel": taps,
            "time_step_rank": rank,
            "use_bias": False,
            "use_conv_bias": source.has(f"{m}conv1d.bias"),
        }

    def _conv(self, channels: int) -> int:
        """One scale for all of the convolution's weights, another for its biases (Mamba1), or float."""
        source, ours, theirs = self.source, f"{self.ours}mixer.conv1d", f"{self.theirs}conv1d"
        weight = source.entry(f"{theirs}.weight")
        shape = (channels, 1, weight.shape[-1])
        source.make(f"{ours}.weight", shape, weight.dtype, lambda w: w, f"{theirs}.weight")
        if not weight.dtype.is_floating_point:
            source.make(f"{ours}.weight_scale", (), torch.float32, lambda s: s, f"{theirs}.weight_scale")
            self.weights["conv1d"] = INT8
        if source.has(f"{theirs}.bias"):
            spec = source.vector(f"{ours}.bias", f"{theirs}.bias", f"{theirs}.bias_scale")
            self.weights |= {} if spec.is_float else {"conv_bias": spec}
        return weight.shape[-1]

    def _mamba2(self, integer: bool) -> dict[str, Any]:
        source, m = self.source, self.theirs
        scan = f"{m}qchunk_scan." if integer else m
        (heads,) = source.entry(f"{scan}dt_bias").shape
        out_proj = source.entry(f"{m}out_proj.weight")
        inner = out_proj.shape[0] if out_proj.dtype == torch.int8 else out_proj.shape[0] * 16
        channels = source.entry(f"{m}conv1d.weight").shape[0]
        groups = self.ssm.get("ngroups", 1)
        if source.has(f"{m}conv1d.B_out_scales"):
            groups = (
                max(source.entry(f"{m}conv1d.B_out_scales").shape or (1,), default=1) if self._is_grouped() else groups
            )
        both = channels - inner
        if groups < 1 or both < 2 or both % (2 * groups) or inner % heads or heads % groups:
            raise CheckpointError(
                f"{m}: {channels} channels of the convolution, {inner} of the scan, {heads} heads and {groups} groups don't fit"
            )
        states, width = both // 2 // groups, inner // heads
        sizes = [inner, inner, both // 2, both // 2, heads]
        out = None
        if integer:
            z = self._static("z", f"{m}norm.z_scale")
            dt = self._static("dt", f"{scan}dt_scale")
            conv = torch.tensor([source.scale(f"{m}conv1d.{part}_scale") for part in "xBC"])
            which = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes[1:4]))
            self._grouped("conv_in", conv, which)
            out = torch.cat([z.expand(inner), conv[which], dt.expand(heads)])
            self._scan_scales(scan, heads, width, groups, states)
        self._linear("in_proj", sum(sizes), out)
        taps = self._split_conv(sizes[1:4]) if integer else self._conv(channels)
        for name in ("dt_bias", "A_log", "D"):
            self._vector(name, name, f"{scan}{name}".removeprefix(m), f"{scan}{name}_scale".removeprefix(m))
        source.copy(f"{self.ours}mixer.norm.weight", f"{m}norm.weight")
        return {
            "num_heads": heads,
            "head_dim": width,
            "state_size": states,
            "n_groups": groups,
            "norm_groups": groups,
            "conv_kernel": taps,
            "chunk_size": self.ssm.get("chunk_size", 256),
            "use_bias": False,
            "use_conv_bias": source.has(f"{m}conv1d.bias"),
            "norm_before_gate": self.ssm.get("norm_before_gate", False),
        } | dt_limits(self.ssm.get("dt_limit", (0.0, float("inf"))))

    def _is_grouped(self) -> bool:
        return self.source.has(f"{self.theirs}conv1d.x_head_group_range")

    def _scan_scales(self, scan: str, heads: int, width: int, groups: int, states: int) -> None:
        """x, B, C and the state: for four groups of channels in each of four groups of heads of an SSD group, or one."""
        source, conv = self.source, f"{self.theirs}conv1d."
        for site, names in (
            ("B", (f"{conv}B_out_scales", f"{scan}B_scale")),
            ("C", (f"{conv}C_out_scales", f"{scan}C_scale")),
        ):
            name = names[0] if source.has(names[0]) else names[1]
            scales = source.values(name)
            if len(scales) == 1 and not self._is_grouped():
                self._static(site, *names)
            else:
                source.same(name, names[1])
                self._grouped(site, scales, torch.arange(groups * states) // states)
        if not self._is_grouped():
            self._static("x", f"{conv}x_out_scales", f"{scan}x_scales")
            self._static("state", f"{scan}ssm_state_scale")
            return
        for ours, twin in (("x_out_scales", "x_scales"), *((f"x_{part}_group_range",) * 2 for part in ("head", "dim"))):
            source.same(f"{conv}{ours}", f"{scan}{twin}")
        x, ends = source.entry(f"{conv}x_out_scales"), source.entry(f"{conv}x_dim_group_range")
        _, head_groups, channel_groups = ends.shape
        if tuple(x.shape) != tuple(ends.shape):
            raise CheckpointError(
                f"{conv}x_out_scales and x_dim_group_range have the shapes {list(x.shape)} and {list(ends.shape)}"
            )
        heads_end = source.values(f"{conv}x_head_group_range").view(groups, head_groups)
        channels_end = source.values(f"{conv}x_dim_group_range").view(groups, head_groups, channel_groups)
        if not bool((heads_end[:, -1] == heads // groups).all() and (channels_end[..., -1] == width).all()):
            raise CheckpointError(
                f"{conv}x_head_group_range and x_dim_group_range don't end at the last head and channel"
            )
        index = torch.empty(heads, width, dtype=torch.int64)
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            cluster = int(torch.searchsorted(heads_end[group].contiguous(), float(place), right=True))
            channel = torch.searchsorted(
                channels_end[group, cluster].contiguous(), torch.arange(width).float(), right=True
            )
            index[head] = (group * head_groups + cluster) * channel_groups + channel
        self._grouped("x", source.values(f"{conv}x_out_scales"), index.flatten())
        state = source.values(f"{scan}ssm_state_scale").view(-1, states)
        self._grouped("state", state, index.flatten())

    def _split_conv(self, sizes: list[int]) -> int:
        """x, B and C have scales of their own, for weights and for biases."""
        source, ours, theirs = self.source, f"{self.ours}mixer.conv1d", f"{self.theirs}conv1d"
        channels, taps = source.entry(f"{theirs}.weight").shape
        source.make(f"{ours}.weight", (channels, 1, taps), torch.int8, lambda w: w, f"{theirs}.weight")
        counts = torch.tensor(sizes)
        spread = lambda *scales: torch.cat([s.float().flatten() for s in scales]).repeat_interleave(counts)  # noqa: E731
        names = [f"{theirs}.w{part}_scale" for part in "xBC"]
        source.make(f"{ours}.weight_scale", (channels,), torch.float32, spread, *names)
        self.weights["conv1d"] = INT8_SPLIT
        if source.has(f"{theirs}.bias"):
            source.copy(f"{ours}.bias", f"{theirs}.bias")
            names = [f"{theirs}.b{part}_scale" for part in "xBC"]
            source.make(f"{ours}.bias_scale", (channels,), torch.float32, spread, *names)
            self.weights["conv_bias"] = INT8_SPLIT
        return taps


def rotation(width: int) -> Rotation:
    """The published online rotation of this width: its table of order 12, else of order 40, else a power of two."""
    for order in (12, 40):
        if width % order == 0:
            return Rotation(width, order, f"dao{order}")
    return Rotation(width)
