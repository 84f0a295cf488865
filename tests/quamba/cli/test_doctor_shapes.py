"""`quamba doctor --shapes`: what every route returns, for good models and for models broken in one way each."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
import transformers

import quamba
from quamba.doctor.shapes import ROUTES, try_routes
from tests.quamba import stubs
from tests.quamba.cli.test_doctor import call
from tests.quamba.formats.foreign import files_of, write
from tests.quamba.models import random_model

NAMES = list(ROUTES)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def shapes(*arguments):
    """The JSON; the text says the same, and the exit code fits."""
    with tempfile.TemporaryDirectory() as folder:
        result = call("--shapes", *arguments, "--output", f"{folder}/found.json")
        found = json.loads(Path(folder, "found.json").read_text())
    assert list(route["name"] for route in found["routes"]) == NAMES
    assert result.exit_code == (0 if found["passed"] else 1) == int(not all(r["passed"] for r in found["routes"]))
    assert result.stdout.count("\n  ok: ") == sum(route["passed"] for route in found["routes"])
    for route in found["routes"]:
        line = f"{route['name']}: expected {route['expected']}, got {route['got']}: {route['diagnosis']}"
        assert line in result.stdout
    return found


def test_a_good_model(tiny_folder):
    found = shapes(tiny_folder, "--prompt", "The old man", "--num-beams", 3, "--max-new-tokens", 4)
    length = found["ids"][1]
    end = length + 4
    assert found["passed"] and found["class"] == "quamba.QuambaLMHeadModel" and found["folder"] == str(tiny_folder)
    assert (found["prompt"], found["beams"], found["dtype"], found["device"]) == ("The old man", 3, "float32", "cpu")
    expected = [[1, length, 4096], [1, 1, 4096], [1, 4096], "4 x [1, 4096]", "4 x [1, 4096]", [3, end]]
    assert [route["got"] for route in found["routes"]] == [str(shape) for shape in expected]
    assert [route["expected"] for route in found["routes"]] == [str(shape) for shape in expected]
    text = call("--shapes", tiny_folder).stdout
    assert "prompt: 'The old man went to the window and', ids [1, " in text and "; 5 beams, 8 new tokens" in text
    assert text.endswith("tiny: every route is as it should be\n")


def test_an_artifact(tiny_artifact):
    found = shapes(tiny_artifact, "--tokenizer", "mamba1-nano")
    assert found["passed"]
    assert json.loads(call("--shapes", tiny_artifact, "--tokenizer", "mamba1-nano", "--json").stdout) == found


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
@pytest.mark.parametrize("own", [True, False])
def test_models_that_both_can_open(tmp_path, kind, own):
    folder = write(tmp_path / "model", *files_of(kind, "transformers"))
    found = shapes(folder, *(["--transformers"] if own else []))
    assert found["passed"] and found["prompt"] is None and "random" in found["tokenizer"]
    assert found["class"].partition(".")[0] == ("transformers" if own else "quamba")


def test_a_model_that_only_transformers_opens(tmp_path):
    size = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, initializer_range=0.3)).save_pretrained(tmp_path)
    found = shapes(tmp_path)
    assert found["passed"] and found["class"] == "transformers.LlamaForCausalLM"


@pytest.mark.parametrize(
    ("name", "data"),
    [("model.safetensors", b"\0" * 7), ("model.safetensors", b"\xff" * 99), ("pytorch_model.bin", b"garbage" * 9)],
    ids=["short", "long", "pickle"],
)
def test_damaged_weights_of_a_model_that_only_transformers_opens(tmp_path, name, data):
    transformers.LlamaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(data)
    result = call("--shapes", tmp_path)
    assert result.exit_code == 1 and f"Error: transformers can't load {tmp_path}: " in result.stderr


def test_weights_that_are_missing_are_not_started_at_random(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    tensors = model.state_dict()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    result = call("--shapes", tmp_path)
    assert result.exit_code == 1 and "has no model.layers.1.mlp.up_proj.weight" in result.stderr


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", [True, False])
def test_a_dtype_is_the_one_that_was_asked_for(tmp_path, dtype, own):
    folder = write(tmp_path / "model", *files_of("mamba2", "transformers"))
    found = shapes(folder, "--dtype", dtype, *(["--transformers"] if own else []))
    assert found["dtype"] == dtype and found["passed"]


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["./absent", "--shapes"], 1, "no such folder: ./absent"),
        (["mamba1-nano", "--shapes", "--dtype", "fp16"], 1, "dtype can't be fp16"),
        (["mamba1-nano", "--shapes", "--prompt", ""], 1, "the prompt is empty"),
        (["mamba1-nano", "--shapes", "--no-run"], 2, "--no-run has no meaning with --shapes"),
        (["mamba1-nano", "--prompt", "x"], 2, "--prompt belongs to --shapes"),
        (["mamba1-nano", "--num-beams", "5"], 2, "--num-beams belongs to --shapes"),
    ],
)
def test_what_can_not_be_asked(arguments, code, why):
    result = call(*arguments)
    assert result.exit_code == code and why in result.stderr and result.stdout == ""


def test_a_folder_that_nothing_opens(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    result = call(tmp_path, "--shapes")
    assert result.exit_code == 1 and "transformers can't load" in result.stderr


def failed(model, ids=IDS, **options):
    return {route.name: route.diagnosis for route in try_routes(model, ids, **options) if not route.passed}


@pytest.mark.parametrize(
    "kind", [stubs.LikeMambaSsm, stubs.Older, stubs.Neither, stubs.Flat, stubs.Swallowing, stubs.Deaf]
)
def test_every_way_of_being_called_is_fine(kind):
    routes = {route.name: route for route in try_routes(kind(), IDS)}
    assert not [route for route in routes.values() if not route.passed]
    assert routes["beams"].got == "not tried"
    if kind is stubs.LikeMambaSsm:
        assert routes["recurrent"].got == f"8 x [1, {stubs.VOCAB}]"
    else:
        assert routes["recurrent"].got == "no state"
    if kind is stubs.Deaf:
        assert routes["last position"].got == f"[1, 8, {stubs.VOCAB}]"
        assert "num_last_tokens=1: all logits are computed" in routes["last position"].diagnosis


class Stateful:
    """Makes its own kind of state."""

    def new_state(self):
        return stubs.Memory()


class Good(Stateful, stubs.LikeTransformers):
    pass


class Forgetful(Stateful, stubs.Forgetful):
    pass


class Twice(Stateful, stubs.Twice):
    pass


class AnotherPosition(Good):
    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        out = super().forward(input_ids, past_key_values, use_cache)
        out.logits = out.logits[:, :logits_to_keep] if logits_to_keep else out.logits
        return out


class Nan(Good):
    def run(self, ids, memory=None):
        return super().run(ids, memory) * torch.nan


class Crashing(Good):
    """Only with a state."""

    def forward(self, input_ids, past_key_values=None, use_cache=None, logits_to_keep=0):
        if past_key_values is not None:
            raise RuntimeError("expanded size 41 must match 5\nand more")
        return super().forward(input_ids, None, use_cache, logits_to_keep)


FAULTS = {
    "none": (Good, {}),
    "forgotten state": (Forgetful, {"recurrent": "the state is forgotten, or a token enters it twice"}),
    "tokens read twice": (Twice, {"recurrent": "the state is forgotten, or a token enters it twice"}),
    "another position": (
        AnotherPosition,
        dict.fromkeys(("last position", "last_logits"), "the full logits' last position"),
    ),
    "NaN": (Nan, {"full": "NaN or infinite values"}),
    "crash": (Crashing, {"recurrent": "RuntimeError: expanded size 41 must match 5"}),
    "looking ahead": (stubs.Foreseeing, {"parallel": "positions see what follows them"}),
}


@pytest.mark.parametrize(("kind", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_each_route_can_fail(kind, expected):
    found = failed(kind())
    assert expected.keys() <= found.keys() and (expected or not found)
    for name, diagnosis in expected.items():
        assert diagnosis in found[name] and "\n" not in found[name]
    if "crash" in FAULTS and kind is Crashing:
        assert list(found) == ["recurrent"]  # the others were tried all the same


def test_wrong_shapes_are_said():
    routes = {route.name: route for route in try_routes(stubs.Returning(torch.zeros(3, 7)), IDS)}
    assert routes["full"].got == "[3, 7]" and routes["full"].expected == f"[1, 8, {stubs.VOCAB}]"
    assert "these are not the logits of the ids" in routes["full"].diagnosis
    assert "QuambaError: Returning returned logits of shape [3, 7]" in routes["last_logits"].diagnosis


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_beams_that_keep_their_states_are_found(monkeypatch, family):
    from quamba.state import QuambaState

    monkeypatch.setattr(QuambaState, "reorder_cache", lambda self, rows: None)
    found = failed(random_model(family))
    assert list(found) == ["beams"] and "states don't follow their beams" in found["beams"]


def test_a_broken_model_is_exit_code_1(tiny_folder, monkeypatch):
    forward = quamba.QuambaLMHeadModel.forward

    def forget(self, input_ids=None, past_key_values=None, logits_to_keep=0, **kwargs):
        return forward(self, input_ids, logits_to_keep=logits_to_keep, use_cache=past_key_values is not None)

    monkeypatch.setattr(quamba.QuambaLMHeadModel, "forward", forget)
    found = shapes(tiny_folder)
    assert "recurrent" in [route["name"] for route in found["routes"] if not route["passed"]]
    assert "not as it should be: " in call("--shapes", tiny_folder).stdout
