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
        cpu.selective_scan(**i, state=torch.zeros(2, 4, 5).half())


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


def test_dispatch():
    assert quamba_kernels.backend_name("cpu") == "cpu"
    assert cpu.variants()[0] in quamba_kernels.describe()
    with quamba_kernels.backend("reference"):
        assert quamba_kernels.backend_name("cpu") == "reference"
    assert torch.equal(quamba_kernels.embedding(torch.tensor([1]), torch.eye(2)), torch.tensor([[0.0, 1.0]]))
