"""Neighbouring steps of a recorded token become one launch, which does what they did."""

import importlib

import pytest
import torch

import quamba_kernels as kernels
from quamba_kernels import reference
from quamba_kernels.hadamard_matrices import outer_matrix
from quamba_kernels.triton.common import Launch
from tests.kernels.agreement import codes, normal


@pytest.fixture(autouse=True)
def poisoned():
    """Not here: writing poison is a step that would be recorded."""


@pytest.fixture(autouse=True)
def on_triton():
    with kernels.backend("triton"):
        yield


def all_of(*results):
    """One tensor of everything, so that everything is compared."""
    return torch.cat([t.float().flatten() for t in results])


def check(function, launches, inputs, fresh, moving=()):
    """A recording of `function()` has so many launches and, with inputs as `fresh` makes them, gives what eager calls give;
    so do the tensors that move, which stand elsewhere in the second run."""
    _, recording = kernels.record(function, inputs, list(moving))
    assert not isinstance(recording, str), recording
    found = [step for step in recording.launches if isinstance(step, Launch)]
    assert len(found) == launches, [step.kernel.__name__ for step in found]
    for _ in range(2):
        for x in inputs:
            x.copy_(fresh(x))
        elsewhere = [t.clone() for t in moving]
        got = recording.run(elsewhere)
        want = function()
        scale = want.abs().max()
        assert torch.allclose(got, want, rtol=0, atol=1e-5 * float(scale)), (got - want).abs().max() / scale
        for a, b in zip(elsewhere, moving, strict=True):
            assert torch.allclose(a.float(), b.float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def fresh(rng):
    def make(x):
        if x.dtype == torch.int8:
            return codes(rng, *x.shape)
        return normal(rng, *x.shape).abs().clamp(0.01) / 30 if x.shape[-1] == 1 else normal(rng, *x.shape)

    return make


def weight_of(rng, kind, outputs, inputs):
    """A product with a random weight: (x, scale of x) to float32, or codes with inv."""
    if kind == "int8":
        weight, scale = codes(rng, outputs, inputs), torch.rand(outputs, generator=rng) / inputs
        return lambda x, s, inv=None, rows=slice(None): kernels.w8a8_linear(x, s, weight[rows], scale[rows], None, inv)
    q = torch.randint(-8, 8, (outputs, inputs), generator=rng, dtype=torch.int8)
    packed, groups = reference.pack_int4(q, 32), codes(rng, outputs, -(-inputs // 32)).clamp(-15, 15)
    scale = torch.rand(outputs, generator=rng) / inputs
    return lambda x, s, inv=None, rows=slice(None): kernels.w4a8_linear(
        x, s, packed[rows], groups[rows], scale[rows], None, inv
    )


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3])
def test_codes_and_floats_of_one_weight(rng, fresh, rows, kind):
    x, s, inv = codes(rng, rows, 1, 40), torch.rand(rows, 1, 1, generator=rng), torch.rand(70, generator=rng) * 30
    product = weight_of(rng, kind, 83, 40)

    def function():
        return all_of(product(x, s, inv, slice(0, 70)), product(x, s, None, slice(70, 83)))

    check(function, 1, [x, s], fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "kind"), [(1, "int8"), (3, "int8"), (2, "int4")])
def test_product_residual_and_norm(rng, fresh, rows, kind, dtype):
    x, s, residual = codes(rng, rows, 1, 40), torch.rand(rows, 1, 1, generator=rng), normal(rng, rows, 1, 83).to(dtype)
    product, norm = weight_of(rng, kind, 83, 40), normal(rng, 83)

    def function():
        total = residual + product(x, s).to(dtype)
        return all_of(total, *kernels.rms_norm_per_token(total, norm, 1e-5))

    check(function, 1, [x, s, residual], fresh)


def test_a_norm_wider_than_the_products_warps_can_hold(rng, fresh, monkeypatch):
    monkeypatch.setattr(importlib.import_module("quamba_kernels.triton.rows"), "tile_rows", lambda *sizes: (1, 16))
    x, s, residual = codes(rng, 1, 1, 40), torch.rand(1, 1, 1, generator=rng), normal(rng, 1, 1, 83)
    product, norm = weight_of(rng, "int8", 83, 40), normal(rng, 83)
    check(lambda: all_of(*kernels.rms_norm_per_token(residual + product(x, s), norm, 1e-5)), 2, [x, s, residual], fresh)


def test_a_float_product_residual_and_norm(rng, fresh):
    x, residual, weight = normal(rng, 2, 1, 40).half(), normal(rng, 2, 1, 83).half(), normal(rng, 83, 40).half()
    norm, inv = normal(rng, 83).half(), torch.tensor(20.0)
    check(lambda: all_of(kernels.rms_norm(residual + kernels.linear(x, weight), norm, 1e-5)), 1, [x, residual], fresh)
    check(
        lambda: all_of(kernels.rms_norm(residual + kernels.linear(x, weight), norm.float(), 1e-5, inv)),
        1,
        [x, residual],
        fresh,
    )


def test_a_conversion_that_is_read_elsewhere_stays(rng, fresh):
    x, s, residual = codes(rng, 1, 1, 40), torch.rand(1, 1, 1, generator=rng), normal(rng, 1, 1, 83).half()
    product = weight_of(rng, "int8", 83, 40)

    def function():
        y = product(x, s).half()
        return all_of(residual + y, y)

    check(function, 1, [x, s, residual], fresh)


@pytest.mark.parametrize("kind", ["int8", "int4", "float"])
@pytest.mark.parametrize("rows", [1, 3])
def test_convolution_and_product(rng, fresh, rows, kind):
    integer, channels = kind != "float", 100
    make = (lambda *shape: codes(rng, *shape)) if integer else (lambda *shape: normal(rng, *shape).half())
    x, weight, bias = make(rows, 1, channels), make(channels, 4), normal(rng, channels)
    state = make(rows, channels, 3)
    options = {}
    if integer:
        scales = ("x_scale", "weight_scale", "inv")
        options = {name: torch.rand(channels, generator=rng) + 0.1 for name in scales}
        options["weight_scale"] /= 100
    floats = normal(rng, 19, channels).half()
    product = weight_of(rng, kind, 19, channels) if integer else lambda y, _: kernels.linear(y, floats)
    one = torch.tensor(0.01)

    def function():
        y = kernels.causal_conv1d(x, weight, bias, state=state, **options)
        return all_of(y, product(y, one))

    check(function, 1, [x], fresh, moving=[state])


def scan_arguments(rng, rows, channels=37, states=5):
    per_token = {name: normal(rng, rows, 1, states) for name in ("B", "C")}
    rest = {"A": -normal(rng, channels, states).exp(), "D": normal(rng, channels), "dt_bias": normal(rng, channels)}
    u, z = codes(rng, rows, 1, channels), codes(rng, rows, 1, channels)
    scales = {name: torch.rand(channels, generator=rng) / 64 for name in ("u_scale", "z_scale")}
    return per_token | rest | scales | {"u": u, "z": z}


@pytest.mark.parametrize("kind", ["int8", "int4", "float"])
def test_dt_scan_and_hadamard(rng, fresh, kind):
    rows, channels = 2, 40
    arguments = scan_arguments(rng, rows, channels)
    low, state = normal(rng, rows, 1, 7), normal(rng, rows, channels, 5)
    if kind == "int8":
        weight, scale = codes(rng, channels, 7), torch.rand(channels, generator=rng) / 100
        make = lambda: kernels.w8_linear(low, weight, scale)  # noqa: E731
    elif kind == "int4":
        q = torch.randint(-8, 8, (channels, 7), generator=rng, dtype=torch.int8)
        packed, groups = reference.pack_int4(q, 32), codes(rng, channels, 1).clamp(-15, 15)
        scale = torch.rand(channels, generator=rng) / 100
        make = lambda: kernels.w4_linear(low, packed, groups, scale)  # noqa: E731
    else:
        weight = normal(rng, channels, 7)
        make = lambda: kernels.linear(low, weight)  # noqa: E731
    outer = outer_matrix("paley20")

    def function():
        y = kernels.selective_scan(**arguments, dt=make(), state=state)
        return all_of(y, *kernels.hadamard_per_token(y, outer))

    check(function, 1, [low, arguments["u"], arguments["z"]], fresh, moving=[state])


@pytest.mark.parametrize(("groups", "before"), [(1, False), (3, True)])
def test_mamba2s_scan_norm_and_hadamard(rng, fresh, groups, before):
    rows, heads, width, states = 2, 6, 4, 9
    x = codes(rng, rows, 1, heads, width)
    B, C = codes(rng, rows, 1, 3, states), codes(rng, rows, 1, 3, states)
    dt, z = normal(rng, rows, 1, heads), codes(rng, rows, 1, 24)
    A, D, bias, norm = -normal(rng, heads).exp(), normal(rng, heads), normal(rng, heads), normal(rng, 24)
    state, one = normal(rng, rows, heads, width, states), torch.tensor(0.02)
    scales = {"x_scale": one, "B_scale": one, "C_scale": one}

    def function():
        y = kernels.ssd_scan(x, dt, A, B, C, D, bias, state=state, **scales).flatten(-2)
        y = kernels.gated_rms_norm(y, z, norm, 1e-5, groups, before, z_scale=one)
        return all_of(y, *kernels.hadamard_per_token(y, None, 3))

    check(function, 1, [x, dt, z], fresh, moving=[state])


def test_many_rows_stay_apart(rng, fresh):
    x, s, residual = codes(rng, 17, 1, 40), torch.rand(17, 1, 1, generator=rng), normal(rng, 17, 1, 83)
    product, norm = weight_of(rng, "int8", 83, 40), normal(rng, 83)
    check(lambda: all_of(kernels.rms_norm(residual + product(x, s), norm, 1e-5)), 2, [x, s, residual], fresh)
