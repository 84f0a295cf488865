"""Loading in place and loading again: files, dtypes, devices, compilation, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2ForCausalLM,
    MambaForCausalLM,
)

import quamba
from quamba import QuambaLMHeadModel, QuambaQuantizationConfig
from quamba.errors import CheckpointError, QuambaError, RecipeError
from quamba.inplace.linear import InPlaceLinear
from quamba.recipe import Recipe
from tests.quamba.inplace.models import ids, linears, logits, stand_in


def same(a, b):
    """The same tensors to the bit. Float products of torch may differ in the last place by where a tensor lies in memory."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(logits(a, ids()), logits(b, ids()), rtol=1e-5, atol=1e-5)


BOTH = pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])


def load(folder, recipe="w8a8", **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=QuambaQuantizationConfig(recipe), **options)


@BOTH
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_saved_and_loaded_again_it_is_the_same(folders, tmp_path, kind, recipe):
    model = load(folders[kind], recipe)
    model.save_pretrained(tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    said = json.loads((tmp_path / "one/config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "quamba" and said["recipe"] == recipe
    assert said["load"] == "import quamba before from_pretrained"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert again.config.quantization_config.to_dict() == said
    same(again, model)
    again.save_pretrained(tmp_path / "two")
    third = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[kind].from_pretrained(tmp_path / "two")
    same(third, model)
    stored = load_file(tmp_path / "two/model.safetensors")
    names = {name.rpartition(".")[2]: t.dtype for name, t in stored.items() if ".in_proj.weight" in name}
    codes = (
        {"weight": torch.int8} if recipe == "w8a8" else {"weight_packed": torch.uint8, "weight_group_scale": torch.int8}
    )
    assert names == codes | {"weight_scale": torch.float32}


@BOTH
def test_generate(folders, recipe):
    for kind in ("mamba", "mamba2"):
        model, given = load(folders[kind], recipe), ids(3)
        out = model.generate(given, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out.shape == (2, 15)
        expected = given
        for _ in range(4):
            expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], 1)
        assert torch.equal(out, expected)


def test_a_model_without_a_head(folders):
    model = AutoModel.from_pretrained(folders["mamba"], quantization_config=QuambaQuantizationConfig("w4a16"))
    whole = load(folders["mamba"], "w4a16")
    assert torch.equal(model(ids()).last_hidden_state, whole.backbone(ids()).last_hidden_state)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(folders, tmp_path, dtype, recipe):
    for kind in ("mamba", "mamba2"):
        model, reference = load(folders[kind], recipe, dtype=dtype), load(folders[kind], recipe, dtype=torch.float32)
        for linear in linears(model, kind).values():
            assert linear.weight_scale.dtype == torch.float32
            assert linear(torch.zeros(1, linear.inputs, dtype=dtype)).dtype == dtype
        assert model.get_input_embeddings().weight.dtype == dtype
        expected = logits(reference, ids())
        assert (logits(model, ids()) - expected).abs().max() < 0.1 * expected.abs().max()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert again.dtype == dtype and torch.equal(logits(again, ids()), logits(model, ids()))


@BOTH
def test_device_map_and_low_cpu_mem_usage(folders, recipe):
    expected = logits(load(folders["mamba"], recipe), ids())
    for options in (
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
    ):
        model = load(folders["mamba"], recipe, **options)
        found = logits(model, ids().to(model.device)).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_device_map_may_not_leave_parts_on_disk(folders, tmp_path):
    parts = {"backbone.embeddings": "cpu", "backbone.layers": "disk", "backbone.norm_f": "cpu", "lm_head": "cpu"}
    with pytest.raises(QuambaError, match="can't be left on disk"):
        load(folders["mamba"], device_map=parts, offload_folder=tmp_path)


def test_compiled_it_computes_the_same(folders):
    """The integer products stay outside the graphs; what is around them is compiled."""
    torch.compiler.reset()
    model = load(folders["mamba2"])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, ids(0, 4)), logits(model, ids(0, 4)), rtol=1e-5, atol=1e-5)
    whole = torch.compile(linears(model, "mamba2")["backbone.layers.0.mixer.in_proj"], backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="called through C"):
        whole(torch.zeros(1, 40))
    torch.compiler.reset()


def test_dequantize_gives_back_a_float_model(folders, tmp_path):
    model = load(folders["mamba2"], "w4a16", dtype=torch.float32)
    plain = model.dequantize()
    expected = logits(stand_in(folders["mamba2"], "mamba2", "w4a16"), ids())
    torch.testing.assert_close(logits(plain, ids()), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert not any(isinstance(module, InPlaceLinear) for module in plain.modules())
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids()), logits(plain, ids()))


@pytest.mark.parametrize(
    "recipe", ["w4a8", "quamba2-w4a8", "my.yaml", "W8A8", 8, None, Recipe(name="mine", family="mamba1")]
)
def test_any_other_recipe_needs_calibration(recipe):
    with pytest.raises(RecipeError, match=r"needs calibration: use quamba\.quantize\(model, ") as caught:
        QuambaQuantizationConfig(recipe)
    assert "w8a8 and w4a16" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "w8a8", "group_size": 32}, "group_size belongs to w4a16"),
        ({"recipe": "w4a16", "group_size": 16}, "group_size can't be 16"),
        ({"groupsize": 32}, "has no 'groupsize': did you mean 'group_size'"),
        ({"quant_method": "gptq"}, "quant_method is 'gptq'"),
        ({"format_version": 2}, "upgrade quamba"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said):
    with pytest.raises(RecipeError, match=said):
        QuambaQuantizationConfig(**arguments)


def test_other_architectures_are_refused(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(
        QuambaError, match="in place quamba quantizes mamba, falcon_mamba, mamba2; this model is 'llama'"
    ):
        load(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", ["mixer.A_log", "mixer.in_proj.weight", "mixer.out_proj.weight", "mixer.conv1d.bias"])
@BOTH
def test_a_missing_tensor_is_an_error(folders, tmp_path, recipe, name):
    folder = shutil.copytree(folders["mamba2"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"backbone.layers.1.{name}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"has no backbone\.layers\.1\.{name}"):
        load(folder, recipe)


@BOTH
def test_broken_weights_are_named(folders, tmp_path, recipe):
    folder = shutil.copytree(folders["mamba"], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    tensors["backbone.layers.0.mixer.x_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mixer\.x_proj\.weight holds NaN"):
        load(folder, recipe)


def test_what_was_quantized_in_place_is_no_source(folders, tmp_path):
    model = load(folders["mamba"])
    model.save_pretrained(tmp_path)
    for given in (str(tmp_path), model):
        with pytest.raises(CheckpointError, match="load it with AutoModelForCausalLM, or give the float model"):
            quamba.quantize(given, "w8a8", calibration=ids())


def test_an_artifact_is_not_quantized_again(tiny_artifact, folders):
    with pytest.raises(QuambaError, match=r"quantize with quamba\.quantize"):
        load(tiny_artifact)
    plan = json.loads((tiny_artifact / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(tiny_artifact, quantization_config=plan)  # as lm-eval does
    assert isinstance(model, QuambaLMHeadModel)
    with pytest.raises(QuambaError, match="belongs to an artifact of quamba's"):
        MambaForCausalLM.from_pretrained(tiny_artifact)


PROBE = """
import torch, warnings
{imports}
model = {model}.from_pretrained({folder!r})
print(sum(type(m).__name__ == "InPlaceLinear" for m in model.modules()))
"""


@pytest.mark.parametrize(
    ("imports", "model", "found"),
    [
        ("import quamba; from transformers import MambaForCausalLM as Model", "Model", "6"),  # no Auto class loaded
        ("import transformers", "transformers.AutoModelForCausalLM", "0"),
    ],
    ids=["without Auto classes", "without quamba"],
)
def test_loading_in_another_process(folders, tmp_path, forks, imports, model, found):
    load(folders["mamba"]).save_pretrained(tmp_path)
    script = PROBE.format(imports=imports, model=model, folder=str(tmp_path))
    done = forks.run("-c", script)
    assert done.stdout.strip() == found, done.stderr
    # Without quamba transformers loads the codes as if they were weights: all it does is to say so.
    assert ("Unknown quantization type, got quamba" in done.stderr) == (found == "0")
