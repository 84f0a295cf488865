"""The selective scan against a float64 loop and, where it can be imported, mamba-ssm's own reference."""

import importlib.util
import math
import sys
import types

import pytest
import torch

from quamba_kernels import reference


def inputs(rng, batch, length, inner, states):
    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    A = -torch.arange(1, states + 1).float().expand(inner, states).contiguous()
    return {
        "u": normal(batch, length, inner),
        "dt": normal(batch, length, inner),
        "A": A,
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(inner),
        "z": normal(batch, length, inner),
        "dt_bias": normal(inner) - 3,
    }


def naive(i, state, mask=None):
    """Scalar loops in float64 (Python floats); returns y and the state after."""
    (batch, length, inner), states = i["u"].shape, i["A"].shape[1]
    v = {k: t.double().tolist() for k, t in i.items()}
    h, y = state.double().tolist(), torch.zeros(batch, length, inner, dtype=torch.float64)
    for b in range(batch):
        for t in range(length):
            live = mask is None or bool(mask[b, t])
            for c in range(inner):
                dt = v["dt"][b][t][c] + v["dt_bias"][c]
                dt = (dt if dt > 20 else math.log1p(math.exp(dt))) if live else 0.0
                u = v["u"][b][t][c] if live else 0.0
                out = v["D"][c] * u
                for n in range(states):
                    h[b][c][n] = math.exp(dt * v["A"][c][n]) * h[b][c][n] + dt * v["B"][b][t][n] * u
                    out += h[b][c][n] * v["C"][b][t][n]
                z = v["z"][b][t][c]
                y[b, t, c] = out * z / (1 + math.exp(-z))
    return y, torch.tensor(h, dtype=torch.float64)


def close(got, want, tolerance=1e-5):
    """Within the contract's tolerance, relative to the largest entry."""
    assert (got.double() - want.double()).abs().max() <= tolerance * want.abs().max()


@pytest.mark.parametrize("shape", [(2, 7, 5, 16), (1, 1, 3, 4), (1, 70, 2, 3), (1, 4, 3, 1)])
def test_against_loops(rng, shape):
    batch, _, inner, states = shape
    i = inputs(rng, *shape)
    state = torch.randn(batch, inner, states, generator=rng)
    want, last = naive(i, state)
    got = reference.selective_scan(**i, state=state)
    assert got.dtype == torch.float32
    close(got, want)
    close(state, last)


def test_softplus_is_the_identity_above_20(rng):
    i = inputs(rng, 1, 3, 4, 2)
    i["dt"] = torch.tensor([19.0, 20.5, 25.0, 40.0]).expand(1, 3, 4).contiguous() + 3
    i["dt_bias"] = torch.full((4,), -3.0)
    close(reference.selective_scan(**i), naive(i, torch.zeros(1, 4, 2))[0])


@pytest.mark.parametrize("split", [1, 2, 5, 64, 65, 69])
def test_hand_off(rng, split):
    i = inputs(rng, 1, 70, 6, 4)
    whole, parts = torch.zeros(1, 6, 4), torch.zeros(1, 6, 4)
    want = reference.selective_scan(**i, state=whole)
    per_token = ("u", "dt", "B", "C", "z")
    first = {k: t[:, :split] if k in per_token else t for k, t in i.items()}
    second = {k: t[:, split:] if k in per_token else t for k, t in i.items()}
    got = [reference.selective_scan(**first, state=parts), reference.selective_scan(**second, state=parts)]
    close(torch.cat(got, 1), want)
    close(parts, whole)


def test_masked_prefix(rng):
    i = inputs(rng, 2, 9, 5, 4)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :4] = False
    state = torch.zeros(2, 5, 4)
    got = reference.selective_scan(**i, state=state, mask=mask)
    want, last = naive(i, torch.zeros(2, 5, 4), mask)
    close(got, want)
    close(state, last)
    assert (got[1, :4] == 0).all()


def test_codes(rng):
    i = inputs(rng, 2, 6, 5, 4)
    u, z = (torch.randint(-128, 128, i[k].shape, generator=rng, dtype=torch.int8) for k in "uz")
    us, zs = torch.rand(5, generator=rng) / 20, torch.tensor(0.03)
    want = reference.selective_scan(**{**i, "u": u.float() * us, "z": z.float() * zs})
    assert torch.equal(reference.selective_scan(**{**i, "u": u, "z": z}, u_scale=us, z_scale=zs), want)


@pytest.fixture
def selective_scan_ref(monkeypatch):
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None:
        pytest.skip("mamba-ssm is not installed")
    # Only the one file is wanted: not the CUDA extension it imports, nor the models that the package's own __init__
    # imports, which fit certain versions of transformers only.
    package = types.ModuleType("mamba_ssm")
    package.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_ref as ref
    except ImportError as e:
        pytest.skip(f"mamba-ssm can't be imported: {e}")
    return ref


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_against_mamba_ssm(rng, selective_scan_ref, backend):
    import quamba_kernels
    from quamba_kernels import cpu

    if backend == "cpu" and not cpu.available():
        pytest.skip(cpu.why_not())
    i = inputs(rng, 2, 33, 24, 16)
    want, last = selective_scan_ref(
        *(i[k].transpose(1, 2) for k in ("u", "dt")),
        i["A"],
        *(i[k].transpose(1, 2) for k in ("B", "C")),
        i["D"],
        z=i["z"].transpose(1, 2),
        delta_bias=i["dt_bias"],
        delta_softplus=True,
        return_last_state=True,
    )
    state = torch.zeros(2, 24, 16)
    with quamba_kernels.backend(backend):
        got = quamba_kernels.selective_scan(**i, state=state)
    close(got, want.transpose(1, 2))
    close(state, last)
