"""Mamba1's scan against the reference, whole and in stretches."""

import importlib

import pytest
import torch

from quamba_kernels import reference, triton
from quamba_kernels.triton.common import Launch
from tests.kernels.agreement import close, codes, normal, rounded, same_codes, stored

recurrence = importlib.import_module("quamba_kernels.triton.recurrence")
PER_TOKEN = ("u", "dt", "B", "C", "z")


def scan_case(rng, batch, length, inner, states, integer=False):
    i = {
        "u": normal(rng, batch, length, inner),
        "dt": normal(rng, batch, length, inner),
        "A": -torch.rand(inner, states, generator=rng) * 16,
        "B": normal(rng, batch, length, states),
        "C": normal(rng, batch, length, states),
        "D": normal(rng, inner),
        "z": normal(rng, batch, length, inner) * 3,
        "dt_bias": normal(rng, inner) - 3,
    }
    if integer:
        i.update(u=codes(rng, batch, length, inner), z=codes(rng, batch, length, inner))
        i.update(u_scale=torch.rand(inner, generator=rng) / 30, z_scale=torch.tensor(0.04))
    return i


@pytest.fixture(params=[1, 3])
def cut(request, monkeypatch):
    monkeypatch.setattr(recurrence, "stretches", lambda length, programs, device: min(length, request.param))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(
    ("batch", "length", "inner", "states", "integer"),
    [(2, 17, 50, 16, True), (1, 1, 150, 16, True), (3, 2, 16, 1, True), (1, 9, 5, 3, False), (1, 5, 9, 256, False)],
)
def test_scan(rng, batch, length, inner, states, integer):
    i = scan_case(rng, batch, length, inner, states, integer)
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, : length // 2] = False
    start = normal(rng, batch, inner, states)
    for m in (None, mask):
        theirs, mine = start.clone(), start.clone()
        want = reference.selective_scan(**i, state=theirs, mask=m)
        close(triton.selective_scan(**i, state=mine, mask=m), want)
        close(mine, theirs)
    close(triton.selective_scan(**i), reference.selective_scan(**i))


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("split", [1, 23])
def test_hand_off(rng, split):
    i = scan_case(rng, 1, 24, 21, 16, integer=True)
    whole, parts = torch.zeros(1, 21, 16), torch.zeros(1, 21, 16)
    want = triton.selective_scan(**i, state=whole)
    pieces = [{k: t[:, s] if k in PER_TOKEN else t for k, t in i.items()} for s in (slice(split), slice(split, None))]
    close(torch.cat([triton.selective_scan(**p, state=parts) for p in pieces], 1), want)
    close(parts, whole)


def test_token_by_token_gives_the_same_bits(rng):
    i = scan_case(rng, 1, 6, 21, 16)
    whole, parts = torch.zeros(1, 21, 16), torch.zeros(1, 21, 16)
    want = triton.selective_scan(**i, state=whole)
    pieces = [{k: t[:, s : s + 1] if k in PER_TOKEN else t for k, t in i.items()} for s in range(6)]
    assert torch.equal(torch.cat([triton.selective_scan(**p, state=parts) for p in pieces], 1), want)
    assert torch.equal(parts, whole)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("length", [1, 14])
def test_states_in_low_precision(rng, length, dtype):
    i, h = scan_case(rng, 2, length, 70, 12, integer=True), normal(rng, 2, 70, 12)
    h[0, 5] = 0
    ours, h = stored(h, dtype)
    ours = {name: t.transpose(0, 1).contiguous().transpose(0, 1) for name, t in ours.items()}
    theirs = {name: t.clone() for name, t in ours.items()}
    close(triton.selective_scan(**i, **ours), reference.selective_scan(**i, **theirs))
    reference.selective_scan(**i, state=h)
    rounded(h, **ours)
    if dtype == torch.int8:
        same_codes(ours["state"], theirs["state"])


def test_a_token_is_one_launch(rng, monkeypatch):
    launches, call = [], Launch.__call__
    monkeypatch.setattr(Launch, "__call__", lambda step: launches.append(step) or call(step))
    ours, _ = stored(torch.zeros(1, 20, 8), torch.int8)
    triton.selective_scan(**scan_case(rng, 1, 1, 20, 8), **ours)
    assert len(launches) == 1 and (ours["state_scale"] > 0).all()


def test_states_without_range(rng):
    i = scan_case(rng, 1, 3, 20, 8)
    ours, _ = stored(normal(rng, 1, 20, 8), torch.int8)
    triton.selective_scan(**i | {"u": i["u"] * 0, "dt": i["dt"] + 1e6}, **ours)  # forgets everything
    assert all((t == 0).all() for t in ours.values())
    half = torch.full((1, 20, 8), 65504.0).half()
    i |= {
        "A": torch.full((20, 8), -0.01),
        "B": torch.ones(1, 3, 8),
        "u": torch.full((1, 3, 20), 1e5),
        "dt": i["dt"] * 0,
    }
    triton.selective_scan(**i, state=half)
    assert (half == 65504).all()


@pytest.mark.usefixtures("cut")
def test_views_and_half_precision(rng):
    i = scan_case(rng, 2, 7, 24, 16)
    both = torch.cat([i["B"], i["C"]], -1).bfloat16()
    i.update(B=both[..., :16], C=both[..., 16:], u=i["u"].half(), z=i["z"].bfloat16())
    i["dt"] = i["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    state, theirs = torch.zeros(2, 16, 24).transpose(1, 2), torch.zeros(2, 24, 16)
    close(triton.selective_scan(**i, state=state), reference.selective_scan(**i, state=theirs))
    close(state, theirs)
    empty = {k: t[:, :0] if k in PER_TOKEN else t for k, t in i.items()}
    assert triton.selective_scan(**empty, state=state).shape == (2, 0, 24)
    close(state, theirs)


@pytest.mark.filterwarnings("ignore:overflow")
def test_softplus_and_gate_ranges(rng):
    i = scan_case(rng, 1, 6, 32, 4)
    i["dt"] = torch.linspace(-100, 60, 32).expand(1, 6, 32).contiguous()
    i["z"] = torch.linspace(-120, 120, 32).expand(1, 6, 32).contiguous()
    close(triton.selective_scan(**i), reference.selective_scan(**i))


def test_more_states_than_the_kernel_takes(rng):
    i = scan_case(rng, 1, 3, 4, 257)
    assert torch.equal(triton.selective_scan(**i), reference.selective_scan(**i))


def test_into_how_many_stretches(monkeypatch):
    monkeypatch.setattr(recurrence, "processors", lambda device: 132)
    device = torch.device("cpu")
    assert recurrence.stretches(8192, 24, device) == 22  # four programs for every processor
    assert recurrence.stretches(256, 24, device) == 4  # of at least 64 tokens
    assert recurrence.stretches(1, 24, device) == recurrence.stretches(8192, 600, device) == 1
