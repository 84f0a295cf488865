"""A model quantized in place computes what the same model with the rounded weights computes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba_kernels
from quamba import QuambaQuantizationConfig, bundled
from quamba.inplace.linear import InPlaceLinear
from tests.quamba.inplace.models import (
    CONFIGS,
    LINEARS,
    ids,
    linears,
    logits,
    round_tokens,
    round_weight,
    stand_in,
    write_model,
)

KINDS = sorted(CONFIGS)


def load(folder, recipe, dtype=torch.float32, **options):
    config = QuambaQuantizationConfig(recipe, **options)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [32, 64])
def test_w4a16_equals_the_rounded_weights(folders, kind, group):
    model = load(folders[kind], "w4a16", group_size=group)
    expected = logits(stand_in(folders[kind], kind, "w4a16", group), ids())
    torch.testing.assert_close(logits(model, ids()), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    error = logits(AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32), ids()) - expected
    assert error.abs().max() > 100 * (logits(model, ids()) - expected).abs().max()  # rounding is what is compared


@pytest.mark.parametrize("kind", KINDS)
def test_w8a8_equals_the_rounded_weights_and_inputs(folders, kind):
    model, reference = load(folders[kind], "w8a8"), stand_in(folders[kind], kind, "w8a8")
    distances = []
    for seed in range(3):
        expected = logits(reference, ids(seed))
        distances.append(float((logits(model, ids(seed)) - expected).abs().max() / expected.abs().max()))
    # Where a sum lies on the edge of a code its last bit decides; that happens in few inputs, if in any.
    assert sorted(distances)[1] < 1e-4, distances
    assert max(distances) < 0.05


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_each_linear_by_itself(folders, kind, recipe, backend):
    model = load(folders[kind], recipe)
    floats = linears(AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32), kind)
    for name, linear in linears(model, kind).items():
        assert isinstance(linear, InPlaceLinear)
        x = torch.randn(2, linear.inputs, 7, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
        weight, given = round_weight(floats[name].weight.data, recipe), round_tokens(x) if recipe == "w8a8" else x
        expected = given @ weight.T + (0 if floats[name].bias is None else floats[name].bias.data)
        with quamba_kernels.backend(backend):
            torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


def test_what_is_left_alone(folders):
    for kind, replaced in LINEARS.items():
        model = load(folders[kind], "w8a8")
        assert type(model).__module__ == f"transformers.models.{kind}.modeling_{kind}"
        others = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        assert others == ([f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)] if "x_proj" in replaced else []) + [
            "lm_head"
        ]
        before = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).state_dict()
        now = model.state_dict()
        same = [n for n in before if not n.endswith(tuple(f"{linear}.weight" for linear in replaced))]
        assert all(torch.equal(before[name], now[name]) for name in same)
        assert not any(p.requires_grad for p in model.parameters())


def test_modules_to_not_convert(folders):
    model = load(folders["mamba"], "w8a8", modules_to_not_convert=["x_proj", "backbone.layers.1"])
    names = [name for name, module in model.named_modules() if isinstance(module, InPlaceLinear)]
    assert names == ["backbone.layers.0.mixer.in_proj", "backbone.layers.0.mixer.out_proj"]


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_loaded_weights_are_not_initialised_again(tmp_path, kind):
    """transformers divides `out_proj.weight` by a number after loading when the config says rescale_prenorm_residual."""
    folder = write_model(kind, tmp_path / kind, rescale_prenorm_residual=True)
    stored = load_file(folder / "model.safetensors")
    for recipe in ("w8a8", "w4a16"):
        for name, linear in linears(load(folder, recipe), kind).items():
            x = torch.randn(3, linear.inputs, generator=torch.Generator().manual_seed(2))
            given = round_tokens(x) if recipe == "w8a8" else x
            expected = given @ round_weight(stored[f"{name}.weight"], recipe).T + stored.get(f"{name}.bias", 0)
            torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", bundled.MODELS)
def test_the_bundled_models_stay_good(name):
    """Perplexity of 400 tokens: int8 within 2 %, int4 within 8 % (no rotation, no calibration; outliers cost)."""
    folder = bundled.model_path(name)
    text = bundled.sample("wikitext2_sample").read_text(encoding="utf-8")[:2000]
    given = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :400]

    def perplexity(model):
        scores = logits(model, given)[0, :-1].log_softmax(-1)
        return float((-scores.gather(1, given[0, 1:, None]).mean()).exp())

    plain = perplexity(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    assert 10 < plain < 100
    for recipe, limit in (("w8a8", 1.02), ("w4a16", 1.08)):
        assert plain / limit < perplexity(load(folder, recipe)) < plain * limit
