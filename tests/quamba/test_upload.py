"""Artifacts uploaded to a hub on this machine and loaded from it again; the card that they get there.

Once in a process of its own, as a user would: huggingface_hub reads its endpoint when it is imported.
"""

from __future__ import annotations

import json
import socket

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open

import quamba
from tests.conftest import write_checkpoint
from tests.stub_hub import hub_environment, stub_hub, use_hub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A float model with a card that names its licence, and the licence's text."""
    folder = write_checkpoint(
        tmp_path_factory.mktemp("base") / "tiny-mamba", files="safetensors", tokenizer=True, layers=3
    )
    front = "license: other\nlicense_name: tiny-1.0\nlicense_link: https://example.org/tiny\nlanguage: en"
    (folder / "README.md").write_text(f"---\n{front}\n---\n# Tiny\n")
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "private-notes.txt").write_text("not to be passed on\n")
    return folder


@pytest.fixture(scope="module")
def artifact(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("artifact") / "tiny-mamba-w8a8"
    quamba.quantize(str(base), "w8a8", out=out, samples=2, seq_len=16)
    return out


UPLOAD = """
import quamba, torch, pathlib
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
ids = torch.arange(1, 20)[None]
model = quamba.QuambaLMHeadModel.from_pretrained({artifact!r})
info = model.push_to_hub("me/tiny-w8a8", tags=["test"], token="secret")
print(info.commit_url)
again = AutoModelForCausalLM.from_pretrained("me/tiny-w8a8")
assert isinstance(again, quamba.QuambaLMHeadModel) and torch.equal(again(ids).logits, model(ids).logits)
assert AutoConfig.from_pretrained("me/tiny-w8a8").plan == model.config.plan
tokenizer = AutoTokenizer.from_pretrained("me/tiny-w8a8")
assert tokenizer.padding_side == "left"
write = pipeline("text-generation", model="me/tiny-w8a8")
text = write("The old man", max_new_tokens=3, do_sample=False)[0]["generated_text"]
out = model.generate(**tokenizer("The old man", return_tensors="pt"), max_new_tokens=3, do_sample=False)
assert text == tokenizer.decode(out[0], skip_special_tokens=True)
# The same repository gets a shallower model, on a branch of its own name.
config = quamba.QuambaConfig.from_dict(model.config.to_dict() | {{"blocks": model.config.blocks[:1],
    "num_hidden_layers": 1, "quantization_config": None}})
small = quamba.QuambaLMHeadModel(config)
small.push_to_hub("me/tiny-w8a8", revision="small", commit_message="Shallower", token="secret")
small.save_pretrained({folder!r}, push_to_hub=True, repo_id="me/small", token="secret", tokenizer=tokenizer)
"""


def test_upload_and_download(artifact, tmp_path, forks):
    repositories, requests = {}, []
    (tmp_path / "hub").mkdir()
    with stub_hub(repositories, requests, uploads=tmp_path / "hub", token="secret") as endpoint:
        folder = str(tmp_path / "small")
        script = UPLOAD.format(artifact=str(artifact), folder=folder)
        done = forks.run("-c", script, env=hub_environment(endpoint, tmp_path / "home"))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{endpoint}/me/tiny-w8a8/commit/")
    assert set(repositories) == {"me/tiny-w8a8", "me/small"}
    assert "MESSAGE Upload a model quantized with quamba" in requests and "MESSAGE Shallower" in requests
    assert "POST api/models/me/tiny-w8a8/branch/small" in requests
    assert "POST api/models/me/tiny-w8a8/commit/small" in requests
    there = {path.name for path in repositories["me/tiny-w8a8"].iterdir()}
    assert there == {
        *("README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors.index.json"),
        *("embedding.safetensors", "block-00000.safetensors", "head.safetensors"),  # of three blocks one is left
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert {path.name for path in repositories["me/small"].iterdir()} >= {"tokenizer.json", "README.md"}


def test_a_card_that_somebody_wrote_stays(artifact, tmp_path, monkeypatch):
    repositories = {"me/mine": tmp_path / "mine"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("---\nlibrary_name: other\n---\nMy own words.\n")
    with stub_hub(repositories, [], uploads=tmp_path) as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        quamba.QuambaLMHeadModel.from_pretrained(artifact).push_to_hub("me/mine")
    assert (tmp_path / "mine/README.md").read_text().endswith("My own words.\n")
    assert (tmp_path / "mine/config.json").is_file()


def test_what_the_hub_refuses(artifact, tmp_path, monkeypatch):
    model = quamba.QuambaLMHeadModel.from_pretrained(artifact)
    with stub_hub({}, [], uploads=tmp_path, token="secret") as endpoint:
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        for arguments in ({}, {"token": "wrong"}):
            with pytest.raises(
                quamba.QuambaError, match=r"the hub refused me/tiny \(.*401.*log in with `hf auth login`"
            ):
                model.push_to_hub("me/tiny", **arguments)
        with pytest.raises(quamba.QuambaError, match="could not be uploaded: HFValidationError"):
            model.push_to_hub("me/ti ny", token="secret")
        with pytest.raises(TypeError, match=r"push_to_hub doesn.t know private_repo"):
            model.push_to_hub("me/tiny", private_repo=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        use_hub(monkeypatch, f"http://127.0.0.1:{probe.getsockname()[1]}", tmp_path / "home")
    with pytest.raises(quamba.QuambaError, match="me/tiny could not be uploaded: "):
        model.push_to_hub("me/tiny")


def test_the_card_of_an_artifact(base, artifact):
    text = (artifact / "README.md").read_text()
    card = ModelCard.load(artifact / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["license_name"], data["license_link"]) == (
        "other",
        "tiny-1.0",
        "https://example.org/tiny",
    )
    assert data["library_name"] == "quamba" and data["pipeline_tag"] == "text-generation"
    assert set(data["tags"]) == {"quamba", "mamba1", "quantized", "w8a8"}
    assert "base_model" not in data  # a folder's name is no id of the hub
    assert "# tiny-mamba, quantized with recipe `w8a8`" in text
    assert "| base model | `tiny-mamba` |" in text
    assert "| calibration | 2 windows of 16 tokens of `bundled`, seed 0 |" in text
    total = 0
    for file in artifact.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            total += sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    assert f"| size | {total / 1e6:,.2f} MB (float32: " in text and " bits a weight in the blocks, " in text
    assert "import quamba" in text and 'AutoModelForCausalLM.from_pretrained("path/to/this/folder")' in text
    assert "That of `tiny-mamba`: [tiny-1.0](https://example.org/tiny)." in text
    assert (artifact / "LICENSE").read_text() == "Do what you like.\n"
    assert not (artifact / "private-notes.txt").exists()
    assert str(base.parent) not in text and "Nothing yet" in text


def test_a_saved_model_keeps_its_card_as_long_as_it_is_the_same_model(artifact, tmp_path):
    words = (artifact / "README.md").read_text()
    model = quamba.QuambaLMHeadModel.from_pretrained(artifact)
    model.save_pretrained(tmp_path / "same")
    assert (tmp_path / "same/README.md").read_text() == words
    names = {path.name for path in artifact.iterdir()}
    assert {path.name for path in (tmp_path / "same").iterdir()} == names | {"generation_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE"):
        assert (tmp_path / "same" / name).read_bytes() == (artifact / name).read_bytes()
    model.half().save_pretrained(tmp_path / "half", tags=["mine"])
    card = ModelCard.load(tmp_path / "half/README.md")
    assert "float parts float16" in card.text and "quantized with recipe `w8a8`" in card.text
    assert card.data.license_name == "tiny-1.0" and "mine" in card.data.tags
    before = {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()}
    quamba.QuambaLMHeadModel.from_pretrained(tmp_path / "same").save_pretrained(tmp_path / "same")  # onto itself
    assert {path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()} == before


def test_the_base_model_is_named_by_its_id(tmp_path, tiny, calibration_ids):
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(tiny(layout="transformers"))
    live.name_or_path = live.config._name_or_path = "state-spaces/mamba-nothing-hf"
    quamba.quantize(live, "w4a16", out=tmp_path / "out", calibration=calibration_ids)
    data = ModelCard.load(tmp_path / "out/README.md").data.to_dict()
    assert data["base_model"] == "state-spaces/mamba-nothing-hf" and data["base_model_relation"] == "quantized"
    assert "license" not in data
    text = (tmp_path / "out/README.md").read_text()
    assert "[state-spaces/mamba-nothing-hf](https://huggingface.co/state-spaces/mamba-nothing-hf)" in text
    assert "whose files don't name one" in text


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"safe_serialization": False}, quamba.QuambaError, "only safetensors are written"),
        ({"save_function": print}, TypeError, "save_pretrained doesn't know save_function"),
        ({"state_dict": {}}, quamba.QuambaError, "state_dict is not this model's"),
        ({"tokenizer": "no/such/folder/here"}, quamba.QuambaError, "no tokenizer for no/such/folder/here"),
    ],
)
def test_save_pretrained_says_what_it_cannot_do(artifact, tmp_path, arguments, error, said):
    model = quamba.QuambaLMHeadModel.from_pretrained(artifact)
    with pytest.raises(error, match=said):
        model.save_pretrained(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_save_pretrained_takes_a_state_dict(artifact, tmp_path):
    model = quamba.QuambaLMHeadModel.from_pretrained(artifact)
    model.save_pretrained(tmp_path / "a", max_shard_size="1MB")
    changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed["backbone.norm_f.weight"] += 1
    model.save_pretrained(tmp_path / "b", state_dict=changed)
    model.save_pretrained(tmp_path / "c", is_main_process=False)
    assert not (tmp_path / "c").exists()
    a, b = (quamba.QuambaLMHeadModel.from_pretrained(tmp_path / name).backbone.norm_f.weight for name in "ab")
    torch.testing.assert_close(b, a + 1)
    assert json.loads((tmp_path / "a/generation_config.json").read_text())
