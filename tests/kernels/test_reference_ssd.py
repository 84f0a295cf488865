"""Mamba2's scan and gated norm against float64 loops and, where it can be imported, mamba-ssm's own references."""

import importlib.util
import math
import sys
import types

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels.reference import ssd

PER_TOKEN = ("x", "dt", "B", "C")


def inputs(rng, batch, length, heads, width, groups, states, has_hdim=False):
    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    return {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -torch.rand(heads, generator=rng) * 4 - 0.1,
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads, width) if has_hdim else normal(heads),
        "dt_bias": normal(heads) - 2,
    }


def naive(i, state, mask=None, limit=(0.0, math.inf)):
    """One token and one head after the other, in float64; returns y and the state after."""
    i = {k: t.double() for k, t in i.items()}
    (batch, length, heads, _), groups = i["x"].shape, i["B"].shape[2]
    h, y = state.double().clone(), torch.zeros_like(i["x"])
    for b in range(batch):
        for t in range(length):
            for head in range(heads):
                group = head // (heads // groups)
                dt = float(i["dt"][b, t, head] + i["dt_bias"][head])
                dt = min(max(dt if dt > 20 else math.log1p(math.exp(dt)), limit[0]), limit[1])
                x = i["x"][b, t, head]
                if mask is not None and not mask[b, t]:
                    dt, x = 0.0, torch.zeros_like(x)
                h[b, head] = math.exp(dt * float(i["A"][head])) * h[b, head] + dt * torch.outer(x, i["B"][b, t, group])
                y[b, t, head] = h[b, head] @ i["C"][b, t, group] + i["D"][head] * x
    return y, h


def close(got, want, tolerance=1e-5):
    """Within the contract's tolerance, relative to the largest entry."""
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("chunk", [1, 16, 64, 256])
@pytest.mark.parametrize("length", [1, 2, 33, 150])
def test_against_loops(rng, chunk, length, monkeypatch):
    monkeypatch.setattr(ssd, "MOST", 256)  # so that 256 means 256
    i = inputs(rng, 2, length, 4, 5, 2, 3)
    state = torch.randn(2, 4, 5, 3, generator=rng)
    want, last = naive(i, state)
    got = kernels.ssd_scan(**i, state=state, chunk_size=chunk)
    assert got.dtype == torch.float32 and got.shape == i["x"].shape
    close(got, want)
    close(state, last)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("length", [1, 21])
def test_groups_and_d_with_a_head_dimension(rng, groups, length):
    i = inputs(rng, 1, length, 8, 6, groups, 4, has_hdim=True)
    state = torch.zeros(1, 8, 6, 4)
    want, last = naive(i, state)
    close(kernels.ssd_scan(**i, state=state, chunk_size=16), want)
    close(state, last)
    close(kernels.ssd_scan(**i), want)  # without a state


def test_sizes_of_one(rng):
    i = inputs(rng, 1, 5, 1, 1, 1, 1)
    close(kernels.ssd_scan(**i), naive(i, torch.zeros(1, 1, 1, 1))[0])


def test_dt_is_limited_after_softplus_and_the_identity_above_20(rng):
    i = inputs(rng, 1, 12, 4, 3, 1, 2)
    i["dt"] = torch.tensor([-9.0, 0.0, 19.0, 40.0]).expand(1, 12, 4)
    for limit in ((0.0, math.inf), (0.3, 0.8), (0.0, 0.5), (0.01, math.inf)):
        close(kernels.ssd_scan(**i, dt_limit=limit), naive(i, torch.zeros(1, 4, 3, 2), limit=limit)[0])


def test_strong_decay_neither_overflows_nor_loses_neighbours(rng):
    """Decays of a chunk add up to exp(-6000), those between neighbours to exp(-0.001) in one head, exp(-100) in another."""
    i = inputs(rng, 1, 64, 2, 3, 1, 4)
    i["A"], i["dt_bias"] = torch.tensor([-0.001, -100.0]), torch.zeros(2)
    i["dt"] = torch.ones(1, 64, 2)
    want, last = naive(i, torch.zeros(1, 2, 3, 4))
    state = torch.zeros(1, 2, 3, 4)
    close(kernels.ssd_scan(**i, state=state), want)
    close(state, last)


@pytest.mark.parametrize("split", [1, 2, 16, 17, 64, 69])
def test_hand_off(rng, split):
    i = inputs(rng, 2, 70, 4, 6, 2, 4)
    whole, parts = torch.zeros(2, 4, 6, 4), torch.zeros(2, 4, 6, 4)
    address = parts.data_ptr()
    want = kernels.ssd_scan(**i, state=whole, chunk_size=16)
    halves = [{k: t[:, s] if k in PER_TOKEN else t for k, t in i.items()} for s in (slice(split), slice(split, None))]
    close(torch.cat([kernels.ssd_scan(**half, state=parts, chunk_size=16) for half in halves], 1), want)
    close(parts, whole)
    assert parts.data_ptr() == address


@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.2, 1.0)])
def test_masked_prefix(rng, limit):
    i = inputs(rng, 3, 20, 4, 3, 2, 4)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, :7], mask[2, :19] = False, False
    state = torch.zeros(3, 4, 3, 4)
    want, last = naive(i, state, mask, limit)
    got = kernels.ssd_scan(**i, state=state, mask=mask, dt_limit=limit, chunk_size=8)
    close(got, want)
    close(state, last)
    assert (got[1, :7] == 0).all()
    token = {k: t[:, :1] if k in PER_TOKEN else t for k, t in i.items()}
    before = state.clone()
    kernels.ssd_scan(**token, state=state, mask=torch.zeros(3, 1, dtype=torch.bool), dt_limit=limit)
    assert torch.equal(state, before)


def test_no_tokens_leave_the_state(rng):
    i = inputs(rng, 2, 0, 4, 3, 2, 4)
    state = torch.randn(2, 4, 3, 4, generator=rng)
    before = state.clone()
    assert kernels.ssd_scan(**i, state=state).shape == (2, 0, 4, 3)
    assert torch.equal(state, before)


def test_half_precision_views_are_read_as_they_are(rng):
    """What a mixer passes: slices of one tensor, in the model's dtype. Nothing is written to them."""
    packed = torch.randn(2, 9, 4 * 3 + 2 * 2 * 5, generator=rng).half()
    x, B, C = packed.split([12, 10, 10], dim=-1)
    views = {"x": x.unflatten(-1, (4, 3)), "B": B.unflatten(-1, (2, 5)), "C": C.unflatten(-1, (2, 5))}
    i = inputs(rng, 2, 9, 4, 3, 2, 5) | views
    before = packed.clone()
    want = kernels.ssd_scan(**i | {k: v.float().contiguous() for k, v in views.items()})
    assert torch.equal(kernels.ssd_scan(**i), want)
    assert torch.equal(packed, before)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gated_norm_against_loops(rng, groups, norm_before_gate):
    x, z, weight = (torch.randn(*shape, generator=rng) for shape in ((2, 3, 12), (2, 3, 12), (12,)))
    got = kernels.gated_rms_norm(x, z, weight, 1e-3, groups, norm_before_gate)
    size = 12 // groups
    for b in range(2):
        for t in range(3):
            v, gate = x[b, t].double(), [float(g) / (1 + math.exp(-float(g))) for g in z[b, t]]
            if not norm_before_gate:
                v = v * torch.tensor(gate, dtype=torch.float64)
            for c in range(12):
                run = v[c // size * size : (c // size + 1) * size]
                want = float(v[c]) / math.sqrt(float((run * run).mean()) + 1e-3) * float(weight[c])
                want *= gate[c] if norm_before_gate else 1
                assert float(got[b, t, c]) == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_gated_norm_returns_the_dtype_of_its_weight(rng):
    x, z = torch.randn(1, 2, 8, generator=rng), torch.randn(1, 2, 8, generator=rng).half()
    half = kernels.gated_rms_norm(x, z, torch.ones(8, dtype=torch.float16), 1e-5)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), kernels.gated_rms_norm(x, z, torch.ones(8), 1e-5), rtol=1e-3, atol=1e-3)


def codes(rng, *shape):
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("length", [1, 40])
def test_integer_inputs_are_their_reals(rng, length, vectors):
    i = inputs(rng, 2, length, 4, 5, 2, 3)
    state, same = torch.zeros(2, 4, 5, 3), torch.zeros(2, 4, 5, 3)
    integer, floats = dict(i), dict(i)
    for name, (a, b) in {"x": (4, 5), "B": (2, 3), "C": (2, 3)}.items():
        integer[name] = codes(rng, 2, length, a, b)
        scale = torch.rand(a * b, generator=rng) / 60 if vectors else torch.tensor(0.02)
        integer[name + "_scale"] = scale
        each = scale.expand(a * b)
        floats[name] = torch.empty(2, length, a, b)
        for j in range(a):
            for k in range(b):
                floats[name][:, :, j, k] = integer[name][:, :, j, k].float() * each[j * b + k]
    want = kernels.ssd_scan(**floats, state=same)
    assert torch.equal(kernels.ssd_scan(**integer, state=state), want)
    assert torch.equal(state, same)
    x_only = floats | {"x": integer["x"], "x_scale": integer["x_scale"]}
    assert torch.equal(kernels.ssd_scan(**x_only), want)


@pytest.mark.parametrize("scale", [torch.tensor(0.03), torch.linspace(0.01, 0.1, 12)])
def test_gated_norm_with_an_integer_gate(rng, scale):
    x, z, weight = torch.randn(2, 3, 12, generator=rng), codes(rng, 2, 3, 12), torch.randn(12, generator=rng)
    got = kernels.gated_rms_norm(x, z, weight, 1e-5, 2, z_scale=scale)
    assert torch.equal(got, kernels.gated_rms_norm(x, z.float() * scale, weight, 1e-5, 2))


@pytest.fixture
def mamba_ssm(monkeypatch):
    """Imports one file of mamba-ssm by name: not the package's own __init__, nor the CUDA extension that it imports."""
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba-ssm is not installed")
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))

    def load(name):
        try:
            return importlib.import_module("mamba_ssm." + name)
        except ImportError as e:
            pytest.skip(f"mamba-ssm can't be imported: {e}")

    return load


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_against_mamba_ssm_combined(rng, mamba_ssm, groups):
    ref = mamba_ssm("ops.triton.ssd_combined").ssd_chunk_scan_combined_ref
    i = inputs(rng, 2, 64, 4, 8, groups, 16)
    state = torch.zeros(2, 4, 8, 16)
    want = ref(i["x"], i["dt"], i["A"], i["B"], i["C"], 16, D=i["D"], dt_bias=i["dt_bias"], dt_softplus=True)
    close(kernels.ssd_scan(**i, state=state, chunk_size=16), want)


def test_against_mamba_ssm_minimal(rng, mamba_ssm):
    ref = mamba_ssm("modules.ssd_minimal").ssd_minimal_discrete
    i = inputs(rng, 2, 64, 4, 8, 4, 16)
    i["D"] = torch.zeros(4)
    dt = torch.nn.functional.softplus(i["dt"] + i["dt_bias"])
    start = torch.randn(2, 4, 8, 16, generator=rng)
    want, last = ref(i["x"] * dt[..., None], dt * i["A"], i["B"], i["C"], 16, start.unsqueeze(1))
    state = start.clone()
    close(kernels.ssd_scan(**i, state=state, chunk_size=32), want)
    close(state, last)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gated_norm_against_mamba_ssm(rng, mamba_ssm, norm_before_gate):
    ref = mamba_ssm("ops.triton.layernorm_gated").rms_norm_ref
    x, z, weight = (torch.randn(*shape, generator=rng) for shape in ((6, 32), (6, 32), (32,)))
    want = ref(x, weight, None, z=z, eps=1e-5, group_size=8, norm_before_gate=norm_before_gate)
    close(kernels.gated_rms_norm(x, z, weight, 1e-5, 4, norm_before_gate), want)
