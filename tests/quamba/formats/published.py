"""Random small models in the published format and what each of their numbers stands for: the loader's independent truth.

Written from the format's formulas alone, one statement a formula. `published` makes a model, `save` writes its two
files, `logits` runs it in float64 from the meaning of its numbers, never from the bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.quamba.formats.published_forward import Tables, forward
from tests.quamba.formats.published_packing import (
    COLUMNS,
    GROUP,
    codes4,
    codes8,
    columns,
    f32,
    pack,
    pack_embedding,
    permute_channel_scales,
    permute_group_scales,
    scale_of,
)


@dataclass
class Published:
    """`state` is what pytorch_model.bin holds, `truth` the float64 values and scales it stands for, by our names."""

    config: dict
    state: dict
    truth: dict[str, Tensor]
    tables: Tables = None


class Writer:
    """Collects what the file holds and what it stands for, side by side."""

    def __init__(self) -> None:
        self.state: dict = {}
        self.truth: dict[str, Tensor] = {}

    def plain(self, key: str, name: str, w: Tensor, dtype: torch.dtype = torch.float16) -> None:
        self.state[key] = w.to(dtype)
        self.truth[name] = self.state[key].double()

    def int8(self, key: str, name: str, w: Tensor) -> float:
        q, s = codes8(w)
        self.state[key], self.truth[name] = q.to(torch.int8), q * s
        return s

    def linear(self, key: str, name: str, w: Tensor, precision: str, s_in: float = 1, s_out=None) -> None:
        """w [N, K] under the prefix `key`. s_out: None for 16-bit outputs, a number, or the splits [(rows, number)]."""
        splits = s_out if isinstance(s_out, list) else [(len(w), 1.0 if s_out is None else s_out)]
        out = torch.cat([torch.full((rows,), s, dtype=torch.float64) for rows, s in splits])
        if precision == "W8A8":
            parts = [codes8(part) for part in w.split([rows for rows, _ in splits])]
            q = torch.cat([part for part, _ in parts])
            held = pad(q, (0, 0, 0, -len(q) % COLUMNS[precision])).to(torch.int8)
            self.state[key + "weight"] = held.T
            if isinstance(s_out, list):
                s_w = torch.cat([torch.full((len(part),), s, dtype=torch.float64) for part, s in parts])
                b = (s_w / out).float()
                self.state |= {key + "a": torch.tensor([[s_in]]), key + "b": columns(b[None], precision)}
                self.truth[name] = q * (b.double() * out)[:, None]
            else:
                s_w, a = parts[0][1], s_in / splits[0][1]
                self.state |= {key + "a": torch.tensor([[a]]), key + "b": torch.tensor([[s_w]]), key + "alpha": s_w * a}
                self.truth[name] = q * s_w
            return
        u, s = codes4(w)
        centred = u.reshape(-1, GROUP, len(w)) - 8
        held = columns(u, precision, 8).int()
        self.state[key + "workspace"] = torch.zeros(held.shape[1] // 64 * 16, dtype=torch.int32)
        self.state[key + "weight"] = pack(held, precision)
        if precision == "W4A16":
            self.state[key + "scale"] = permute_group_scales(columns(s, precision)).half()
            value = centred * s[:, None]
        else:
            channel = ((centred * s[:, None]).abs().amax((0, 1)) / 127).float()
            s_group = (s / channel).half()
            s_channel = (channel / out).float()
            self.state[key + "input_scale"] = torch.tensor(s_in)
            self.state[key + "s_channel"] = permute_channel_scales(columns(s_channel[None], precision))
            self.state[key + "s_group"] = permute_group_scales(columns(s_group, precision))
            value = s_channel.double() * out * (centred * s_group.double()[:, None]).round()
        self.truth[name] = value.reshape(u.shape).T.contiguous()

    def embedding(self, w: Tensor, bits: int) -> None:
        key = "backbone.embedding."
        if bits == 16:
            return self.plain(key + "weight", key + "weight", w)
        s = (w.amax(1) / (127 if bits == 8 else 8)).half()  # of the signed maximum
        wide = s.double()[:, None]
        if bits == 8:
            q = (w / wide).round().clamp(-128, 127)
            self.state[key + "weight"] = q.to(torch.int8)
        else:
            q = (w / wide + 8).round().clamp(0, 15)
            self.state[key + "weight"] = pack_embedding(q)
            q = q - 8
        self.state[key + "scales"] = s
        self.truth[key + "weight"] = q * wide

    def scales(self, layer: str, **sites: Tensor) -> None:
        self.truth |= {f"{layer}scales.{site}": s.double() for site, s in sites.items()}


def mamba1(out: Writer, layer: str, m: str, w: dict[str, Tensor], precision: str, peak: dict[str, Tensor]) -> None:
    mixer = layer + "mixer."
    if precision == "W4A16":
        for part in ("in_proj", "x_proj", "out_proj"):
            out.linear(f"{m}{part}.", f"{mixer}{part}.weight", w[part], precision)
        for part in ("conv1d.weight", "conv1d.bias"):
            out.plain(m + part, mixer + part, w[part])
        out.plain(m + "dt_proj.weight", mixer + "dt_proj.weight", w["dt_proj"])
        out.plain(m + "dt_proj_bias", mixer + "dt_proj.bias", w["dt_proj.bias"], torch.float32)
        out.plain(m + "A_log", mixer + "A_log", w["A_log"], torch.float32)
        out.plain(m + "D", mixer + "D", w["D"], torch.float32)
        return
    s_in, x, x_proj, dt, held, y = (
        f32(scale_of(peak[site].max())) for site in ("mixer_in", "x", "x_proj_out", "dt", "state", "out_proj_in")
    )
    xz = f32(scale_of(torch.cat([peak["conv_in"], peak["z"]]).max()))
    out.linear(m + "in_proj.", mixer + "in_proj.weight", w["in_proj"], precision, s_in, xz)
    out.linear(m + "x_proj.", mixer + "x_proj.weight", w["x_proj"], precision, x, x_proj)
    out.linear(m + "dt_proj.", mixer + "dt_proj.weight", w["dt_proj"], "W8A8", x_proj, dt)
    out.linear(m + "out_proj.", mixer + "out_proj.weight", w["out_proj"], precision, y)
    conv, scan = m + "conv1d.", m + "selective_scan."
    out.state |= {conv + "input_scale": xz, conv + "output_scale": x, m + "had.x_H_scale": y}
    out.state[conv + "weight_scale"] = out.int8(conv + "weight", mixer + "conv1d.weight", w["conv1d.weight"])
    out.state[conv + "weight"] = out.state[conv + "weight"][:, 0]
    out.state[conv + "bias_scale"] = out.int8(conv + "bias", mixer + "conv1d.bias", w["conv1d.bias"])
    known = {"u": x, "dt": dt, "B": x_proj, "C": x_proj, "z": xz, "ssm_state": held}
    known["dt_bias"] = out.int8(scan + "dt_bias", mixer + "dt_proj.bias", w["dt_proj.bias"])
    known["A"] = out.int8(scan + "A_log", mixer + "A_log", w["A_log"])
    known["D"] = out.int8(scan + "D", mixer + "D", w["D"])
    out.state |= {f"{scan}{site}_scale": torch.tensor(s) for site, s in known.items()}

    def each(site: str, s: float) -> Tensor:
        return torch.full_like(peak[site], s)

    out.scales(layer, mixer_in=each("mixer_in", s_in), conv_in=each("conv_in", xz), z=each("z", xz), x=each("x", x))
    out.scales(layer, x_proj_out=each("x_proj_out", x_proj), dt=each("dt", dt), out_proj_in=each("out_proj_in", y))
    out.scales(layer, B=each("B", x_proj), C=each("C", x_proj), state=torch.full_like(peak["z"], held))


def cells(heads: Tensor, dims: Tensor) -> Iterator[tuple[int, int, int, slice, slice]]:
    """The 4 x 4 cells of every SSD group: group, head group, channel group, heads of the group, channels of a head."""
    for g in range(len(heads)):
        head = 0
        for a in range(4):
            channel = 0
            for c in range(4):
                yield g, a, c, slice(head, int(heads[g, a])), slice(channel, int(dims[g, a, c]))
                channel = int(dims[g, a, c])
            head = int(heads[g, a])


def mamba2(
    out: Writer,
    layer: str,
    m: str,
    w: dict[str, Tensor],
    precision: str,
    peak: dict[str, Tensor],
    ngroups: int,
    ranges: tuple[Tensor, Tensor] | None,
) -> None:
    mixer = layer + "mixer."
    inner, states = peak["state"].shape
    nheads, bc = len(w["A_log"]), ngroups * states
    if precision == "W4A16":
        for part in ("in_proj", "out_proj"):
            out.linear(f"{m}{part}.", f"{mixer}{part}.weight", w[part], precision)
        for part in ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "norm.weight"):
            out.plain(m + part, mixer + part, w[part])
        out.plain(m + "D", mixer + "D", w["D"], torch.float32)
        return
    sizes = [inner, bc, bc]
    s_in, s_z, s_dt, s_y = (f32(scale_of(peak[site].max())) for site in ("mixer_in", "z", "dt", "out_proj_in"))
    s_conv = [f32(scale_of(part.max())) for part in peak["conv_in"].split(sizes)]
    splits = list(zip([inner, *sizes, nheads], [s_z, *s_conv, s_dt]))
    out.linear(m + "in_proj.", mixer + "in_proj.weight", w["in_proj"], precision, s_in, splits)
    out.linear(m + "out_proj.", mixer + "out_proj.weight", w["out_proj"], precision, s_y)

    conv, scan = m + "conv1d.", m + "qchunk_scan."
    for part in ("weight", "bias"):
        split = w[f"conv1d.{part}"].split(sizes)
        for name, piece in zip("xBC", split):
            out.state[f"{conv}{part[0]}{name}_scale"] = out.int8(name + part, name + part, piece)
        out.state[conv + part] = torch.cat([out.state.pop(name + part) for name in "xBC"])
        out.truth[mixer + "conv1d." + part] = torch.cat([out.truth.pop(name + part) for name in "xBC"])
    out.state[conv + "weight"] = out.state[conv + "weight"][:, 0]
    out.state |= {f"{conv}{name}_scale": s for name, s in zip("xBC", s_conv)}

    if ranges is None:
        x_scales, B_scale, C_scale = (scale_of(peak[site].max()) for site in "xBC")
        state_scale = scale_of(peak["state"].max()).reshape(1)
        x, B, C = x_scales.expand(inner), B_scale.expand(bc), C_scale.expand(bc)
        state = state_scale.expand(inner)
    else:
        B_scale, C_scale = (scale_of(peak[site].reshape(ngroups, states).amax(1)) for site in "BC")
        B, C = (s[:, None].expand(ngroups, states).reshape(bc) for s in (B_scale, C_scale))
        x_peak = peak["x"].reshape(ngroups, nheads // ngroups, -1)
        state_peak = peak["state"].reshape(*x_peak.shape, states)
        x_scales, x = torch.zeros(ngroups, 4, 4), torch.zeros(x_peak.shape)
        state_scale, state = torch.zeros(ngroups, 4, 4, states), torch.zeros(state_peak.shape)
        for g, a, c, heads, dims in cells(*ranges):
            x_scales[g, a, c] = scale_of(x_peak[g, heads, dims].max())
            state_scale[g, a, c] = scale_of(state_peak[g, heads, dims].amax((0, 1)))
            x[g, heads, dims] = x_scales[g, a, c]
            state[g, heads, dims] = state_scale[g, a, c]
        x, state = x.reshape(inner), state.reshape(inner, states)
        for prefix in (conv, scan):
            out.state[prefix + "x_head_group_range"] = ranges[0].clone()
            out.state[prefix + "x_dim_group_range"] = ranges[1].clone()
    out.state |= {conv + "x_out_scales": x_scales, conv + "B_out_scales": B_scale, conv + "C_out_scales": C_scale}
    copies = {"x_scales": x_scales.clone(), "B_scale": B_scale.clone(), "C_scale": C_scale.clone()}
    out.state |= {scan + key: t for key, t in copies.items()}
    out.state |= {scan + "ssm_state_scale": state_scale, scan + "dt_scale": torch.tensor(s_dt)}
    out.plain(scan + "dt_bias", mixer + "dt_bias", w["dt_bias"])
    for part in ("A_log", "D"):
        out.state[f"{scan}{part}_scale"] = torch.tensor(out.int8(scan + part, mixer + part, w[part]))
    out.plain(m + "norm.weight", mixer + "norm.weight", w["norm.weight"])
    out.state |= {m + "norm.z_scale": s_z, m + "norm.output_scale": None, m + "had.x_H_scale": s_y}

    conv_in = torch.cat([torch.full((size,), s) for size, s in zip(sizes, s_conv)])
    out.scales(layer, conv_in=conv_in, x=x, B=B, C=C, state=state)
    for site, s in (("mixer_in", s_in), ("z", s_z), ("dt", s_dt), ("out_proj_in", s_y)):
        out.scales(layer, **{site: torch.full_like(peak[site], s)})


def published(
    family: str,
    precision: str = "W8A8",
    *,
    grouped: bool = True,
    embedding: int = 16,
    head: str = "float",
    layers: int = 2,
    hybrid: list[str] | None = None,
    ngroups: int = 1,
    hidden: int = 128,
    expand: int = 2,
    d_state: int = 16,
    rank: int = 16,
    headdim: int = 8,
    vocab: int = 100,
    tables: Tables = None,
    seed: int = 0,
) -> Published:
    """A random model of "mamba1" or "mamba2". Static scales are those of a float run of the dequantized model.

    `embedding` has 16, 8 or 4 bits, `head` is "float" or a precision. `hybrid` names each layer's precision and brings
    the embedding and head such models always have. `tables` holds the Hadamard matrices, needed when 12 or 40 divides
    the inner width.
    """
    second = family == "mamba2"
    modes = hybrid or [precision] * layers
    if hybrid:
        embedding, head, layers = 4, "W4A8", len(hybrid)
    inner, rows = expand * hidden, -(-vocab // 8) * 8
    nheads, bc = inner // headdim, ngroups * d_state
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64) * std + mean

    def ends(length: int) -> list[int]:
        """A random cut of `length` into four, as cumulative ends."""
        return [*sorted((torch.randperm(length - 1, generator=random)[:3] + 1).tolist()), length]

    def mixer() -> dict[str, Tensor]:
        channels = inner + 2 * bc if second else inner
        rows = [inner, inner, bc, bc, nheads] if second else [2 * inner]
        sizes = zip(rows, (1.0, 1.5, 0.8, 1.2, 0.6))  # unlike, so that a split under another's scale shows
        w = {
            "in_proj": torch.cat([normal(n, hidden, std=size * hidden**-0.5) for n, size in sizes]),
            "conv1d.weight": normal(channels, 1, 4, std=0.5),
            "conv1d.bias": normal(channels, std=0.3),
            "out_proj": normal(hidden, inner, std=inner**-0.5),
            "D": normal(nheads if second else inner, std=0.3, mean=1.0),
        }
        if second:
            w["A_log"] = torch.rand(nheads, generator=random, dtype=torch.float64) * math.log(16)
            return w | {"dt_bias": normal(nheads, mean=-2.0), "norm.weight": normal(inner, std=0.2, mean=1.0)}
        w["A_log"] = torch.arange(1, d_state + 1).double().log() + normal(inner, d_state, std=0.1)
        w["x_proj"] = normal(rank + 2 * d_state, inner, std=1.5 * inner**-0.5)
        w["dt_proj"] = normal(inner, rank, std=rank**-0.5)
        return w | {"dt_proj.bias": normal(inner, std=0.5, mean=-3.0), "out_proj": w["out_proj"] * 2}

    weights = [mixer() for _ in range(layers)]
    table, top = normal(rows, hidden), normal(rows, hidden, std=hidden**-0.5)
    per = nheads // ngroups
    ranges = [
        (torch.tensor([ends(per) for _ in range(ngroups)], dtype=torch.int32),
         torch.tensor([[ends(headdim) for _ in range(4)] for _ in range(ngroups)], dtype=torch.int32))
        if second and grouped else None
        for _ in range(layers)
    ]  # fmt: skip
    widths = {"mixer_in": hidden, "conv_in": inner, "z": inner, "x": inner, "B": bc, "C": bc, "out_proj_in": inner}
    widths |= {"conv_in": inner + 2 * bc, "dt": nheads} if second else {"dt": inner, "x_proj_out": rank + 2 * d_state}
    peaks = {
        f"backbone.layers.{i}.scales.{site}": torch.full((n,), 127.0).double()
        for i in range(layers)
        for site, n in widths.items()
    }
    peaks |= {f"backbone.layers.{i}.scales.state": torch.full((inner, d_state), 127.0).double() for i in range(layers)}
    peaks["backbone.scales.head_in"] = torch.full((hidden,), 127.0).double()

    def write() -> Writer:
        out = Writer()
        out.embedding(table, embedding)
        for i, (mode, w) in enumerate(zip(modes, weights)):
            layer = f"backbone.layers.{i}."
            m, norm = (f"{layer}{part}s.{mode}." if hybrid else f"{layer}{part}." for part in ("mixer", "norm"))
            site = layer + "scales."
            peak = {key.removeprefix(site): t for key, t in peaks.items() if key.startswith(site)}
            out.plain(norm + "weight", layer + "norm.weight", torch.ones(hidden))
            if mode != "W4A16":
                out.state[norm + "output_scale"] = f32(scale_of(peak["mixer_in"].max()))
            if second:
                mamba2(out, layer, m, w, mode, peak, ngroups, ranges[i])
            else:
                mamba1(out, layer, m, w, mode, peak)
        out.plain("backbone.norm_f.weight", "backbone.norm_f.weight", torch.ones(hidden))
        if head == "float":
            out.plain("lm_head.weight", "lm_head.weight", top)
            return out
        s = f32(scale_of(peaks["backbone.scales.head_in"].max()))
        out.linear("lm_head.", "lm_head.weight", top, head, s)
        if head != "W4A16":
            out.state["backbone.norm_f.output_scale"] = s
            out.truth["backbone.scales.head_in"] = torch.full_like(peaks["backbone.scales.head_in"], s)
        return out

    ssm: dict = {"layer": f"{precision}QMamba{'2' * second}"}
    norms: str | list = "RMSNorm" if precision == "W4A16" else "QRMSNorm"
    if hybrid:
        ssm["layer"] = [{mode: f"{mode}QMamba{'2' * second}"} for mode in modes]
        norms = [{mode: "RMSNorm" if mode == "W4A16" else "QRMSNorm"} for mode in modes]
    ours = {"d_state": d_state, "expand": expand, "headdim": headdim, "ngroups": ngroups, "dt_rank": rank}
    usual = {"d_state": 128, "expand": 2, "headdim": 64, "ngroups": 1, "dt_rank": rank}
    if not second:
        usual |= {"d_state": 16, "headdim": headdim, "ngroups": ngroups, "dt_rank": -(-hidden // 16)}
    config = {
        "d_model": hidden,
        "d_intermediate": 0,
        "n_layer": layers,
        "vocab_size": vocab,
        "ssm_cfg": ssm | {key: value for key, value in ours.items() if value != usual[key]},
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
        "tie_embeddings": False,
        "norm_cfg": {"norm": norms},
        "embedding_cfg": {"layer": {16: "Embedding", 8: "W8O16Embedding", 4: "W4O16Embedding"}[embedding]},
        "lm_head_cfg": {"layer": "Linear" if head == "float" else f"{head}B16O16Linear"},
        "is_hybrid": bool(hybrid),
    }

    measured = {site: torch.zeros_like(peak) for site, peak in peaks.items()}

    def record(site: str, v: Tensor) -> Tensor:
        measured[site] = torch.maximum(measured[site], v.abs().reshape(-1, *measured[site].shape).amax(0))
        return v

    ids = torch.randint(0, vocab, (32, 48), generator=random)
    forward(config, write().truth, ids, record, tables)
    peaks.update(measured)
    out = write()
    return Published(config, out.state, out.truth, tables)


def save(model: Published, folder: Path | str) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    torch.save(model.state, folder / "pytorch_model.bin")
    return folder


def logits(model: Published, ids: Tensor, tables: Tables = None, rounding: bool = True) -> Tensor:
    """Float64 [B, L, V]. Sites with a static scale are rounded to int8, states within the pass are not."""

    def quantize(site: str, v: Tensor) -> Tensor:
        s = model.truth.get(site)
        if s is None or site.endswith(".state") or not rounding:
            return v
        return (v / s).round().clamp(-128, 127) * s

    return forward(model.config, model.truth, ids, quantize, tables or model.tables)
