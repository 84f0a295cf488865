"""A malformed call raises an error that names the tensor, and never reaches C."""

import pytest
import torch

import quamba_kernels
from quamba_kernels import cpu

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.why_not()}")


def codes(rng, *shape):
    return torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)


def test_malformed_linear(rng):
    x, w, ws, xs = codes(rng, 3, 8), codes(rng, 5, 8), torch.rand(5), torch.tensor(0.1)
    bad_linear = [
        (TypeError, "x", (x.float(), xs, w, ws)),
        (TypeError, "weight", (x, xs, w.int(), ws)),
        (ValueError, "weight", (x, xs, w[:, :7], ws)),
        (ValueError, "weight_scale", (x, xs, w, ws[:4])),
        (TypeError, "weight_scale", (x, xs, w, ws.double())),
        (ValueError, "x_scale", (x, torch.rand(2, 1), w, ws)),
        (ValueError, "bias", (x, xs, w, ws, torch.rand(4))),
        (ValueError, "inv", (x, xs, w, ws, None, torch.rand(4))),
        (ValueError, "weight", (x, xs, w[0], ws)),
        (TypeError, "x", (x.to("meta"), xs, w, ws)),
    ]
    for error, name, args in bad_linear:
        with pytest.raises(error, match=rf"^{name}\b"):
            cpu.w8a8_linear(*args)
    with pytest.raises(ValueError, match="overflow"):
        cpu.int8_matmul(torch.zeros(1, 2**17, dtype=torch.int8), torch.zeros(1, 2**17, dtype=torch.int8))


def test_malformed_int4_and_weight_only_linear(rng):
    x, xs, ws, w = codes(rng, 3, 70), torch.tensor(0.1), torch.rand(5), codes(rng, 5, 70)
    packed, g = torch.zeros(5, 48, dtype=torch.uint8), codes(rng, 5, 3)
    assert cpu.w4a8_linear(x, xs, packed, g, ws).shape == cpu.w4_linear(x.float(), packed, g, ws).shape == (3, 5)
    for error, name, bad in [
        (TypeError, "packed", (packed.view(torch.int8), g, ws)),
        (ValueError, "packed", (packed[0], g, ws)),
        (TypeError, "group_scale", (packed, g.float(), ws)),
        (ValueError, "group_scale", (packed, g[:4], ws)),
        (ValueError, "group_scale", (packed, g[:, :2], ws)),
        (ValueError, "group_scale", (packed[:, :32], g[:, :2], ws)),
        (ValueError, "weight_scale", (packed, g, ws[:4])),
        (ValueError, "bias", (packed, g, ws, torch.rand(4))),
        (ValueError, "inv", (packed, g, ws, None, torch.rand(4))),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            cpu.w4a8_linear(x, xs, *bad)
        with pytest.raises(error, match=rf"^{name}\b"):
            cpu.w4_linear(x.float(), *bad)
    for error, name, args in [
        (TypeError, "x", (x, w, ws)),
        (TypeError, "weight", (x.float(), w.float(), ws)),
        (ValueError, "weight", (x.float(), w[:, 1:], ws)),
        (ValueError, "weight_scale", (x.float(), w, xs)),
    ]:
        with pytest.raises(error, match=rf"^{name}\b"):
            cpu.w8_linear(*args)
    with pytest.raises(TypeError, match=r"^x\b"):
        cpu.w4_linear(x, packed, g, ws)
    with pytest.raises(TypeError, match=r"^x\b"):
        cpu.w4a8_linear(x.float(), xs, packed, g, ws)


def test_malformed_ssd():
    i = {"x": torch.zeros(2, 3, 4, 5), "dt": torch.zeros(2, 3, 4)} | {k: torch.zeros(2, 3, 2, 6) for k in "BC"}
    i |= {"A": torch.zeros(4), "D": torch.zeros(4), "dt_bias": torch.zeros(4)}
    assert cpu.ssd_scan(**i).shape == (2, 3, 4, 5)
    for name, value in {
        "dt": i["dt"][:, :2],
        "A": i["A"][:3],
        "B": torch.zeros(2, 2, 2, 6),
        "C": i["C"][..., :4],
        "D": torch.zeros(4, 4),
        "dt_bias": i["dt_bias"][:3],
        "state": torch.zeros(2, 4, 6, 5),
        "mask": torch.ones(2, 4, dtype=torch.bool),
        "x_scale": torch.tensor(1.0),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            cpu.ssd_scan(**{**i, name: value})
    integer = i | {"B": i["B"].to(torch.int8)}
    for scale in (None, torch.ones(6)):
        with pytest.raises(ValueError, match=r"^B_scale"):
            cpu.ssd_scan(**integer, B_scale=scale)
    with pytest.raises(TypeError, match=r"^state"):
        cpu.ssd_scan(**i, state=torch.zeros(2, 4, 5, 6).bfloat16())


def test_malformed_gated_norm():
    x, w = torch.zeros(2, 6), torch.ones(6)
    for name, args in {"z": (x, x[:1], w), "weight": (x, x, w[:5]), "z_scale": (x, x.to(torch.int8), w)}.items():
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            cpu.gated_rms_norm(*args, 1e-5)
    with pytest.raises(ValueError, match=r"^groups"):
        cpu.gated_rms_norm(x, x, w, 1e-5, 4)


def test_malformed_scan():
    i = {k: torch.zeros(2, 3, 4) for k in ("u", "dt", "z")} | {k: torch.zeros(2, 3, 5) for k in "BC"}
    i |= {"A": torch.zeros(4, 5), "D": torch.zeros(4), "dt_bias": torch.zeros(4)}
    assert cpu.selective_scan(**i).shape == (2, 3, 4)
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
            cpu.selective_scan(**{**i, name: value})
    with pytest.raises(TypeError, match=r"^state"):
        cpu.selective_scan(**i, state=torch.zeros(2, 4, 5).bfloat16())


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
            cpu.causal_conv1d(**{"x": x, "weight": w, "bias": bias, "state": state, **scales, **change})


def test_malformed_rows():
    with pytest.raises(ValueError, match=r"^x"):
        cpu.hadamard(torch.zeros(2, 24), None)
    with pytest.raises(TypeError, match=r"^inv"):
        cpu.quantize(torch.zeros(2, 4), torch.tensor(1.0).double())
    with pytest.raises(ValueError, match=r"^weight"):
        cpu.rms_norm(torch.zeros(2, 4), torch.ones(3), 1e-5)


def test_unknown_variant():
    with pytest.raises(ValueError, match="portable"):
        cpu.force_variant("abacus").__enter__()


def test_gradients_go_through_the_reference(rng):
    x, w = torch.randn(3, 8, generator=rng), torch.ones(8, requires_grad=True)
    cpu.rms_norm(x, w, 1e-5).sum().backward()
    assert w.grad is not None
    x.requires_grad_()
    for y in (cpu.w8_linear(x, codes(rng, 5, 8), torch.rand(5)), cpu.gated_rms_norm(x, x, torch.ones(8), 1e-5)):
        x.grad = None
        y.sum().backward()
        assert x.grad is not None


def test_dispatch():
    assert quamba_kernels.backend_name("cpu") == "cpu"
    assert cpu.variants()[0] in quamba_kernels.describe()
    with quamba_kernels.backend("reference"):
        assert quamba_kernels.backend_name("cpu") == "reference"
    assert torch.equal(quamba_kernels.embedding(torch.tensor([1]), torch.eye(2)), torch.tensor([[0.0, 1.0]]))
