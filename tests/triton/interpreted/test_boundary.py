"""Malformed calls name the tensor; gradients go through the reference; the interpreter as a backend."""

import pytest
import torch

import quamba_kernels
from quamba_kernels import reference, triton
from tests.kernels.agreement import codes


def test_the_interpreter_serves_main_memory():
    assert "triton" not in quamba_kernels.describe()
    with quamba_kernels.backend("triton"):
        assert quamba_kernels.backend_name("cpu") == "triton"
        assert "interpreter" in quamba_kernels.describe()
        x = torch.tensor([[0.5, 1.5, 300.0]])
        assert quamba_kernels.quantize(x, torch.tensor(1.0)).tolist() == [[0, 2, 127]]
        weight = torch.eye(3)  # an op that the backend lacks
        assert torch.equal(quamba_kernels.linear(x, weight), reference.linear(x, weight))
    assert quamba_kernels.backend_name("meta") == "reference"


def test_malformed_rows():
    x = torch.zeros(2, 24)
    for error, name, call in [
        (ValueError, "x", lambda: triton.hadamard(x, None)),
        (TypeError, "outer", lambda: triton.hadamard(x, torch.ones(3, 3).double())),
        (TypeError, "inv", lambda: triton.quantize(x, torch.tensor(1.0).double())),
        (TypeError, "inv", lambda: triton.quantize(x, torch.tensor(1.0, device="meta"))),
        (TypeError, "x", lambda: triton.quantize(x.int(), torch.tensor(1.0))),
        (ValueError, "weight", lambda: triton.rms_norm(x, torch.ones(3), 1e-5)),
        (ValueError, "z", lambda: triton.gate(x, x[:1])),
        (ValueError, "z_scale", lambda: triton.gate(x, x.to(torch.int8))),
        (ValueError, "groups", lambda: triton.gated_rms_norm(x, x, torch.ones(24), 1e-5, 5)),
        (ValueError, "x", lambda: triton.quantize_per_token(x[:, :0])),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            call()


def test_malformed_products(rng):
    x, w, ws, xs = codes(rng, 3, 70), codes(rng, 5, 70), torch.rand(5), torch.tensor(0.1)
    packed, g = torch.zeros(5, 48, dtype=torch.uint8), codes(rng, 5, 3)
    for error, name, args in [
        (TypeError, "x", (x.float(), xs, w, ws)),
        (TypeError, "weight", (x, xs, w.int(), ws)),
        (TypeError, "weight", (x, xs, w.to("meta"), ws)),
        (ValueError, "weight", (x, xs, w[:, :7], ws)),
        (ValueError, "weight_scale", (x, xs, w, ws[:4])),
        (TypeError, "weight_scale", (x, xs, w, ws.double())),
        (ValueError, "x_scale", (x, torch.rand(2, 1), w, ws)),
        (ValueError, "bias", (x, xs, w, ws, torch.rand(4))),
        (ValueError, "inv", (x, xs, w, ws, None, torch.rand(4))),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            triton.w8a8_linear(*args)
    for error, name, bad in [
        (TypeError, "packed", (packed.view(torch.int8), g, ws)),
        (TypeError, "group_scale", (packed, g.float(), ws)),
        (ValueError, "group_scale", (packed, g[:4], ws)),
        (ValueError, "group_scale", (packed, g[:, :2], ws)),
        (ValueError, "weight_scale", (packed, g, ws[:4])),
        (ValueError, "inv", (packed, g, ws, None, torch.rand(4))),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            triton.w4a8_linear(x, xs, *bad)
        with pytest.raises(error, match=rf"^{name}\b"):
            triton.w4_linear(x.float(), *bad)
    with pytest.raises(TypeError, match=r"^x\b"):
        triton.w8_linear(x, w, ws)
    with pytest.raises(ValueError, match="overflow"):
        triton.int8_matmul(torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(1, 2**17, dtype=torch.int8))


def test_malformed_embedding(rng):
    table, scale, ids = codes(rng, 5, 8), torch.rand(5), torch.tensor([1])
    for error, name, args in [
        (TypeError, "weight and scale", (ids, table)),
        (TypeError, "ids", (ids.float(), table, scale)),
        (ValueError, "scale", (ids, table, scale[:4])),
        (TypeError, "weight, group_scale and width", (ids, table, scale, table, 8)),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            triton.embedding(*args)


def test_gradients_go_through_the_reference(rng):
    x, w = torch.randn(3, 8, generator=rng), torch.ones(8, requires_grad=True)
    triton.rms_norm(x, w, 1e-5).sum().backward()
    assert w.grad is not None
    x.requires_grad_()
    for y in (triton.w8_linear(x, codes(rng, 5, 8), torch.rand(5)), triton.gated_rms_norm(x, x, torch.ones(8), 1e-5)):
        x.grad = None
        y.sum().backward()
        assert x.grad is not None


def test_malformed_conv(rng):
    x, w, state, bias = codes(rng, 2, 5, 6), codes(rng, 6, 4), codes(rng, 2, 6, 3), torch.zeros(6)
    scales = {"x_scale": torch.tensor(0.1), "weight_scale": torch.ones(6)}
    for error, change in [
        (ValueError, {"state": state[:, :, :2]}),
        (TypeError, {"state": state.float()}),
        (ValueError, {"mask": torch.ones(2, 4, dtype=torch.bool)}),
        (ValueError, {"bias": bias[:5]}),
        (ValueError, {"x_scale": None}),
        (ValueError, {"weight_scale": torch.ones(5)}),
        (TypeError, {"weight": w.float()}),
    ]:
        with pytest.raises(error, match=next(iter(change))):
            triton.causal_conv1d(**{"x": x, "weight": w, "bias": bias, "state": state, **scales, **change})


def test_malformed_scan():
    i = {k: torch.zeros(2, 3, 4) for k in ("u", "dt", "z")} | {k: torch.zeros(2, 3, 5) for k in "BC"}
    i |= {"A": torch.zeros(4, 5), "D": torch.zeros(4), "dt_bias": torch.zeros(4)}
    changes = {
        "dt": i["dt"][:, :2],
        "A": i["A"][:3],
        "B": i["B"][..., :4],
        "C": i["C"][:1],
        "D": i["D"][:3],
        "z": i["z"].transpose(1, 2),
        "dt_bias": i["dt_bias"][:3],
        "state": torch.zeros(2, 4, 4),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "u_scale": torch.tensor(1.0),
    }
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            triton.selective_scan(**{**i, name: value})
    with pytest.raises(TypeError, match=r"^state"):
        triton.selective_scan(**i, state=torch.zeros(2, 4, 5).bfloat16())
    integer = torch.zeros(2, 4, 5, dtype=torch.int8)
    for wrong in (
        {"state": integer},
        {"state_scale": torch.zeros(2, 4)},
        {"state": integer, "state_scale": torch.zeros(2, 5)},
    ):
        with pytest.raises(ValueError, match=r"^state_scale\b"):
            triton.selective_scan(**i, **wrong)


def test_malformed_ssd():
    i = {"x": torch.zeros(2, 3, 4, 5), "dt": torch.zeros(2, 3, 4)} | {k: torch.zeros(2, 3, 2, 6) for k in "BC"}
    i |= {"A": torch.zeros(4), "D": torch.zeros(4), "dt_bias": torch.zeros(4)}
    for name, value in {
        "dt": i["dt"][:, :2],
        "A": i["A"][:3],
        "B": torch.zeros(2, 3, 3, 6),
        "C": i["C"][..., :4],
        "D": torch.zeros(4, 4),
        "dt_bias": i["dt_bias"][:3],
        "state": torch.zeros(2, 4, 6, 5),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "x_scale": torch.tensor(1.0),
    }.items():
        change = {name: value, "C": value} if name == "B" else {name: value}
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            triton.ssd_scan(**i | change)
    integer = torch.zeros(2, 4, 5, 6, dtype=torch.int8)
    for wrong in ({"state": integer}, {"state": integer.half(), "state_scale": torch.zeros(2, 4, 5)}):
        with pytest.raises(ValueError, match=r"^state_scale\b"):
            triton.ssd_scan(**i, **wrong)
