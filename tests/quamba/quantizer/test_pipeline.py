"""The flow from a float checkpoint to an artifact: reproducible, and right at the first glance."""

from __future__ import annotations

import dataclasses
import gc
import json
import os

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.errors import QuambaError
from quamba.formats import open_checkpoint
from quamba.plan import SiteSpec
from quamba.recipe import Recipe, configs_dir
from tests.conftest import Shape, random_tensors, transformers_model
from tests.quamba.quantizer.conftest import contents


def test_two_runs_give_identical_files(tiny, run, tmp_path):
    source = tiny(layers=3, tokenizer=True, files="safetensors")
    run(source, tmp_path / "a")
    run(source, tmp_path / "b")
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert set(first) == {
        *("README.md", "config.json", "model.safetensors.index.json", "embedding.safetensors", "head.safetensors"),
        *(f"block-{i:05d}.safetensors" for i in range(3)),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert first == second
    assert not [name for name, data in first.items() if str(tmp_path).encode() in data]
    words = first["README.md"] + first["config.json"] + first["model.safetensors.index.json"]
    assert os.uname().nodename.encode() not in words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "tiny"]


def test_the_calibration_decides_the_scales_and_only_them(tiny, run, tmp_path):
    source = tiny()
    a = run(source, tmp_path / "a", calibration=torch.arange(20).view(2, 10))
    b = run(source, tmp_path / "b", calibration=torch.arange(20, 40).view(2, 10))
    for x, y in zip(a.backbone.layers, b.backbone.layers):
        assert torch.equal(x.mixer.in_proj.weight, y.mixer.in_proj.weight)
        assert not torch.equal(x.scales.z, y.scales.z)


def test_static_scales_equal_a_naive_pass_over_the_float_block(tiny, run, tmp_path, calibration_ids):
    # The first block's input is the embedding; z and conv_in are rows of one plain product.
    recipe = Recipe.find("w8a8", "mamba1")
    recipe = dataclasses.replace(recipe, sites=recipe.sites | {"mixer_in": SiteSpec(8, "static", "tensor")})
    model = run(tiny(layers=1), tmp_path / "out", recipe=recipe)
    t = random_tensors(Shape(layers=1))
    x = t["backbone.embedding.weight"][calibration_ids].double()
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    weight = t["backbone.layers.0.mixer.in_proj.weight"].double() * t["backbone.layers.0.norm.weight"].double()
    projected = (normed @ weight.T).flatten(0, 1)
    scales = model.backbone.layers[0].scales
    expected = projected.abs().amax(0).float() / 127
    torch.testing.assert_close(scales.mixer_in, normed.abs().max().float() / 127, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.cat([scales.conv_in, scales.z]), expected, rtol=1e-5, atol=0)


def test_a_quantized_model_stays_close_to_its_float_model(tiny, run, tmp_path):
    source = tiny()
    quantized, whole = run(source, tmp_path / "out"), QuambaLMHeadModel.from_pretrained(source)
    ids = torch.randint(0, 64, (4, 30), generator=torch.Generator().manual_seed(9))
    signal, error = whole(ids).logits, quantized(ids).logits - whole(ids).logits
    assert error.abs().max() > 0
    sqnr = 10 * torch.log10(signal.square().sum() / error.square().sum())
    assert sqnr > 20  # dB; random weights, which quantize worse than trained ones: 23.6 measured


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_a_live_model_gives_the_files_of_its_checkpoint(tiny, run, tmp_path, kind):
    source = tiny("model", "transformers", dtype=torch.bfloat16)
    run(source, tmp_path / "disk")
    if kind == "ours":
        live = QuambaLMHeadModel.from_pretrained(source)
    else:
        from transformers import MambaForCausalLM

        live = MambaForCausalLM.from_pretrained(source)
    run(live, tmp_path / "live")
    disk, alive = contents(tmp_path / "disk"), contents(tmp_path / "live")
    settings = [json.loads(files.pop("generation_config.json")) for files in (disk, alive)]
    assert settings[0]["eos_token_id"] == settings[1]["eos_token_id"]
    assert alive == disk
    # A live model that never lay on disk has a name, too.
    never = transformers_model(Shape(), random_tensors(Shape()))
    run(never, tmp_path / "never")
    config = json.loads((tmp_path / "never" / "config.json").read_text())
    assert config["quantization_config"]["provenance"]["base_model"] == "MambaForCausalLM"


def test_a_live_model_that_was_cast_is_taken_as_it_is(tiny, run, tmp_path):
    live = QuambaLMHeadModel.from_pretrained(tiny()).half()
    run(live, tmp_path / "out")
    assert open_checkpoint(str(tmp_path / "out")).config.dtype == torch.float16


def test_without_out_the_folder_vanishes_with_the_model(tiny, run, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    model = run(tiny(), None)
    (folder,) = temporary.iterdir()
    assert (folder / "tiny-w8a8" / "config.json").is_file()
    logits = model(torch.arange(8)[None]).logits
    assert torch.isfinite(logits).all()
    del model
    gc.collect()
    assert list(temporary.iterdir()) == []
    with pytest.raises(QuambaError):
        run(tiny("mistaken"), None, calibration=torch.full((2, 8), 64))
    assert list(temporary.iterdir()) == []


def test_a_recipe_by_preset_name_path_and_object(tiny, run, tmp_path):
    source = tiny()
    path = configs_dir() / "mamba1-w8a8.yaml"
    for name, recipe in {
        "preset": "w8a8",
        "name": "mamba1-w8a8",
        "path": str(path),
        "object": Recipe.load(path),
    }.items():
        run(source, tmp_path / name, recipe=recipe)
    first = contents(tmp_path / "preset")
    assert all(contents(tmp_path / name) == first for name in ("name", "path", "object"))


def test_activations_that_explode_name_the_site_and_leave_nothing(tiny, run, tmp_path, monkeypatch):
    model = QuambaLMHeadModel.from_pretrained(tiny())
    model.backbone.layers[1].mixer.in_proj.weight.fill_(3e38)
    with pytest.raises(QuambaError, match=r"NaN or infinite values at block 1, (conv_in|z)"):
        run(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_progress_counts_to_its_end(tiny, run, tmp_path):
    seen = []
    run(tiny(layers=3), tmp_path / "out", progress=lambda done, total, text: seen.append((done, total, text)))
    counts = [done for done, _, _ in seen]
    assert counts == sorted(counts)
    assert len({total for _, total, _ in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert {text.split(":")[0] for _, _, text in seen} == {"block 1/3", "block 2/3", "block 3/3"}
