"""What real folders of float models lost, kept or forgot to say."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from quamba import QuambaLMHeadModel
from quamba.doctor import diagnose
from quamba.doctor import run as doctor_run
from quamba.errors import CheckpointError
from quamba.formats import open_checkpoint
from tests.quamba.formats.foreign import IDS, files_of, truth, write

BIAS, NORM = "backbone.layers.1.mixer.conv1d.bias", "backbone.layers.1.mixer.norm.weight"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("kind", "layout", "name"),
    [(kind, layout, BIAS) for kind in ("mamba", "mamba2") for layout in ("mamba_ssm", "transformers")]
    + [("mamba2", "mamba_ssm", NORM)],
)
def test_a_lost_tensor_is_not_taken_for_a_model_without(tmp_path, kind, layout, name, strict):
    config, tensors = files_of(kind, layout)
    for key in ("use_conv_bias", "conv_bias", "rmsnorm"):
        config.pop(key, None)
        config.get("ssm_cfg", {}).pop(key, None)
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"1 tensor is missing: {name} .a model without it says"):
        open_checkpoint(str(write(tmp_path / "a", config, tensors)), strict=strict)


def test_float8_is_refused_by_name(tmp_path):
    config, tensors = files_of("mamba", "mamba_ssm")
    name = "backbone.layers.0.mixer.in_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    folder = write(tmp_path / "a", config, tensors)
    with pytest.raises(
        CheckpointError, match=rf"{name} is stored as torch.float8_e4m3fn, in which nothing here computes"
    ):
        open_checkpoint(str(folder))
    assert diagnose(str(folder)).exit_code == 2


def shard(folder, tensors):
    """The same tensors halved, in two files with an index."""
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] / 2 for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards_left", [True, False])
def test_an_index_left_beside_a_single_file(tmp_path, shards_left):
    """transformers reads the single file, too."""
    from transformers import MambaForCausalLM

    folder = write(tmp_path / "a", *files_of("mamba", "transformers"))
    shard(folder, load_file(folder / "model.safetensors"))
    if not shards_left:
        (folder / "model-1.safetensors").unlink()
    (repair,) = open_checkpoint(str(folder)).repairs.found
    assert "model.safetensors.index.json is left over" in repair.what
    logits = QuambaLMHeadModel.from_pretrained(folder)(IDS).logits
    torch.testing.assert_close(logits, truth("mamba")[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(MambaForCausalLM.from_pretrained(folder)(IDS).logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", [None, "mamba_ssm"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_mamba_ssm_with_a_model_type(tmp_path, kind, model_type):
    config, tensors = files_of(kind, "mamba_ssm")
    folder = write(tmp_path / "a", config | {"model_type": model_type}, tensors)
    torch.testing.assert_close(
        QuambaLMHeadModel.from_pretrained(folder)(IDS).logits, truth(kind)[1], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "name"),
    [("mamba", "MambaForCausalLM"), ("mamba2", "Mamba2ForCausalLM"), ("falcon_mamba", "FalconMambaForCausalLM")],
)
def test_transformers_without_a_model_type(tmp_path, kind, name):
    config, tensors = files_of(kind, "transformers")
    del config["model_type"]
    folder = write(tmp_path / "a", config | {"architectures": [name]}, tensors)
    torch.testing.assert_close(
        QuambaLMHeadModel.from_pretrained(folder)(IDS).logits, truth(kind)[1], rtol=1e-5, atol=1e-5
    )


def test_nan_in_a_tied_embedding_is_called_nan(tmp_path):
    config, tensors = files_of("mamba", "mamba_ssm")
    tensors["backbone.embedding.weight"][3, 3] = float("nan")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    with pytest.raises(CheckpointError, match="head or embedding holds NaN"):
        open_checkpoint(str(write(tmp_path / "a", config, tensors)))


def test_an_unknown_prefix_is_shown(tmp_path):
    config, tensors = files_of("mamba", "mamba_ssm")
    tensors = {f"student.{name}": tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"missing: backbone.embedding.weight \(some names begin with student\)"):
        open_checkpoint(str(write(tmp_path / "a", config, tensors)))


def test_a_full_disk_says_nothing_about_the_model(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    folder = write(tmp_path / "a", *files_of("mamba", "transformers"))
    monkeypatch.setattr(doctor_run.tempfile, "TemporaryDirectory", full)
    found = diagnose(str(folder))
    assert found.verdict == "healthy"
    assert any("save and load wasn't tried" in note.what for note in found.notes)
    assert "save and load" not in [check.name for check in found.checks]


def test_a_surprise_is_a_diagnosis(tmp_path, monkeypatch):
    """Whatever goes wrong while reading: exit code 2, and the JSON is whole."""
    from quamba.formats import checkpoint

    def surprise(*_, **__):
        raise ZeroDivisionError("of a new kind")

    folder = write(tmp_path / "a", *files_of("mamba", "transformers"))
    monkeypatch.setattr(checkpoint, "_check", surprise)
    found = diagnose(str(folder))
    assert found.exit_code == 2
    assert found.to_dict()["broken"][0]["what"] == "reading it ends with ZeroDivisionError: of a new kind"
    shutil.rmtree(folder)
