"""The published recipes on models that aren't the usual ones, and their switches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

import quamba
from quamba import Recipe
from quamba.errors import RecipeError
from quamba.formats import checkpoint_of
from quamba.plan import SiteSpec, WeightSpec
from quamba.recipe import Gptq
from tests.quamba.models import random_model

PUBLISHED = {
    "mamba1": ("quamba1-w8a8", "quamba2-w4a8-mamba1", "quamba2-w4a16-mamba1"),
    "mamba2": ("quamba2-w8a8", "quamba2-w4a8", "quamba2-w4a16"),
}
CASES = [(family, name) for family, names in PUBLISHED.items() for name in names]


def ids_of(rows=4, tokens=24):
    return torch.randint(0, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def near(model, quantized):
    """Quantized logits differ from the float model's, and not by much."""
    ids = ids_of()
    exact, rounded = model(ids).logits, quantized(ids).logits
    return 0 < float((exact - rounded).square().mean().sqrt() / exact.std()) < 0.5


@pytest.mark.parametrize(("family", "name"), CASES)
def test_without_a_bias_of_the_convolution(tmp_path, family, name):
    model = random_model(family, hidden=32, inner=64, use_conv_bias=False)
    quantized = quamba.quantize(model, name, calibration=ids_of(), out=tmp_path / "out")
    assert quantized.backbone.layers[0].mixer.conv1d.bias is None
    assert "conv_bias" not in quantized.config.plan.blocks[0].weights
    assert near(model, quantized)


@pytest.mark.parametrize("switches", [{"group_heads": False}, {"embedding": False, "lm_head": False}, {"gptq": False}])
@pytest.mark.parametrize("name", ["quamba2-w8a8", "quamba2-w4a8"])
def test_switches_of_the_published_recipes(tmp_path, name, switches):
    model = random_model("mamba2", hidden=32, inner=64)
    recipe = Recipe.find(name, "mamba2").with_switches(**switches)
    quantized = quamba.quantize(model, recipe, calibration=ids_of(), out=tmp_path / "out")
    assert near(model, quantized)
    plan = quantized.config.plan
    if "group_heads" in switches:  # as published without sorting: one clipped scale for x, one for the state
        assert {plan.blocks[0].site(site) for site in ("x", "B", "C", "state")} == {SiteSpec(8, "static")}
        assert recipe.observer_of("x") == recipe.observer_of("state") == "percentile"
        assert not recipe.reorder
    else:
        assert plan.blocks[0].site("x").axis == "group"
    if "embedding" in switches:
        assert plan.embedding.is_float and plan.lm_head.is_float and plan.final_norm.is_float


def test_the_convolutions_biases_have_a_scale_for_each_of_x_B_and_C(tmp_path):
    model = random_model("mamba2", hidden=32, inner=64)
    bias = model.backbone.layers[0].mixer.conv1d.bias
    with torch.no_grad():
        bias[:64] *= 100
    quantized = quamba.quantize(model, "quamba2-w8a8", calibration=ids_of(), out=tmp_path / "out")
    conv = quantized.backbone.layers[0].mixer.conv1d
    assert conv.bias.dtype == torch.int8
    for part in (slice(0, 64), slice(64, 72), slice(72, 80)):
        largest = bias[part].abs().max()
        torch.testing.assert_close(conv.bias_scale[part], (largest / 127).expand_as(bias[part]))
        assert float(conv.bias[part].abs().max()) == 127
    # Sorting moves channels of x inside their heads, so B and C are where they were.
    assert ((conv.vector("bias") - bias)[64:].abs() <= conv.bias_scale[64:] / 2 * 1.001).all()


def test_gptq_by_switch_takes_the_mlp_too(tmp_path, monkeypatch):
    seen = []
    from quamba.quantizer import block

    gptq = block.gptq
    monkeypatch.setattr(
        block, "gptq", lambda weight, *a, **k: seen.append(tuple(weight.shape)) or gptq(weight, *a, **k)
    )
    recipe = Recipe.find("w8a8", "mamba2").with_switches(gptq=True)
    model = random_model("mamba2", hidden=32, inner=64, mlp=40, layers=1)
    quamba.quantize(model, recipe, calibration=ids_of(), out=tmp_path / "out")
    assert {(80, 32), (32, 40)} <= set(seen) and len(seen) == 4


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("mamba1", {"gptq": Gptq(weights=("in_prj",))}, r"gptq.weights can't be 'in_prj': did you mean 'in_proj'"),
        ("mamba1", {"gptq": Gptq(weights=("A_log",))}, r"gptq.weights can't be 'A_log'"),
        ("mamba1", {"gptq": Gptq(weights=("conv1d",))}, r"gptq.weights can't be 'conv1d'"),
        ("mamba1", {"reorder": True}, "reorder sorts the heads of Mamba2"),
        ("mamba1", {"shared": (("conv_in", "z"),)}, "shared: conv_in, z must all have one static scale, axis: tensor"),
        ("mamba2", {"shared": (("x", "mixer_in"),)}, "shared: x, mixer_in must all have one static scale"),
    ],
)
def test_what_would_go_wrong_late_is_refused_at_once(tmp_path, family, changes, why):
    recipe = dataclasses.replace(Recipe.find("w8a8", family), **changes)
    with pytest.raises(RecipeError, match=why):
        quamba.quantize(random_model(family), recipe, calibration=ids_of(), out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overrides_and_groups_that_say_nothing_are_refused():
    data = {"name": "a", "family": "mamba2", "layers": [{"layers": []}]}
    with pytest.raises(RecipeError, match="an override must name at least one layer"):
        Recipe.from_dict(data)
    site = {"bits": 8, "scale": "static", "axis": "group", "groups": 7}
    with pytest.raises(RecipeError, match=r"sites.x.groups: their number follows from the family"):
        Recipe.from_dict({"name": "a", "family": "mamba2", "sites": {"x": site}})


def test_a_wide_models_own_four_bit_spec_is_kept():
    spec = WeightSpec(4, group=128, group_scale="float")
    recipe = dataclasses.replace(Recipe.find("w4a8", "mamba2"), int4_vocabulary_from=16, embedding=spec, lm_head=spec)
    assert recipe.resolve(random_model("mamba2").config).embedding == spec


def live_mamba2(groups):
    config = Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, n_groups=groups, state_size=8
    )
    torch.manual_seed(0)
    return Mamba2ForCausalLM(config).eval()


def test_the_norm_of_a_live_model_goes_over_the_groups_that_it_really_has():
    """transformers before 5.23 took all groups of channels together."""
    model = live_mamba2(groups=4)
    assert checkpoint_of(model).config.blocks[0]["args"]["norm_groups"] == 4
    for layer in model.backbone.layers:
        layer.mixer.norm.group_size = 64
    ids = ids_of()
    from quamba.formats.load import build

    checkpoint = checkpoint_of(model)
    assert checkpoint.config.blocks[0]["args"]["norm_groups"] == 1
    torch.testing.assert_close(build(checkpoint)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("version", "told"), [("5.17.0", True), ("5.22.3", True), ("5.23.0", False), ("6.0", False)])
def test_a_folder_of_an_older_transformers_with_several_groups_is_told(tmp_path, version, told):
    import json

    from quamba.formats import open_checkpoint

    live_mamba2(groups=4).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_version": version}))
    repairs = open_checkpoint(str(tmp_path)).repairs.found
    assert bool(repairs) == told
    if told:
        assert "took the norm of all 4 groups of channels together" in repairs[0].what


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_an_empty_batch(family, backend):
    import quamba_kernels

    try:
        with quamba_kernels.backend(backend):
            assert random_model(family)(torch.zeros(0, 5, dtype=torch.int64)).logits.shape == (0, 5, 64)
    except (ValueError, RuntimeError) as error:
        if backend == "reference" or "compiled" not in str(error):
            raise
        pytest.skip(str(error))
