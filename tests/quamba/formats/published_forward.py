"""The published dataflow in float64, as naively as possible; static int8 sites are a callback's business."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

Site = Callable[[str, Tensor], Tensor]
Tables = dict | str | Path | None  # hadamard_tables.json, its contents, or what is under its "tables"


def hadamard(n: int, tables: Tables = None) -> Tensor:
    """The orthonormal matrix [n, n] of the online transform, y = H x."""
    first = next((m for m in (12, 40) if n % m == 0), 1)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) * first < n:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    if first > 1:
        if tables is None:
            raise ValueError(f"the transform of {n} needs the table of {first}")
        if not isinstance(tables, dict):
            tables = json.loads(Path(tables).read_text())
        signs = tables.get("tables", tables)[str(first)]
        slow = torch.tensor([[1.0 if sign == "+" else -1.0 for sign in row] for row in signs], dtype=torch.float64)
        matrix = torch.kron(slow, matrix)
    assert len(matrix) == n
    return matrix / math.sqrt(n)


def rms(v: Tensor, weight: Tensor) -> Tensor:
    return v * (v.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def conv(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise, causal, [B, L, C]; the last tap is the current token's."""
    taps, length = weight.shape[-1], v.shape[1]
    v = pad(v, (0, 0, taps - 1, 0))
    return silu(sum(v[:, k : k + length] * weight[:, 0, k] for k in range(taps)) + bias)


def mixer1(v: Tensor, w: dict[str, Tensor], site: Site) -> Tensor:
    """From in_proj to the gate, [B, L, I]."""
    states, rank = w["A_log"].shape[1], w["dt_proj.weight"].shape[1]
    x, z = (v @ w["in_proj.weight"].T).chunk(2, -1)
    z = site("z", z)
    x = site("x", conv(site("conv_in", x), w["conv1d.weight"], w["conv1d.bias"]))
    low, B, C = site("x_proj_out", x @ w["x_proj.weight"].T).split([rank, states, states], -1)
    dt = softplus(site("dt", low @ w["dt_proj.weight"].T) + w["dt_proj.bias"])
    B, C, A = site("B", B), site("C", C), -w["A_log"].exp()
    h, y = torch.zeros(len(v), *A.shape, dtype=torch.float64), torch.zeros_like(x)
    for t in range(v.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        site("state", h)
        y[:, t] = (h * C[:, t, None]).sum(-1) + w["D"] * x[:, t]
    return y * silu(z)


def mixer2(v: Tensor, w: dict[str, Tensor], site: Site, ngroups: int) -> Tensor:
    """From in_proj to the gated norm, [B, L, I]."""
    (batch, length, _), nheads, inner = v.shape, len(w["A_log"]), w["out_proj.weight"].shape[1]
    bc = (len(w["conv1d.bias"]) - inner) // 2
    z, xBC, dt = (v @ w["in_proj.weight"].T).split([inner, inner + 2 * bc, nheads], -1)
    z, dt = site("z", z), softplus(site("dt", dt) + w["dt_bias"])
    x, B, C = conv(site("conv_in", xBC), w["conv1d.weight"], w["conv1d.bias"]).split([inner, bc, bc], -1)
    x = site("x", x).reshape(batch, length, nheads, -1)
    B, C = (
        t.reshape(batch, length, ngroups, -1).repeat_interleave(nheads // ngroups, 2)
        for t in (site("B", B), site("C", C))
    )
    decay = (dt * -w["A_log"].exp()).exp()
    h, y = torch.zeros(*x[:, 0].shape, B.shape[-1], dtype=torch.float64), torch.zeros_like(x)
    for t in range(length):
        h = decay[:, t, :, None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        site("state", h.flatten(1, 2))
        y[:, t] = (h * C[:, t, :, None]).sum(-1) + w["D"][:, None] * x[:, t]
    gated = (y.reshape(z.shape) * silu(z)).reshape(batch, length, ngroups, -1)
    return rms(gated, w["norm.weight"].reshape(ngroups, -1)).reshape(z.shape)


def forward(config: dict, truth: dict[str, Tensor], ids: Tensor, site: Site, tables: Tables = None) -> Tensor:
    """Logits [B, L, V] from `truth`; every value to be quantized goes through `site` under the name of its scale."""
    ngroups = config["ssm_cfg"].get("ngroups", 1)
    hidden = truth["backbone.embedding.weight"][ids]
    for i in range(config["n_layer"]):
        layer = f"backbone.layers.{i}."
        w = {key.removeprefix(layer + "mixer."): t for key, t in truth.items() if key.startswith(layer + "mixer.")}

        def here(name: str, v: Tensor, layer: str = layer) -> Tensor:
            return site(f"{layer}scales.{name}", v)

        v = here("mixer_in", rms(hidden, truth[layer + "norm.weight"]))
        y = mixer1(v, w, here) if "x_proj.weight" in w else mixer2(v, w, here, ngroups)
        y = here("out_proj_in", y @ hadamard(y.shape[-1], tables).T)
        hidden = hidden + y @ w["out_proj.weight"].T
    return site("backbone.scales.head_in", rms(hidden, truth["backbone.norm_f.weight"])) @ truth["lm_head.weight"].T
