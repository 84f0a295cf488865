"""What isn't a slip of one config key: shards, mixed dtypes, Codestral, FalconMamba, and models in memory."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import types
from dataclasses import dataclass, field, make_dataclass

import pytest
import torch

import quamba
from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError, QuambaError
from quamba.formats import checkpoint_of, open_checkpoint
from tests.quamba.formats.foreign import EMBEDDING, HEAD, IDS, files_of, theirs, truth, write
from tests.quamba.formats.test_repairs import check, prefixed, told


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layout", ["transformers", "mamba_ssm"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_shards(tmp_path, caplog, kind, layout, file):
    if (kind, layout) == ("falcon_mamba", "mamba_ssm"):
        layout = "transformers"
    config, tensors = files_of(kind, layout)
    folder = write(tmp_path / "shards", config, tensors, file, shards=4)
    assert len(list(folder.iterdir())) == 6
    check(folder, truth(kind)[1], caplog, [])
    # With a prefix in every shard: one repair, not one a shard.
    prefixed("module.")(config, tensors)
    check(
        write(tmp_path / "wrapped", config, tensors, file, shards=4), truth(kind)[1], caplog, ["begin with 'module.'"]
    )


@pytest.mark.parametrize("way", ["state_dict", "old", "tied"])
def test_other_ways_to_write_a_bin(tmp_path, caplog, way):
    config, tensors = files_of("mamba", "mamba_ssm")
    folder = write(tmp_path / "bin", config, tensors, "pytorch_model.bin")
    file = folder / "pytorch_model.bin"
    if way == "state_dict":
        torch.save({"state_dict": tensors, "step": 3}, file)
    elif way == "old":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
    else:  # as mamba-ssm writes it: the head is the embedding's storage again
        torch.save(tensors | {HEAD: tensors[EMBEDDING]}, file)
    check(folder, truth("mamba")[1], caplog, [])


def test_a_wider_head_and_blocks_of_two_dtypes(tmp_path, caplog):
    """Nothing is rounded: all is held in float32, which holds every value."""
    config, tensors = files_of("mamba", "transformers", tie_word_embeddings=False)
    stored = {
        name: t if name == HEAD else t.bfloat16() if ".layers.0." in name else t.half() for name, t in tensors.items()
    }
    reference = theirs("mamba", tie_word_embeddings=False)
    reference.load_state_dict({name: t.float() for name, t in stored.items()})
    folder = write(tmp_path / "mixed", config, stored)
    what = "tensors are stored as bfloat16, float16, float32; all are held in float32"
    model = check(folder, reference(IDS).logits, caplog, [what], [HEAD])
    assert model.dtype == torch.float32
    with pytest.raises(QuambaError, match="float32, float16, bfloat16 or auto"):
        QuambaLMHeadModel.from_pretrained(folder, dtype="float8_e5m2")
    assert QuambaLMHeadModel.from_pretrained(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_a_tied_head_in_another_dtype(tmp_path, caplog):
    """The same values in float32 and bfloat16 are one matrix; rounded ones are two."""
    config, tensors = files_of("mamba", "mamba_ssm")
    tensors = {name: t.bfloat16() for name, t in tensors.items()}
    reference = theirs("mamba")
    reference.load_state_dict(
        {n.replace("embedding.", "embeddings."): t.float() for n, t in tensors.items()}, strict=False
    )
    tensors[HEAD] = tensors[EMBEDDING].float()
    model = QuambaLMHeadModel.from_pretrained(write(tmp_path / "same", config, tensors), strict=True)
    assert model.config.tie_word_embeddings and model.dtype == torch.bfloat16
    torch.testing.assert_close(model.float()(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)
    tensors[HEAD] = tensors[HEAD] * 1.001
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        open_checkpoint(str(write(tmp_path / "other", config, tensors)))


def test_what_is_rounded_is_told(tmp_path, caplog):
    config, tensors = files_of("mamba2", "transformers")
    stored = {name: t if "norm" in name or "A_log" in name else t.bfloat16() for name, t in tensors.items()}
    folder, norms = write(tmp_path / "norms", config, stored), [name for name in tensors if "norm" in name]
    model = check(folder, None, caplog, ["float32 is rounded to bfloat16"], norms, close=False)
    assert model.dtype == torch.bfloat16
    mixer = model.backbone.layers[1].mixer
    assert torch.equal(mixer.A_log, tensors["backbone.layers.1.mixer.A_log"])
    # The matrices' dtype is the default: in float32 nothing of it is lost.
    exact = QuambaLMHeadModel.from_pretrained(folder, dtype="float32")
    assert torch.equal(exact.backbone.norm_f.weight, tensors["backbone.norm_f.weight"])
    stored = {name: t.double() for name, t in tensors.items()}
    check(write(tmp_path / "double", config, stored), truth("mamba2")[1], caplog, ["float64 is rounded to float32"])


CODESTRAL = {"dim": 32, "n_layers": 2, "vocab_size": 64, "n_groups": 8, "rms_norm": True, "residual_in_fp32": True}
CODESTRAL |= {"fused_add_norm": True, "pad_vocab_size_multiple": 1, "tie_embeddings": False, "model_type": "mamba"}
GROUPS = {"n_groups": 8, "num_heads": 8, "head_dim": 8, "tie_word_embeddings": False}


def codestral(tmp_path, prefix="model.", **changes):
    """As Mistral writes it; `head_dim` and `state_size` stay 64 and 128 there, and are too much for a test."""
    _, tensors = files_of("mamba2", "mamba_ssm", **GROUPS)
    prefixed(prefix)(None, tensors)
    config = CODESTRAL | changes
    config = {key: value for key, value in config.items() if value is not ...}
    return write(tmp_path / "codestral", config, tensors, "consolidated.safetensors", name="params.json")


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("less", [(), ("model_type", "rms_norm", "residual_in_fp32", "fused_add_norm")])
def test_codestral(tmp_path, caplog, prefix, less):
    folder = codestral(tmp_path, prefix, **dict.fromkeys(less, ...))
    unusual = [
        "headdim; mixer.dt_bias shows 8, not the usual 64",
        "d_state; mixer.conv1d.weight shows 16, not the usual 128",
    ]
    model = check(folder, truth("mamba2", **GROUPS)[1], caplog, unusual)
    assert not model.config.tie_word_embeddings
    args = model.config.blocks[1]["args"]
    assert (args["n_groups"], args["norm_groups"], args["state_size"]) == (8, 8, 16)
    assert open_checkpoint(str(folder)).layout == "mamba_ssm"


def test_codestral_as_its_repository_has_it(tmp_path, caplog):
    """transformers' config and shards beside Mistral's: one of them is read, whole."""
    config, tensors = files_of("mamba2", "transformers", **GROUPS)
    folder = codestral(tmp_path)
    write(folder, config, tensors, shards=2)
    check(folder, truth("mamba2", **GROUPS)[1], caplog, [])
    assert open_checkpoint(str(folder)).layout == "transformers"
    for file in folder.glob("model*"):
        file.unlink()
    check(folder, truth("mamba2", **GROUPS)[1], caplog, ["names begin with 'model.'"])


def test_codestral_with_wrong_groups(tmp_path):
    folder = codestral(tmp_path, n_groups=3)
    with pytest.raises(
        CheckpointError, match=r"params.json: config and tensors .* 3 groups of .*groups \* states = 128"
    ):
        open_checkpoint(str(folder))


CALIBRATION = torch.randint(0, 60, (64, 16), generator=torch.Generator().manual_seed(7))
LIVE = {
    "mamba": {},
    "mamba2": {},
    "falcon_mamba": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize(("kind", "overrides"), LIVE.items())
@pytest.mark.parametrize("wrapped", [False, True])
def test_live_models_of_transformers(tmp_path, caplog, kind, overrides, wrapped):
    model, logits = truth(kind, **overrides)
    checkpoint = checkpoint_of(torch.compile(model) if wrapped else model)
    assert [repair.what for repair in checkpoint.repairs.found] == (
        ["names begin with '_orig_mod.', which is left out"] if wrapped else []
    )
    from quamba.formats.load import build

    torch.testing.assert_close(build(checkpoint)(IDS).logits, logits, rtol=1e-5, atol=1e-5)


def distance(model, reference):
    """KL divergence in nats, mean over tokens."""
    a, b = reference(IDS).logits.double().log_softmax(-1), model(IDS).logits.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_quantized_from_a_folder_and_from_memory(tmp_path, kind, recipe):
    model, _ = truth(kind)
    folder = write(tmp_path / "float", *files_of(kind, "transformers"))
    first = quamba.quantize(str(folder), recipe, calibration=CALIBRATION, out=tmp_path / "a")
    second = quamba.quantize(model, recipe, calibration=CALIBRATION, out=tmp_path / "b")
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    assert 0 < distance(first, model) < (0.02 if recipe == "w8a8" else 0.3)
    args = first.config.blocks[0]["args"]
    assert args.get("norm_epsilon") == {"mamba": None, "mamba2": 1e-5, "falcon_mamba": 1e-6}[kind]


def test_falcon_and_the_published_recipe(tmp_path):
    """Its norms of B, C and dt stand where the recipe has int8: refused in one sentence, before any work."""
    folder = write(tmp_path / "falcon", *files_of("falcon_mamba", "transformers"))
    with pytest.raises(QuambaError) as refused:
        quamba.quantize(str(folder), "quamba1-w8a8", calibration=CALIBRATION, out=tmp_path / "out")
    assert "FalconMamba" in str(refused.value) and "quamba1-w8a8" in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["falcon"]


@dataclass
class StandInConfig:
    """mamba-ssm's `MambaConfig`."""

    d_model: int = 32
    d_intermediate: int = 0
    n_layer: int = 2
    vocab_size: int = 61
    ssm_cfg: dict = field(default_factory=dict)
    attn_layer_idx: list = field(default_factory=list)
    attn_cfg: dict = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


class MambaLMHeadModel(torch.nn.Module):
    """As much of mamba-ssm's as is read: its config and its state dict, in which a tied head stands too."""

    def __init__(self, config, tensors):
        super().__init__()
        self.config, self.tensors = config, tensors
        self.parameter = torch.nn.Parameter(torch.zeros(1))

    def state_dict(self):
        return self.tensors | {HEAD: self.tensors.get(HEAD, self.tensors[EMBEDDING])}


@pytest.mark.parametrize(("kind", "overrides"), [("mamba", {}), ("mamba2", {"tie_word_embeddings": False})])
def test_a_live_model_like_mamba_ssm(tmp_path, caplog, kind, overrides):
    config, tensors = files_of(kind, "mamba_ssm", **overrides)
    live = MambaLMHeadModel(StandInConfig(ssm_cfg=config["ssm_cfg"], tie_embeddings=config["tie_embeddings"]), tensors)
    from quamba.formats.load import build

    checkpoint = checkpoint_of(live)
    assert (checkpoint.layout, checkpoint.repairs.found) == ("mamba_ssm", [])
    assert checkpoint.location.name == "MambaLMHeadModel"
    reference, logits = truth(kind, **overrides)
    torch.testing.assert_close(build(checkpoint)(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    small = quamba.quantize(live, "w8a8", calibration=CALIBRATION, out=tmp_path / "out")
    assert 0 < distance(small, reference) < 0.02
    # A fork's config with a key that no reader knows, and a wrong one: told once while quantizing.
    fork = make_dataclass("Fork", [("sparsity", float, 0.5), ("hidden_size", int, 48)], bases=(StandInConfig,))
    live.config = fork(ssm_cfg=config["ssm_cfg"], tie_embeddings=config["tie_embeddings"])
    with caplog.at_level(logging.INFO, "quamba"):
        quamba.quantize(live, "w8a8", calibration=CALIBRATION, out=tmp_path / "again")
    (message,) = told(caplog)
    assert "d_model = 32 and hidden_size = 48" in message and "config.json" not in message


@pytest.fixture
def mamba_ssm(monkeypatch):
    """mamba-ssm's model classes, which need no CUDA to be made."""
    if importlib.util.find_spec("mamba_ssm") is None:
        pytest.skip("mamba-ssm is not installed")
    if importlib.util.find_spec("selective_scan_cuda") is None:
        monkeypatch.setitem(sys.modules, "selective_scan_cuda", types.ModuleType("selective_scan_cuda"))
    try:
        from mamba_ssm.models import config_mamba, mixer_seq_simple
    except ImportError as error:
        pytest.skip(f"mamba-ssm can't be imported: {error}")
    return config_mamba.MambaConfig, mixer_seq_simple.MambaLMHeadModel


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_live_models_of_mamba_ssm(tmp_path, mamba_ssm, kind, tied):
    from quamba.formats.load import build

    make_config, make_model = mamba_ssm
    config, tensors = files_of(kind, "mamba_ssm", tie_word_embeddings=tied)
    model = make_model(make_config(**config), device="cpu")
    model.load_state_dict(tensors | {HEAD: tensors.get(HEAD, tensors[EMBEDDING])}, strict=True)
    checkpoint = checkpoint_of(model)
    assert (checkpoint.layout, checkpoint.repairs.found) == ("mamba_ssm", [])
    logits = truth(kind, tie_word_embeddings=tied)[1]
    torch.testing.assert_close(build(checkpoint)(IDS).logits, logits, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")  # what its users have on disk
    loaded = QuambaLMHeadModel.from_pretrained(tmp_path / "saved", strict=True)
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), 3, None, types.SimpleNamespace(config=json)])
def test_other_objects(model):
    with pytest.raises(
        CheckpointError, match=f"can't quantize a {type(model).__name__}: give a name, a folder, or a live"
    ):
        quamba.quantize(model, "w8a8", calibration=CALIBRATION)
