"""A block of the published layout, Mamba1's or Mamba2's, of any precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quamba.errors import CheckpointError
from quamba.formats.published.linear import INT8, INT8_SPLIT, INTEGER, input_alias, inputs_of, precision, read_linear
from quamba.formats.published.source import STATIC, TOKEN, Alias, Source
from quamba.plan import BlockPlan, Rotation, SiteSpec, WeightSpec


class PublishedBlock:
    """`shapes` says what the block is; `read`, given the settled sizes, adds its tensors to the view."""

    def __init__(self, source: Source, index: int):
        self.source = source
        self.ours = f"backbone.layers.{index}."
        self.theirs, self.norm = self._places()
        self.sites: dict[str, SiteSpec] = {}
        self.weights: dict[str, WeightSpec] = {}
        names = [n[len(self.theirs) :].split(".")[0] for n in source.files.entries if n.startswith(self.theirs)]
        self.mamba1 = not {"x_proj", "dt_proj", "selective_scan"}.isdisjoint(names)
        self.precision = precision(source, f"{self.theirs}in_proj")
        self.integer = self.precision in INTEGER
        self.scan = self.theirs + (("selective_scan." if self.mamba1 else "qchunk_scan.") if self.integer else "")

    def _places(self) -> tuple[str, str]:
        """Where mixer and norm lie: models of mixed precision keep them under the name of theirs."""
        at = self.ours
        modes = {n[len(at) :].split(".")[1] for n in self.source.files.entries if n.startswith(f"{at}mixers.")}
        if len(modes) > 1:
            raise CheckpointError(
                f"{at[:-1]} holds mixers of several precisions ({', '.join(sorted(modes))}): one is needed"
            )
        mode = modes.pop() if modes else None
        return (f"{at}mixers.{mode}.", f"{at}norms.{mode}.") if mode else (f"{at}mixer.", f"{at}norm.")

    def shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """The shapes that a float block of these sizes would have, by our names."""
        source, m, at = self.source, self.theirs, f"{self.ours}mixer."
        conv = source.entry(f"{m}conv1d.weight").shape
        found: dict[str, tuple[int, ...]] = {
            f"{at}conv1d.weight": (conv[0], 1, conv[-1]),
            f"{at}out_proj.weight": (hidden, inputs_of(source, f"{m}out_proj")),
        }
        if self.mamba1:
            dt_proj = source.entry(f"{m}dt_proj.weight").shape
            found[f"{at}x_proj.weight"] = (0, 0)
            found[f"{at}A_log"] = A = tuple(source.entry(f"{self.scan}A_log").shape)
            found[f"{at}dt_proj.weight"] = (A[0], dt_proj[0 if self.integer else -1])
        else:
            found |= {f"{at}{name}": tuple(source.entry(f"{self.scan}{name}").shape) for name in ("dt_bias", "D")}
        for name in ("conv1d.bias", "norm.weight", "in_proj.bias"):
            if source.has(f"{m}{name}"):
                found[f"{at}{name}"] = tuple(source.files.entries[f"{m}{name}"].shape)
        return found

    def read(self, args: dict[str, Any], hidden: int) -> BlockPlan:
        source, m = self.source, self.theirs
        self.args = args
        inner = args["intermediate_size"] if self.mamba1 else args["num_heads"] * args["head_dim"]
        source.copy(f"{self.ours}norm.weight", f"{self.norm}weight", hidden)
        out = (self._mamba1 if self.mamba1 else self._mamba2)(inner)
        place = f"{self.ours}mixer."
        site = f"{self.ours}scales.mixer_in"
        split = out is not None and source.has(f"{m}in_proj.b") and source.entry(f"{m}in_proj.b").shape[-1] != 1
        single = 1.0 if out is None or split else float(out[0])
        mixer_in = input_site(source, f"{self.norm}output_scale", site, f"{m}in_proj", single)
        self.sites |= {} if mixer_in.is_float else {"mixer_in": mixer_in}
        rows = 2 * inner if self.mamba1 else inner + self._channels(inner) + args["num_heads"]
        self.weights["in_proj"] = read_linear(source, f"{place}in_proj", f"{m}in_proj", hidden, rows, out)
        if self.integer:
            self._static("out_proj_in", f"{m}had.x_H_scale", input_alias(source, f"{m}out_proj"))
        self.weights["out_proj"] = read_linear(source, f"{place}out_proj", f"{m}out_proj", inner, hidden)
        return BlockPlan(self.sites, self.weights, {"out_proj": rotation(inner)})

    def _channels(self, inner: int) -> int:
        """Of the convolution."""
        return inner if self.mamba1 else inner + 2 * self.args["n_groups"] * self.args["state_size"]

    def _static(self, site: str, *aliases: str | Alias) -> Tensor:
        scale = torch.tensor(self.source.scale(*aliases))
        self.source.constant(f"{self.ours}scales.{site}", scale)
        self.sites[site] = STATIC
        return scale

    def _grouped(self, site: str, name: str, scales: Tensor, groups: Tensor) -> None:
        """scales `[groups]` or `[groups, N]`; groups: that of each channel."""
        self.source.positive(name, scales[groups.unique()].flatten())
        self.source.constant(f"{self.ours}scales.{site}", scales)
        self.source.constant(f"{self.ours}scales.{site}_group", groups.to(torch.int16))
        self.sites[site] = SiteSpec(8, "static", "group", scales.shape[0])

    def _vector(self, name: str, ours: str, theirs: str, scale: str, *shape: int) -> None:
        """A small parameter: int8 with one scale, or float."""
        source, place = self.source, f"{self.ours}mixer.{ours}"
        if source.entry(theirs).dtype != torch.int8:
            source.copy(place, theirs, *shape)
            return
        source.expect(theirs, torch.int8, *shape)
        source.make(place, shape, torch.int8, lambda x: x, theirs)
        source.constant(f"{place}_scale", torch.tensor(source.one(scale)))
        self.weights[name] = INT8

    def _mamba1(self, inner: int) -> Tensor | None:
        """All but in_proj and out_proj; the scales of in_proj's outputs, if they are integer."""
        source, m, scan, states = self.source, self.theirs, self.scan, self.args["state_size"]
        rank, place = self.args["time_step_rank"], f"{self.ours}mixer."
        out, x_proj, dt = None, None, None
        if self.integer:
            both = (f"{scan}z_scale", f"{m}conv1d.input_scale")
            conv_in, z = self._static("conv_in", *reversed(both)), self._static("z", *both)
            dt = self._static("dt", f"{scan}dt_scale")
            dt_proj = input_alias(source, f"{m}dt_proj", float(dt))
            x_proj = self._static("x_proj_out", f"{scan}B_scale", f"{scan}C_scale", dt_proj)
            projection = input_alias(source, f"{m}x_proj", float(x_proj))
            self._static("x", f"{scan}u_scale", f"{m}conv1d.output_scale", projection)
            self._static("state", f"{scan}ssm_state_scale")
            out = torch.cat([conv_in.expand(inner), z.expand(inner)])
        for name, inputs, outputs, scale in (
            ("x_proj", inner, rank + 2 * states, x_proj),
            ("dt_proj", rank, inner, dt),
        ):
            self.weights[name] = read_linear(source, f"{place}{name}", f"{m}{name}", inputs, outputs, scale)
        self._conv(inner)
        bias = f"{scan}dt_bias" if self.integer else f"{m}dt_proj_bias"
        self._vector("dt_bias", "dt_proj.bias", bias, f"{scan}dt_bias_scale", inner)
        self._vector("A_log", "A_log", f"{scan}A_log", f"{scan}A_scale", inner, states)
        self._vector("D", "D", f"{scan}D", f"{scan}D_scale", inner)
        return out

    def _conv(self, channels: int) -> None:
        """One scale for all of the convolution's weights, another for its biases (Mamba1), or float."""
        source, theirs = self.source, f"{self.theirs}conv1d"
        shape = (channels, 1, self.args["conv_kernel"])
        self._vector("conv1d", "conv1d.weight", f"{theirs}.weight", f"{theirs}.weight_scale", *shape)
        source.known(f"{theirs}.bias_scale")
        if self.args["use_conv_bias"]:
            self._vector("conv_bias", "conv1d.bias", f"{theirs}.bias", f"{theirs}.bias_scale", channels)

    def _mamba2(self, inner: int) -> Tensor | None:
        """All but in_proj and out_proj; the scales of in_proj's outputs, if they are integer."""
        source, m, scan, args = self.source, self.theirs, self.scan, self.args
        heads, width = args["num_heads"], args["n_groups"] * args["state_size"]
        out = None
        if self.integer:
            z = self._static("z", f"{m}norm.z_scale")
            dt = self._static("dt", f"{scan}dt_scale")
            conv = torch.tensor([source.scale(f"{m}conv1d.{part}_scale") for part in "xBC"])
            which = torch.repeat_interleave(torch.arange(3), torch.tensor([inner, width, width]))
            self._grouped("conv_in", f"{m}conv1d.x_scale", conv, which)
            out = torch.cat([z.expand(inner), conv[which], dt.expand(heads)])
            self._scan_scales(inner)
            self._split_conv([inner, width, width])
        else:
            self._conv(self._channels(inner))
        for name, shape in (("dt_bias", heads), ("A_log", heads), ("D", heads)):
            self._vector(name, name, f"{scan}{name}", f"{scan}{name}_scale", shape)
        source.copy(f"{self.ours}mixer.norm.weight", f"{m}norm.weight", inner)
        return out

    def _scan_scales(self, inner: int) -> None:
        """x, B, C and the state: for four groups of channels in each of four groups of heads of an SSD group, or one."""
        source, conv, scan = self.source, f"{self.theirs}conv1d.", self.scan
        groups, states = self.args["n_groups"], self.args["state_size"]
        ends = [source.either(f"{conv}x_{part}_group_range", f"{scan}x_{part}_group_range") for part in ("head", "dim")]
        grouped = any(source.has(name) for name in ends)
        for site in ("B", "C"):
            if not grouped:
                self._static(site, f"{conv}{site}_out_scales", f"{scan}{site}_scale")
                continue
            name = source.either(f"{conv}{site}_out_scales", f"{scan}{site}_scale")
            self._grouped(site, name, source.values(name, groups), torch.arange(groups * states) // states)
        if not grouped:
            self._static("x", f"{conv}x_out_scales", f"{scan}x_scales")
            self._static("state", f"{scan}ssm_state_scale")
            return
        name = source.either(f"{conv}x_out_scales", f"{scan}x_scales")
        shape = source.entry(ends[1]).shape
        if len(shape) != 3 or shape[0] != groups:
            raise CheckpointError(
                f"{ends[1]} has shape {list(shape)}; expected [{groups}, groups of heads, of channels]"
            )
        index = self._clusters(ends, *shape).flatten()
        self._grouped("x", name, source.values(name, *shape), index)
        state = source.values(f"{scan}ssm_state_scale", *shape, states).view(-1, states)
        self._grouped("state", f"{scan}ssm_state_scale", state, index)

    def _clusters(self, names: list[str], groups: int, clusters: int, parts: int) -> Tensor:
        """Of each head's each channel the number of its group `[H, P]`; the file says where groups end."""
        heads, width = self.args["num_heads"] // groups, self.args["head_dim"]
        heads_end = self._ends(names[0], heads, groups, clusters)
        dims_end = self._ends(names[1], width, groups, clusters, parts)
        index = torch.empty(groups, heads, width, dtype=torch.int64)
        for group in range(groups):
            cluster = torch.searchsorted(heads_end[group], torch.arange(heads), right=True)
            for head, which in enumerate(cluster.tolist()):
                part = torch.searchsorted(dims_end[group, which], torch.arange(width), right=True)
                index[group, head] = (group * clusters + which) * parts + part
        return index

    def _ends(self, name: str, last: int, *shape: int) -> Tensor:
        self.source.expect(name, torch.int32, *shape)
        ends = self.source.files.read([name])[name].long().view(shape).contiguous()
        if bool((ends < 0).any() or (ends.diff() < 0).any() or (ends[..., -1] != last).any()):
            raise CheckpointError(f"{name} doesn't hold ascending ends of groups, the last of them {last}")
        return ends

    def _split_conv(self, sizes: list[int]) -> None:
        """x, B and C have scales of their own, for weights and for biases."""
        source, ours, theirs = self.source, f"{self.ours}mixer.conv1d", f"{self.theirs}conv1d"
        channels, taps, counts = sum(sizes), self.args["conv_kernel"], torch.tensor(sizes)
        biases = [f"{theirs}.b{part}_scale" for part in "xBC"]
        source.known(*biases)
        entries: list[tuple[str, str, tuple[int, ...], list[str]]]
        entries = [("conv1d", "weight", (channels, 1, taps), [f"{theirs}.w{part}_scale" for part in "xBC"])]
        if self.args["use_conv_bias"]:
            entries.append(("conv_bias", "bias", (channels,), biases))
        for name, part, shape, places in entries:
            source.expect(f"{theirs}.{part}", torch.int8, *shape)
            source.make(f"{ours}.{part}", shape, torch.int8, lambda x: x, f"{theirs}.{part}")
            scales = torch.tensor([source.one(place) for place in places])
            source.constant(f"{ours}.{part}_scale", scales.repeat_interleave(counts))
            self.weights[name] = INT8_SPLIT


def input_site(source: Source, theirs: str, ours: str, projection: str, out: float = 1.0) -> SiteSpec:
    """What a norm hands to a projection: floats, or integers with its static scale, or, if it has none, with one for each
    token, as the published norm then finds itself. out: the projection's one output scale, if it has one."""
    if precision(source, projection) not in INTEGER:
        if source.has(theirs):
            source.values(theirs)
            source.repairs.add("a norm has a scale that nothing uses", "the projection behind it takes floats", theirs)
        return SiteSpec()
    alias = input_alias(source, projection, out)
    if not source.has(theirs):
        source.known(alias[0])
        source.repairs.add(
            "a norm in front of an integer projection has no static scale: every token gets its own",
            "scales found from the values themselves never clip",
            theirs,
        )
        return TOKEN
    source.constant(ours, torch.tensor(source.scale(theirs, alias)))
    return STATIC


def rotation(width: int) -> Rotation:
    """The published online rotation of this width: its table of order 12, else of order 40, else a power of two."""
    for order in (12, 40):
        if width % order == 0:
            return Rotation(width, order, f"dao{order}")
    return Rotation(width)
