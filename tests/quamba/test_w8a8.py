"""W8A8 computes with integers: checked op by op against int64 and float64 maths written here."""

import dataclasses

import pytest
import torch

import quamba
from quamba import QuambaLMHeadModel, Recipe
from quamba.config import QuambaConfig
from quamba.layers import CausalConv1d, Linear, Sites
from quamba.plan import SiteSpec, WeightSpec
from quamba.qtensor import QTensor
from quamba_kernels.hadamard_matrices import outer_matrix

INT8 = WeightSpec(bits=8)
# A site rounded to 1/127 of its largest value has noise of about 1 % of its spread (largest value 4 sigma); ten sites in
# two blocks add up to sqrt(10) % = 3 %, and tiny random models scatter around that.
NOISE = 0.08
STATIC = SiteSpec(bits=8, scale="static")


def codes(*shape, low=-128, high=128, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


def int8_linear(inputs, outputs, seed=1):
    layer = Linear(inputs, outputs, spec=INT8)
    layer.weight.data = codes(outputs, inputs, low=-127, seed=seed)
    layer.weight_scale.data = torch.rand(outputs) + 0.1
    return layer


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_linear_is_an_integer_product_with_scales_after_it(scale):
    layer, x = int8_linear(300, 40), codes(3, 5, 300)
    x[0, 0], x[0, 1] = -128, 127
    layer.weight.data[0] = -127
    x_scale = torch.tensor(0.03) if scale == "tensor" else torch.rand(3, 5, 1)
    y = layer(QTensor(x, x_scale, scale))
    acc = x.long() @ layer.weight.long().T
    assert torch.equal(y, (acc.float() * layer.weight_scale) * x_scale)


def test_linear_rounds_into_its_sites():
    layer, x = int8_linear(64, 10), QTensor(codes(2, 3, 64), torch.tensor(0.02), "tensor")
    channel = dataclasses.replace(STATIC, axis="channel")
    sites = Sites({"conv_in": 6, "z": 4}, {"conv_in": channel, "z": STATIC})
    sites.conv_in.copy_(torch.rand(6) + 1)
    sites.z.fill_(3.0)
    a, b = layer(x, sites("conv_in", "z"))
    real = (x.values.double() @ layer.weight.double().T) * layer.weight_scale.double() * 0.02
    for piece, expected, s in ((a, real[..., :6], sites.conv_in), (b, real[..., 6:], sites.z)):
        steps = (expected / s.double()).clamp(-128, 127)
        near_a_tie = ((steps - steps.floor()) - 0.5).abs() < 1e-3
        assert bool(((piece.values.double() == steps.round()) | near_a_tie).all())
        assert torch.equal(piece.scale, s)


def test_a_site_may_stay_float_beside_an_integer_one():
    layer, x = int8_linear(16, 6), QTensor(codes(1, 2, 16), torch.tensor(0.5), "tensor")
    a, b = layer(x, Sites({"conv_in": 3, "z": 3}, {"conv_in": STATIC})("conv_in", "z"))
    assert isinstance(a, QTensor) and b.is_floating_point()
    assert torch.equal(b, layer(x)[..., 3:])


def test_mismatches_of_plan_and_input_are_type_errors():
    x = QTensor(codes(1, 1, 8), torch.tensor(1.0), "tensor")
    with pytest.raises(TypeError, match="float weights was given a QTensor"):
        Linear(8, 4)(x)
    with pytest.raises(TypeError, match="planned for integer inputs"):
        Linear(8, 4, spec=INT8, integer_input=True)(torch.rand(1, 1, 8))
    with pytest.raises(TypeError, match="channel scales"):
        Linear(8, 4, spec=INT8)(QTensor(x.values, torch.rand(8), "channel"))
    with pytest.raises(TypeError, match="convolution"):
        CausalConv1d(8, 4, True)(x, Sites({"x": 8}, {})("x"))


def test_weight_only_linear_takes_floats():
    layer, x = int8_linear(33, 7), torch.randn(2, 33)
    expected = (x.double() @ (layer.weight.double() * layer.weight_scale.double()[:, None]).T).float()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-3)


def test_qtensor_is_a_pytree_node_and_no_tuple():
    q = QTensor(codes(2, 4), torch.rand(4), "channel")
    mapped = torch.utils._pytree.tree_map(lambda t: t, q)
    assert torch.equal(mapped.dequantize(), q.dequantize()) and not isinstance(q, tuple)
    left, right = q.split([1, 3])
    assert torch.equal(torch.cat([left.dequantize(), right.dequantize()], -1), q.dequantize())
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.scale = 1


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    args = {"intermediate_size": 48, "state_size": 8, "conv_kernel": 4, "time_step_rank": 3}
    config = QuambaConfig(vocab_size=64, hidden_size=24, blocks=[{"mixer": "mamba1", "args": args, "mlp": None}] * 2)
    model = QuambaLMHeadModel(config).eval()
    with torch.no_grad():
        for block in model.backbone.layers:
            block.norm.weight.add_(torch.rand(24))
    ids = torch.randint(0, 64, (8, 64))
    return model, quamba.quantize(model, "w8a8", calibration=ids), ids


def test_block_equals_the_same_steps_in_float64(pair):
    """Every integer op of one whole block, step by step, from the stored codes and scales alone."""
    _, model, ids = pair
    block = model.backbone.layers[0]
    s, m = {k: v.double() for k, v in block.scales.named_buffers()}, block.mixer
    u = model.backbone.embedding(ids[:1])

    def rounded(value, scale):
        return (value / scale).clamp(-128, 127).round()

    def product(x, layer):
        return (x.long() @ layer.weight.long().T).double() * layer.weight_scale.double()

    x = u.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight.double()
    token = x.abs().amax(-1, keepdim=True) / 127
    xz = product(rounded(x, token), m.in_proj) * token
    x, z = rounded(xz[..., :48], s["conv_in"]), rounded(xz[..., 48:], s["z"]) * s["z"]
    padded = torch.cat([torch.zeros(1, 3, 48, dtype=torch.float64), x], 1)
    taps = m.conv1d.weight.double()[:, 0]
    acc = sum(padded[:, k : k + 64] * taps[:, k] for k in range(4))
    conv = acc * m.conv1d.weight_scale.double() * s["conv_in"] + m.conv1d.bias.double()
    x = rounded(torch.nn.functional.silu(conv), s["x"])
    dt, b, c = product(x, m.x_proj).split([3, 8, 8], -1)  # x's scales are inside x_proj
    dt = dt @ m.dt_proj.weight.double().T * m.dt_proj.weight_scale.double() + m.dt_proj.bias.double()
    dt, x = torch.nn.functional.softplus(dt), x * s["x"]
    h, ys = torch.zeros(48, 8, dtype=torch.float64), []
    for t in range(64):
        h = torch.exp(-dt[0, t, :, None] * m.A_log.double().exp()) * h + (dt * x)[0, t, :, None] * b[0, t]
        ys.append(h @ c[0, t] + m.D.double() * x[0, t])
    y = torch.stack(ys)[None] * torch.nn.functional.silu(z)
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(outer_matrix("paley12").double(), torch.kron(h2, h2))  # 48 = 12 * 4
    y = y @ hadamard.T / 48**0.5
    token = y.abs().amax(-1, keepdim=True) / 127
    y = product(rounded(y, token), m.out_proj) * token

    got = block(u) - u
    assert got.std() > 0.01
    # A float32 sum that falls on the other side of a rounding boundary moves one code; it must stay that rare.
    off = (got.double() - y).abs() > 1e-4 * y.abs().max()
    assert off.float().mean() < 0.02
    assert (got.double() - y).abs().max() < 0.05 * y.abs().max()


def test_no_dequantized_weight_is_kept(pair):
    _, model, _ = pair
    for block in model.backbone.layers:
        for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
            assert block.mixer.get_submodule(name).weight.dtype == torch.int8
        big = [n for n, t in block.state_dict().items() if t.is_floating_point() and t.numel() > 48 * 8]
        assert big == []


def test_quantized_is_near_float_and_propagation_is_a_choice(pair):
    model, quantized, ids = pair
    expected = model(ids).logits
    for other in (quantized, quamba.quantize(model, _recipe(propagate="float"), calibration=ids)):
        error = (other(ids).logits - expected).pow(2).mean().sqrt() / expected.std()
        assert 0 < error < NOISE


def _recipe(**changes):
    return dataclasses.replace(Recipe.find("w8a8", family="mamba1"), **changes)


def test_mixed_precision_is_a_recipe(pair):
    """Any subset of sites may stay float: the mixer has one forward for all of them."""
    model, _, ids = pair
    base, expected = _recipe(), model(ids).logits
    for weights, sites in (
        ({"in_proj"}, {"mixer_in"}),
        ({"in_proj", "out_proj"}, {"mixer_in", "out_proj_in", "z"}),
        ({"conv1d"}, {"conv_in"}),
        ({"x_proj"}, {"x"}),
        ({"in_proj", "x_proj", "dt_proj", "out_proj"}, set()),  # weight-only
    ):
        recipe = _recipe(
            weights={k: v for k, v in base.weights.items() if k in weights},
            sites={k: v for k, v in base.sites.items() if k in sites},
        )
        logits = quamba.quantize(model, recipe, calibration=ids)(ids).logits
        error = (logits - expected).pow(2).mean().sqrt() / expected.std()
        assert 0 < error < NOISE, (weights, sites)


def test_transforms_preserve_the_float_function(pair):
    """Norm folding and rotation alone: a recipe that quantizes nothing gives the same logits."""
    model, _, ids = pair
    nothing = _recipe(weights={}, sites={})
    torch.testing.assert_close(
        quamba.quantize(model, nothing, calibration=ids)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4
    )


def test_inputs_of_projections_may_have_static_scales(pair):
    model, _, ids = pair
    recipe = _recipe(sites=_recipe().sites | {"mixer_in": STATIC, "out_proj_in": STATIC})
    quantized = quamba.quantize(model, recipe, calibration=ids)
    scales = dict(quantized.backbone.layers[0].scales.named_buffers())
    assert scales["mixer_in"].shape == () and scales["mixer_in"] > 0
    expected = model(ids).logits
    assert (quantized(ids).logits - expected).pow(2).mean().sqrt() / expected.std() < NOISE
