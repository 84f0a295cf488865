"""Every layout of the same weights gives the same model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quamba import QuambaLMHeadModel
from quamba.formats import open_checkpoint
from tests.conftest import Shape, random_tensors, transformers_model

ODD = {
    "plain": {},
    "conv bias off": {"conv_bias": False},
    "linear bias on": {"bias": True},
    "d_state 8": {"d_state": 8},
    "d_state 32": {"d_state": 32},
    "expand 3": {"expand": 3},
    "conv width 3": {"conv": 3},
    "odd vocabulary, padded to 72": {"vocab": 65},
    "odd vocabulary, unpadded": {"vocab": 61, "pad": 1},
    "untied head": {"tied": False},
    "dt_rank given": {"dt_rank": 5},
    "hidden no multiple of 16": {"hidden": 24},
    "all odd": {"conv_bias": False, "bias": True, "d_state": 8, "expand": 3, "conv": 3, "tied": False, "dt_rank": 7},
}
WAYS = {
    "bin": {"files": "bin"},
    "safetensors": {"files": "safetensors"},
    "sharded bin": {"files": "bin", "shards": 3},
    "sharded safetensors": {"files": "safetensors", "shards": 3},
    "transformers": {"layout": "transformers"},
    "sharded transformers": {"layout": "transformers", "shards": 3},
}


def logits_of(folder, ids):
    return QuambaLMHeadModel.from_pretrained(folder)(ids).logits


@pytest.mark.parametrize("shape", ODD.values(), ids=ODD.keys())
def test_all_ways_to_store_a_model_load_to_the_same_logits(tiny, shape):
    wanted = Shape(**shape)
    ids = torch.randint(0, wanted.rows, (2, 9), generator=torch.Generator().manual_seed(3))
    truth = transformers_model(wanted, random_tensors(wanted))(ids).logits
    assert truth.std() > 0.3
    first = None
    for name, way in WAYS.items():
        folder = tiny(name, **way, **shape)
        assert ("index.json" in " ".join(p.name for p in folder.iterdir())) == ("sharded" in name)
        logits = logits_of(folder, ids)
        torch.testing.assert_close(logits, truth, rtol=1e-5, atol=1e-5)
        first = logits if first is None else first
        assert torch.equal(logits, first), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["mamba_ssm", "transformers"])
def test_the_source_dtype_is_kept(tiny, dtype, layout):
    folder = tiny(layout=layout, dtype=dtype)
    stored = random_tensors(Shape())
    model = QuambaLMHeadModel.from_pretrained(folder)
    assert model.config.dtype == model.dtype == dtype
    mixer = model.backbone.layers[1].mixer
    assert torch.equal(mixer.in_proj.weight, stored["backbone.layers.1.mixer.in_proj.weight"].to(dtype))
    # Precise tensors are float32 in memory, with the values that were stored.
    assert mixer.A_log.dtype == torch.float32
    assert torch.equal(mixer.A_log, stored["backbone.layers.1.mixer.A_log"].to(dtype).float())


def test_names_and_architecture_are_read_from_headers_only(tiny, monkeypatch):
    folder = tiny(files="safetensors", conv_bias=False, dt_rank=3)

    def refuse(*args, **kwargs):
        raise AssertionError("read tensor bytes")

    monkeypatch.setattr("quamba.formats.tensors.TensorFiles.read", refuse)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.layout == "mamba_ssm"
    assert not checkpoint.quantized
    assert checkpoint.config.blocks[1]["args"] == {
        "intermediate_size": 64,
        "state_size": 16,
        "conv_kernel": 4,
        "time_step_rank": 3,
        "use_bias": False,
        "use_conv_bias": False,
    }
    tensors = random_tensors(Shape(conv_bias=False, dt_rank=3))
    del tensors["lm_head.weight"]
    assert checkpoint.files.nbytes == sum(t.nbytes for t in tensors.values())


def test_safetensors_win_over_bin(tiny):
    folder = tiny(files="safetensors")
    tiny(files="bin", seed=1)  # the same folder: another model beside it
    ids = torch.arange(8)[None]
    expected = transformers_model(Shape(), random_tensors(Shape(), seed=0))(ids).logits
    torch.testing.assert_close(logits_of(folder, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_tied_config_accepts_an_equal_copy_of_the_head(tiny):
    folder = tiny(files="safetensors")
    plain = load_file(folder / "model.safetensors")
    save_file(plain | {"lm_head.weight": plain["backbone.embedding.weight"].clone()}, folder / "model.safetensors")
    model = QuambaLMHeadModel.from_pretrained(folder)
    assert model.lm_head.weight is model.backbone.embedding.weight


def test_old_mamba_ssm_configs_without_the_later_keys(tiny):
    folder = tiny(files="bin")
    old = {"d_model": 32, "n_layer": 2, "vocab_size": 64, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True}
    (folder / "config.json").write_text(json.dumps(old))
    ids = torch.arange(8)[None]
    expected = transformers_model(Shape(), random_tensors(Shape()))(ids).logits
    torch.testing.assert_close(logits_of(folder, ids), expected, rtol=1e-5, atol=1e-5)
    assert open_checkpoint(str(folder)).config.tie_word_embeddings


def test_the_same_names_by_folder_and_by_relative_path(tiny, monkeypatch):
    folder = tiny("some-model")
    monkeypatch.chdir(folder.parent)
    for way in ("some-model", "./some-model", "some-model/", str(folder)):
        assert open_checkpoint(way).location.name == "some-model"
    monkeypatch.chdir(folder)
    assert open_checkpoint(".").location.name == "some-model"


def test_bundled_names():
    checkpoint = open_checkpoint("mamba1-nano")
    assert (checkpoint.layout, checkpoint.location.name) == ("transformers", "mamba1-nano")
    assert checkpoint.config.dtype == torch.float16
    assert len(checkpoint.config.blocks) == 8
