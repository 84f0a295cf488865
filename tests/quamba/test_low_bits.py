"""Quantized Mamba2 and 4-bit weights of both families: checked from the stored codes by maths written here."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import quamba
from quamba import Recipe
from quamba.layers import Embedding, Linear
from quamba.plan import SiteSpec, WeightSpec
from quamba.qtensor import QTensor
from quamba_kernels.hadamard_matrices import outer_matrix
from tests.quamba.models import random_model

FAMILIES = ("mamba1", "mamba2")
# Relative error of random models' logits. 8 bits: as in test_w8a8. 4 bits: groups of 32 leave 8 % of a weight's spread
# (21.6 dB); two blocks of two to three matrices add up to twice that, and tiny random models scatter around it.
NOISE = {"w8a8": 0.08, "w4a8": 0.35, "w4a16": 0.35}


def ids_of(model, rows=8, length=64):
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def unpacked(layer):
    """int64 codes m*q and float64 row scales of an int4 weight with integer multipliers, byte by byte."""
    packed, multiplier, inputs = layer.weight_packed, layer.weight_group_scale, layer.inputs
    rows, groups = multiplier.shape
    half = packed.shape[1] // groups
    codes = torch.zeros(rows, groups * 2 * half, dtype=torch.int64)
    for g in range(groups):
        for j in range(half):
            byte = packed[:, g * half + j].long()
            for place, nibble in ((j, byte & 15), (j + half, byte >> 4)):
                q = torch.where(nibble > 7, nibble - 16, nibble)
                codes[:, g * 2 * half + place] = q * multiplier[:, g].long()
    assert bool((codes[:, inputs:] == 0).all())
    return codes[:, :inputs], layer.weight_scale.double()


def integer_weight(layer):
    if layer.spec.bits == 4:
        return unpacked(layer)
    return layer.weight.long(), layer.weight_scale.double()


def rounded(value, scale):
    return (value / scale).clamp(-128, 127).round()


def product(x, layer):
    codes, scale = integer_weight(layer)
    return (x.long() @ codes.T).double() * scale


def per_token(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return rounded(x, scale), scale


@pytest.mark.parametrize("preset", ["w8a8", "w4a8"])
def test_mamba2_block_equals_the_same_steps_in_float64(preset):
    """Every integer op of one whole block, step by step, from the stored codes and scales alone."""
    model = random_model(hidden=40, inner=48, n_groups=2, norm_groups=2, head_dim=6)
    ids = ids_of(model)
    quantized = quamba.quantize(model, preset, calibration=ids)
    block = quantized.backbone.layers[0]
    s, m = {name: t.double() for name, t in block.scales.named_buffers()}, block.mixer
    u = quantized.backbone.embedding(ids[:1])
    inner, heads, width, states, groups = 48, 8, 6, 8, 2
    x = u.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight.double()
    x, token = per_token(x)
    z, conv_in, dt = (product(x, m.in_proj) * token).split([inner, inner + 2 * groups * states, heads], -1)
    z = rounded(z, s["z"]) * s["z"]
    conv_in = rounded(conv_in, s["conv_in"])
    padded = F.pad(conv_in, (0, 0, 3, 0))
    taps = m.conv1d.weight.double()[:, 0]
    conv = sum(padded[:, k : k + 64] * taps[:, k] for k in range(4)) * m.conv1d.weight_scale.double() * s["conv_in"]
    x, b, c = F.silu(conv + m.conv1d.bias.double()).split([inner, groups * states, groups * states], -1)
    x = (rounded(x, s["x"]) * s["x"])[0].view(64, heads, width)
    b, c = (
        (rounded(v[0].view(64, groups, states), s[n][:, None]) * s[n][:, None]).repeat_interleave(heads // groups, 1)
        for v, n in ((b, "B"), (c, "C"))
    )
    dt = F.softplus(dt[0] + m.dt_bias.double())
    h, ys = torch.zeros(heads, width, states, dtype=torch.float64), []
    for t in range(64):
        decay = torch.exp(-dt[t] * m.A_log.double().exp())[:, None, None]
        h = decay * h + dt[t, :, None, None] * x[t, :, :, None] * b[t, :, None, :]
        ys.append((h * c[t, :, None, :]).sum(-1) + m.D.double()[:, None] * x[t])
    y = (torch.stack(ys).reshape(1, 64, inner) * F.silu(z)).view(1, 64, groups, -1)
    y = (y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(1, 64, inner) * m.norm.weight.double()
    h2 = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    hadamard = torch.kron(outer_matrix("paley12").double(), torch.kron(h2, h2))  # 48 = 12 * 4
    y, token = per_token(y @ hadamard.T / 48**0.5)
    y = product(y, m.out_proj) * token

    got = block(u) - u
    assert got.std() > 0.01
    # A float32 sum that falls on the other side of a rounding boundary moves one code; it must stay that rare.
    off = (got.double() - y).abs() > 1e-4 * y.abs().max()
    assert off.float().mean() < 0.02
    assert (got.double() - y).abs().max() < 0.05 * y.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_preset_of_both_families(tmp_path, family, preset, tied):
    """Near float, the same after loading, the same token by token, and stored in the bits it says."""
    model = random_model(family, hidden=40, tied=tied, mlp=24 if family == "mamba2" else None)
    ids = ids_of(model)
    quantized = quamba.quantize(model, preset, calibration=ids, out=tmp_path / "q")
    expected, got = model(ids).logits, quantized(ids).logits
    assert 0 < (got - expected).pow(2).mean().sqrt() / expected.std() < NOISE[preset]
    assert torch.equal(quamba.QuambaLMHeadModel.from_pretrained(tmp_path / "q")(ids).logits, got)
    quantized.save_pretrained(tmp_path / "again")
    assert torch.equal(quamba.QuambaLMHeadModel.from_pretrained(tmp_path / "again")(ids).logits, got)
    plan, tensors = quantized.config.plan, quantized.state_dict()
    for i, block in enumerate(plan.blocks):
        for name, spec in block.weights.items():
            if name == "A_log":
                assert tensors[f"backbone.layers.{i}.mixer.A_log"].dtype == torch.int8
                continue
            part = "mlp" if name in ("fc1", "fc2") else "mixer"
            have = {n.rsplit(".", 1)[1] for n in tensors if n.startswith(f"backbone.layers.{i}.{part}.{name}.")}
            four = {"weight_packed", "weight_scale", "weight_group_scale"}
            assert have - {"bias"} == (four if spec.bits == 4 else {"weight", "weight_scale"})
    tied_now = quantized.lm_head.weight is not None and quantized.lm_head.weight is quantized.backbone.embedding.weight
    assert tied_now == tied
    state = quantized.new_state()
    steps = [quantized(ids[:, t : t + 1], past_key_values=state).logits for t in range(ids.shape[1])]
    sure = (got.topk(2).values[..., 0] - got.topk(2).values[..., 1]) > 0.1 * got.std()
    same = torch.cat(steps, 1).argmax(-1) == got.argmax(-1)
    assert same[sure].float().mean() > 0.97


@pytest.mark.parametrize("family", FAMILIES)
def test_published_recipes_of_both_families(tmp_path, family):
    names = {
        "mamba1": ("quamba1-w8a8", "quamba2-w4a8-mamba1", "quamba2-w4a16-mamba1"),
        "mamba2": ("quamba2-w8a8", "quamba2-w4a8", "quamba2-w4a16"),
    }
    model = random_model(family, hidden=48, inner=64, head_dim=8) if family == "mamba2" else random_model("mamba1")
    ids = ids_of(model)
    expected = model(ids).logits
    for name in names[family]:
        quantized = quamba.quantize(model, name, calibration=ids, out=tmp_path / name)
        assert not quantized.config.tie_word_embeddings
        error = (quantized(ids).logits - expected).pow(2).mean().sqrt() / expected.std()
        assert 0 < error < 0.6, name
        state = quantized.new_state()
        whole = quantized(ids[:, :32], past_key_values=state).logits
        again = quamba.QuambaLMHeadModel.from_pretrained(tmp_path / name)
        assert torch.equal(again(ids[:, :32]).logits, whole)
        integer_state = quantized.config.plan.blocks[0].site("state").bits == 8
        assert integer_state == ("a8" in name)
        assert state.layers[0].recurrent.dtype == (torch.int8 if integer_state else torch.float32)
        more = quantized(ids[:, 32:], past_key_values=state).logits
        near = (more - quantized(ids).logits[:, 32:]).pow(2).mean().sqrt() / expected.std()
        assert near < (0.3 if integer_state else 0.02), name


def test_an_int8_state_is_rounded_with_its_static_scale():
    model = random_model(inner=64, head_dim=8)
    ids = ids_of(model)
    quantized = quamba.quantize(model, "quamba2-w8a8", calibration=ids)
    block = quantized.backbone.layers[0]
    scale = block.scales.scale("state")
    assert block.scales.state.shape == (16, 8) and scale.shape == (64, 8)
    state = quantized.new_state()
    quantized(ids[:1, :20], past_key_values=state)
    codes = state.layers[0].recurrent.clone()
    real = codes.float() * scale.view(8, 8, 8)
    floating = dataclasses.replace(block.scales.specs["state"])
    assert floating.axis == "group"
    # One more token: from the reals of the codes, and rounded again.
    block.scales.specs["state"] = SiteSpec()
    layer = state.layers[0]
    layer._hold(layer.conv, real.clone())
    x = quantized.backbone.rotation.turn(quantized.backbone.embedding(ids[:1, 20:21]))
    conv = layer.conv.clone()
    y = block(x, layer)
    expected = (layer.recurrent / scale.view(8, 8, 8)).clamp(-128, 127).round().to(torch.int8)
    block.scales.specs["state"] = floating
    layer._hold(conv, codes)
    assert torch.equal(block(x, layer), y)
    assert (layer.recurrent.int() - expected.int()).abs().max() <= 1
    assert codes.abs().max() > 60 or codes.abs().float().mean() > 5


def test_layers_may_differ_by_recipe():
    """A mixed W4A8 / W4A16 model is a recipe."""
    model = random_model(layers=4, hidden=40)
    ids = ids_of(model)
    text = {
        "name": "mixed",
        "family": "mamba2",
        "weights": {name: {"bits": 4} for name in ("in_proj", "out_proj")},
        "layers": [
            {
                "layers": [0, -1],
                "weights": {"conv1d": {"bits": 8}, "out_proj": {"bits": 8}},
                "sites": {
                    "mixer_in": {"bits": 8, "scale": "token"},
                    "out_proj_in": {"bits": 8, "scale": "token"},
                    "conv_in": {"bits": 8, "scale": "static", "axis": "channel"},
                },
            }
        ],
    }
    quantized = quamba.quantize(model, Recipe.from_dict(text), calibration=ids)
    for i, block in enumerate(quantized.config.plan.blocks):
        outer = i in (0, 3)
        assert block.weight("in_proj").bits == 4 and block.weight("out_proj").bits == (8 if outer else 4)
        assert block.site("mixer_in").bits == (8 if outer else 16)
    state = quantized.new_state()
    quantized(ids, past_key_values=state)
    assert [layer.conv.dtype for layer in state.layers] == [torch.int8, torch.float32, torch.float32, torch.int8]
    expected = model(ids).logits
    assert (quantized(ids).logits - expected).pow(2).mean().sqrt() / expected.std() < NOISE["w4a8"]


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_rows_are_within_half_a_step(bits):
    """T5: also rows of zeros and rows that are all negative."""
    from quamba.quantizer.weights import quantize_weight

    weight = torch.randn(12, 70)
    weight[3], weight[4] = 0, -weight[4].abs() - 0.1
    spec = WeightSpec(bits)
    layer = Embedding(12, 70, spec)
    layer.load_state_dict(quantize_weight(weight, spec, clip="absmax"), strict=True, assign=True)
    ids = torch.tensor([[3, 4, 0, 11], [4, 4, 1, 2]])
    got = layer(ids)
    assert got.dtype == torch.float32 and got.shape == (2, 4, 70)
    assert bool((got[0, 0] == 0).all())
    if bits == 8:
        error = (got - weight[ids]).abs()
        assert bool((error <= layer.weight_scale[ids][..., None] / 2 + 1e-6).all())
    else:
        layer.inputs = 70
        codes, scale = unpacked(layer)
        assert torch.equal(got, (codes.float() * scale.float()[:, None])[ids])
        assert (got - weight[ids]).pow(2).mean() < 0.02 * weight.pow(2).mean()


def test_four_bit_linear_multiplies_in_integers():
    from quamba.quantizer.weights import quantize_weight

    layer = Linear(100, 24, spec=WeightSpec(4), integer_input=True)
    layer.load_state_dict(quantize_weight(torch.randn(24, 100), layer.spec), strict=True, assign=True)
    x = torch.randint(-128, 128, (2, 5, 100)).to(torch.int8)
    token = torch.rand(2, 5, 1)
    codes, scale = unpacked(layer)
    assert int(codes.abs().max()) <= 127
    expected = ((x.long() @ codes.T).float() * scale.float()) * token
    assert torch.equal(layer(QTensor(x, token, "token")), expected)
    with pytest.raises(TypeError, match="planned for integer inputs"):
        layer(torch.rand(2, 5, 100))


def test_switches_change_a_preset():
    base = Recipe.find("w8a8", "mamba2")
    plain = base.with_switches(embedding=False, lm_head=False)
    assert plain.embedding.is_float and plain.lm_head.is_float and plain.final_norm.is_float
    assert base.with_switches() == base and base.with_switches(lm_head=True) == base
    assert set(base.with_switches(gptq=True).gptq.weights) == {"in_proj", "out_proj", "fc1", "fc2", "lm_head"}
    grouped = base.with_switches(group_heads=True)
    assert grouped.reorder and grouped.sites["x"].axis == "group"
    assert Recipe.find("w4a16", "mamba1").with_switches(gptq=False).gptq.weights == ()
    first = Recipe.find("w8a8", "mamba1").with_switches(embedding=True, lm_head=True)
    assert first.final_norm == SiteSpec(8, "token") and first.embedding == WeightSpec(8)
    for recipe in (Recipe.find("w8a8", "mamba1"), Recipe.find("w4a16", "mamba2")):
        with pytest.raises(quamba.QuambaError, match="group_heads belongs to Mamba2"):
            recipe.with_switches(group_heads=True)


def test_grouped_heads_by_switch(tmp_path):
    model = random_model(inner=64, head_dim=8, n_groups=2, norm_groups=2)
    ids = ids_of(model)
    recipe = Recipe.find("w8a8", "mamba2").with_switches(group_heads=True)
    quantized = quamba.quantize(model, recipe, calibration=ids)
    scales = quantized.backbone.layers[0].scales
    assert scales.x.shape == (32,) and scales.B.shape == (2,) and scales.x_group.max() < 32
    assert len(scales.scale("x").unique()) <= 32
    expected = model(ids).logits
    assert (quantized(ids).logits - expected).pow(2).mean().sqrt() / expected.std() < 2 * NOISE["w8a8"]


def test_head_and_embedding_of_a_tied_model_go_together():
    recipe = dataclasses.replace(Recipe.find("w8a8", "mamba2"), lm_head=WeightSpec(), final_norm=SiteSpec())
    model = random_model()
    with pytest.raises(quamba.QuambaError, match="one matrix in one format"):
        quamba.quantize(model, recipe, calibration=ids_of(model))
    assert quamba.quantize(random_model(tied=False), recipe, calibration=ids_of(model)).lm_head.spec.is_float


def test_wide_models_get_an_int4_vocabulary():
    recipe = dataclasses.replace(Recipe.find("w4a8", "mamba2"), int4_vocabulary_from=24)
    for tied in (True, False):
        model = random_model(hidden=24, tied=tied)
        ids = ids_of(model)
        quantized = quamba.quantize(model, recipe, calibration=ids)
        assert quantized.lm_head.spec.bits == quantized.backbone.embedding.spec.bits == 4
        expected = model(ids).logits
        assert (quantized(ids).logits - expected).pow(2).mean().sqrt() / expected.std() < 0.45
