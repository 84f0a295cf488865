"""Our artifacts: what is stored, that it comes back bit for bit, and that tampering is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import quamba
from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError, QuambaError
from quamba.formats import is_artifact, open_checkpoint

QUANTIZED = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
STATIC_SITES = {"conv_in": (64,), "x": (64,), "z": (64,)}
TOKEN_SITES = ("mixer_in", "out_proj_in")


def stored(folder):
    """Every tensor of all shards, straight from safetensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def logits_of(model):
    ids = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(5))
    return model(ids).logits


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "copy")


def edit_config(folder, edit):
    path = folder / "config.json"
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float", "quantized"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_gives_the_same_bits(tiny, tmp_path, calibration_ids, dtype, kind, tied):
    source = tiny(dtype=dtype, tied=tied, bias=True)
    model = QuambaLMHeadModel.from_pretrained(source)
    if kind == "quantized":
        model = quamba.quantize(model, "w8a8", calibration=calibration_ids)
    expected = logits_of(model)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.1
    model.save_pretrained(tmp_path / "saved")
    for load in (QuambaLMHeadModel.from_pretrained, AutoModelForCausalLM.from_pretrained):
        again = load(tmp_path / "saved")
        assert type(again) is QuambaLMHeadModel
        assert again.dtype == dtype
        assert torch.equal(logits_of(again), expected)
    again.save_pretrained(tmp_path / "twice")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes(), file.name
    assert AutoConfig.from_pretrained(tmp_path / "saved").tie_word_embeddings is tied


def test_the_plan_has_own_entries_for_what_stays_float(tiny_artifact):
    plan = json.loads((tiny_artifact / "config.json").read_text())["quantization_config"]
    assert (plan["quant_method"], plan["format_version"], plan["recipe"]) == ("quamba", 1, "w8a8")
    assert plan["embedding"] == {"bits": 16}
    assert plan["lm_head"] == {"bits": 16}
    assert plan["final_norm"] == {"bits": 16, "scale": "none", "axis": "tensor"}
    assert len(plan["blocks"]) == 2
    for block in plan["blocks"]:
        assert block["weights"] == {name: {"bits": 8} for name in QUANTIZED}
        assert set(block["sites"]) == {*STATIC_SITES, *TOKEN_SITES}
        assert block["sites"]["mixer_in"] == {"bits": 8, "scale": "token", "axis": "tensor"}
        assert block["sites"]["x"] == {"bits": 8, "scale": "static", "axis": "channel"}
        assert block["rotations"] == {"out_proj": {"n": 64, "m": 1, "matrix": "sylvester"}}


def test_every_block_weight_takes_one_byte_and_has_no_float_copy(tiny_artifact):
    tensors = stored(tiny_artifact)
    shapes = {"in_proj": (128, 32), "conv1d": (64, 1, 4), "x_proj": (34, 64), "dt_proj": (64, 2), "out_proj": (32, 64)}
    for i in range(2):
        prefix = f"backbone.layers.{i}."
        block = {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
        expected = {"norm.weight": ((32,), torch.float32)}
        expected |= {
            f"mixer.{name}": ((64, 16) if name == "A_log" else (64,), torch.float32) for name in ("A_log", "D")
        }
        expected |= {f"mixer.{name}.bias": ((64,), torch.float32) for name in ("conv1d", "dt_proj")}
        expected |= {f"scales.{name}": (shape, torch.float32) for name, shape in STATIC_SITES.items()}
        for name, shape in shapes.items():
            expected[f"mixer.{name}.weight"] = (shape, torch.int8)
            expected[f"mixer.{name}.weight_scale"] = (shape[:1], torch.float32)
        assert {name: (tuple(t.shape), t.dtype) for name, t in block.items()} == expected
        for name in shapes:
            assert block[f"mixer.{name}.weight"].abs().max() == 127
    rest = {name: t for name, t in tensors.items() if not name.startswith("backbone.layers.")}
    assert set(rest) == {"backbone.embedding.weight", "backbone.norm_f.weight"}  # the head is tied: stored once


def test_the_loaded_model_holds_no_float_copy_either(tiny_artifact):
    model = QuambaLMHeadModel.from_pretrained(tiny_artifact)
    held = {name: t.dtype for name, t in (*model.named_parameters(), *model.named_buffers())}
    assert len([name for name, dtype in held.items() if dtype == torch.int8]) == 2 * len(QUANTIZED)
    for i in range(2):
        mixer = model.backbone.layers[i].mixer
        for name in QUANTIZED:
            tensors = [t for t in vars(getattr(mixer, name)).values() if isinstance(t, torch.Tensor)]
            assert tensors == []
            assert getattr(mixer, name).weight.dtype == torch.int8


def test_the_index_lists_every_tensor_and_the_size(tiny_artifact):
    index = json.loads((tiny_artifact / "model.safetensors.index.json").read_text())
    shards = sorted(file.name for file in tiny_artifact.glob("*.safetensors"))
    assert shards == ["block-00000.safetensors", "block-00001.safetensors", "embedding.safetensors", "head.safetensors"]
    for shard in shards:
        here = {name for name, file in index["weight_map"].items() if file == shard}
        assert here == set(load_file(tiny_artifact / shard))
    assert index["metadata"]["total_size"] == sum((tiny_artifact / shard).stat().st_size for shard in shards)


def precise(model):
    for i, block in enumerate(model.backbone.layers):
        yield f"{i}.A_log", block.mixer.A_log
        yield f"{i}.D", block.mixer.D
        yield f"{i}.dt_proj.bias", block.mixer.dt_proj.bias
        for name in QUANTIZED:
            yield f"{i}.{name}.weight_scale", getattr(block.mixer, name).weight_scale
        for name, scale in block.scales.named_buffers():
            yield f"{i}.scales.{name}", scale


@pytest.mark.parametrize("way", ["dtype=", "half", "to", "bfloat16"])
def test_precise_tensors_stay_float32_when_a_model_is_cast(tiny_artifact, way):
    whole = QuambaLMHeadModel.from_pretrained(tiny_artifact)
    expected = {name: t.clone() for name, t in precise(whole)}
    cast = {
        "dtype=": lambda: QuambaLMHeadModel.from_pretrained(tiny_artifact, dtype=torch.float16),
        "half": whole.half,
        "to": lambda: whole.to(torch.float16),
        "bfloat16": whole.bfloat16,
    }[way]()
    assert cast.backbone.embedding.weight.dtype in (torch.float16, torch.bfloat16)
    assert cast.backbone.layers[0].norm.weight.dtype in (torch.float16, torch.bfloat16)
    found = dict(precise(cast))
    assert len(found) == 2 * (3 + len(QUANTIZED) + len(STATIC_SITES))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32, name
        assert torch.equal(tensor, expected[name]), name
    assert torch.isfinite(logits_of(cast)).all()


def test_quantizing_with_a_dtype_stores_float_parts_in_it_and_precise_ones_in_float32(tiny, calibration_ids, tmp_path):
    quamba.quantize(str(tiny()), out=tmp_path / "half", calibration=calibration_ids, dtype="float16")
    tensors = stored(tmp_path / "half")
    half = {name for name, t in tensors.items() if t.dtype == torch.float16}
    blocks = {f"backbone.layers.{i}.{name}" for i in range(2) for name in ("norm.weight", "mixer.conv1d.bias")}
    assert half == blocks | {"backbone.embedding.weight", "backbone.norm_f.weight"}
    assert {t.dtype for name, t in tensors.items() if name not in half} == {torch.int8, torch.float32}


def test_tensors_of_whole_cache_lines_lie_on_them_also_in_memory(tiny_artifact):
    for file in tiny_artifact.glob("*.safetensors"):
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert length % 64 == 0
        for name, entry in json.loads(file.read_bytes()[8:length]).items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                assert (end - start) % 64 or start % 64 == 0, name
    model = QuambaLMHeadModel.from_pretrained(tiny_artifact)
    held = [t for t in (*model.parameters(), *model.buffers()) if t.nbytes % 64 == 0]
    assert len(held) > 10 and all(t.data_ptr() % 64 == 0 for t in held)


def test_shards_name_format_version_and_digest(tiny_artifact):
    digests = set()
    for file in tiny_artifact.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        assert metadata["quamba_format_version"] == "1"
        digests.add(metadata["quamba_digest"])
    (digest,) = digests
    assert len(digest) == 64


TAMPERED = {
    "another bit width": lambda c: c["quantization_config"]["blocks"][0]["weights"].pop("dt_proj"),
    "another axis": lambda c: c["quantization_config"]["blocks"][1]["sites"]["z"].update(axis="tensor"),
    "another rotation": lambda c: c["quantization_config"]["blocks"][0]["rotations"].clear(),
    "another eps": lambda c: c.update(layer_norm_epsilon=1e-6),
    "another dtype": lambda c: c.update(dtype="float16"),
    "another residual": lambda c: c.update(residual_in_fp32=False),
    "untied": lambda c: c.update(tie_word_embeddings=False),
    "another vocabulary": lambda c: c.update(vocab_size=4104),
    "another state": lambda c: c["blocks"][0]["args"].update(state_size=8),
    "float": lambda c: c.pop("quantization_config"),
}


@pytest.mark.parametrize("edit", TAMPERED.values(), ids=TAMPERED.keys())
def test_an_edited_config_is_refused(copy, edit):
    edit_config(copy, edit)
    with pytest.raises(CheckpointError, match=r"was not written for this config\.json"):
        QuambaLMHeadModel.from_pretrained(copy)


REFUSED = {
    "newer format": (lambda c: c["quantization_config"].update(format_version=2), "format version 2.*upgrade"),
    "another method": (lambda c: c["quantization_config"].update(quant_method="gptq"), "gptq"),
    "unknown key": (lambda c: c["quantization_config"].update(embeding={}), "embeding.*did you mean 'embedding'"),
    "unknown site": (lambda c: c["quantization_config"]["blocks"][0]["sites"].update(y={"bits": 16}), "site.*'y'"),
    "impossible bits": (lambda c: c["quantization_config"]["lm_head"].update(bits=5), "bits.*5"),
    "a block less": (lambda c: c["quantization_config"]["blocks"].pop(), "1 blocks"),
    "plan is a list": (lambda c: c.update(quantization_config=[1]), "quantization_config|can't be understood"),
    "layers disagree": (lambda c: c.update(num_hidden_layers=7), "num_hidden_layers is 7"),
    "blocks is a number": (lambda c: c.update(blocks=3), "can't be understood"),
    "a block is a number": (lambda c: c.update(blocks=[3, 3]), "config.json"),
    "another mixer": (lambda c: c["blocks"][0].update(mixer="mamba9"), "was not written for this"),
    "no layers": (lambda c: c.update(blocks=[], num_hidden_layers=0), "layers|blocks"),
    "unknown dtype": (lambda c: c.update(dtype="int8"), "dtype"),
}


@pytest.mark.parametrize(("edit", "why"), REFUSED.values(), ids=REFUSED.keys())
def test_an_impossible_config_is_refused_in_one_line(copy, edit, why):
    edit_config(copy, edit)
    with pytest.raises(QuambaError, match=why) as caught:
        QuambaLMHeadModel.from_pretrained(copy)
    assert "\n" not in str(caught.value)


def test_a_shard_of_another_plan_is_refused(tiny_folder, copy, calibration_ids, tmp_path):
    other = tmp_path / "other.yaml"
    text = (quamba.recipe.configs_dir() / "mamba1-w8a8.yaml").read_text()
    other.write_text(text.replace("rotate: [out_proj]", "rotate: []"))
    quamba.quantize(str(tiny_folder), str(other), out=tmp_path / "other", calibration=calibration_ids)
    shutil.copy(tmp_path / "other" / "block-00001.safetensors", copy)
    with pytest.raises(CheckpointError, match=r"block-00001\.safetensors was not written for this config\.json"):
        QuambaLMHeadModel.from_pretrained(copy)


def rewrite(path, change, **metadata):
    with safe_open(path, framework="pt") as handle:
        kept = handle.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=kept | metadata)


DAMAGED = {
    "a scale is missing": (lambda t: t.pop("backbone.layers.0.scales.x"), "missing: backbone.layers.0.scales.x"),
    "a scale has another dtype": (
        lambda t: t.update({"backbone.layers.0.scales.x": t["backbone.layers.0.scales.x"].half()}),
        "scales.x is stored as torch.float16; expected torch.float32",
    ),
    "a float copy of a weight": (
        lambda t: t.update({"backbone.layers.0.mixer.in_proj.weight": torch.zeros(128, 32)}),
        "in_proj.weight is stored as torch.float32; expected torch.int8",
    ),
    "an extra tensor": (lambda t: t.update(extra=torch.zeros(1)), "1 tensor is not of this architecture: extra"),
    "a shape": (lambda t: t.update({"backbone.layers.0.mixer.D": torch.zeros(63)}), r"mixer.D has shape \[63\]"),
    "an infinite scale": (
        lambda t: t.update({"backbone.layers.0.scales.z": torch.full((64,), torch.inf)}),
        "scales.z holds NaN or infinite",
    ),
}


@pytest.mark.parametrize(("change", "why"), DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_shard_is_refused(copy, change, why):
    rewrite(copy / "block-00000.safetensors", change)
    with pytest.raises(CheckpointError, match=why):
        QuambaLMHeadModel.from_pretrained(copy)


def test_group_scales_that_int8_products_cant_take_are_refused(tiny, calibration_ids, tmp_path):
    quamba.quantize(QuambaLMHeadModel.from_pretrained(tiny()), "w4a8", calibration=calibration_ids).save_pretrained(
        tmp_path
    )
    name = "backbone.layers.0.mixer.in_proj.weight_group_scale"
    rewrite(tmp_path / "block-00000.safetensors", lambda t: t[name].view(-1)[3:4].fill_(-16))
    with pytest.raises(CheckpointError, match=rf"{name} holds -16 to \d+; at most 15"):
        QuambaLMHeadModel.from_pretrained(tmp_path)


def test_a_shard_of_another_format_or_without_metadata_is_refused(copy):
    rewrite(copy / "head.safetensors", lambda t: None, quamba_format_version="2")
    with pytest.raises(CheckpointError, match=r"head\.safetensors has format '2', not 1"):
        QuambaLMHeadModel.from_pretrained(copy)
    save_file(load_file(copy / "head.safetensors"), copy / "head.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.safetensors has format None"):
        QuambaLMHeadModel.from_pretrained(copy)


@pytest.mark.parametrize("name", ["block-00001.safetensors", "head.safetensors", "config.json"])
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        QuambaLMHeadModel.from_pretrained(copy)


def test_an_unfinished_run_never_loads(copy, tmp_path):
    (copy / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not finished: run the same command to resume"):
        open_checkpoint(str(copy))


def test_saving_over_an_artifact_leaves_no_moment_that_loads_wrongly(copy, tiny, monkeypatch):
    model = QuambaLMHeadModel.from_pretrained(tiny(layers=1))

    def fail(self, shard, tensors):
        raise KeyboardInterrupt

    monkeypatch.setattr("quamba.formats.artifact.ArtifactWriter.write", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(copy)
    assert not is_artifact(copy)
    monkeypatch.undo()
    model.save_pretrained(copy)
    assert torch.equal(logits_of(QuambaLMHeadModel.from_pretrained(copy)), logits_of(model))
