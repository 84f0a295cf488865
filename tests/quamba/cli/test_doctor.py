"""`quamba doctor`: verdicts, exit codes, what it finds in the files, and that each of its checks can fail."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quamba
from quamba.cli import main
from tests.conftest import copy_tokenizer, write_checkpoint
from tests.quamba.formats.foreign import files_of, write

CHECKS = ["state hand-off", "prompt sensitivity", "left padding", "two beams", "save and load"]


def call(*arguments):
    result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    return result


def diagnosis(*arguments):
    """The diagnosis as JSON, its exit code as it should be, nothing else printed."""
    result = call(*arguments, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == ["healthy", "repaired", "broken"].index(found["verdict"]), result.output
    return found


def edit(folder, change, file="model.safetensors"):
    """Change an artifact's or a model's tensors; sizes and header stay."""
    from safetensors import safe_open

    with safe_open(folder / file, framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata=metadata)


def write_json(path, **changes):
    data = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(data | changes))


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """A float model with its tokenizer. Only for reading."""
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "tiny", files="safetensors", tokenizer=True)


@pytest.fixture
def copy(tmp_path, plain, tiny_artifact):
    """`copy("plain")` or `copy("artifact")`: one to damage."""
    import shutil

    def make(which):
        return shutil.copytree({"plain": plain, "artifact": tiny_artifact}[which], tmp_path / which)

    return make


@pytest.mark.parametrize("run", [True, False])
def test_a_healthy_model(plain, run):
    found = diagnosis(plain, *([] if run else ["--no-run"]))
    assert (found["model"], found["verdict"], found["layout"], found["family"]) == (
        "tiny",
        "healthy",
        "mamba_ssm",
        "mamba1",
    )
    assert (found["layers"], found["hidden_size"], found["vocab_size"], found["dtype"]) == (2, 32, 4096, "float32")
    assert found["repairs"] == found["broken"] == found["notes"] == []
    assert [check["name"] for check in found["checks"]] == (CHECKS if run else [])
    assert all(check["passed"] and check["detail"] for check in found["checks"])
    text = call(plain, *([] if run else ["--no-run"])).stdout
    assert "tiny: mamba_ssm layout, 2 blocks (mamba1), 32 wide, vocabulary 4096" in text
    assert "float parts float32" in text
    assert text.count("  ok: ") == (5 if run else 0)
    assert text.splitlines()[-1] == "tiny: healthy"


def test_no_run_runs_nothing(plain, monkeypatch):
    monkeypatch.setattr("quamba.formats.load.build", lambda *a: pytest.fail("built"))
    assert call(plain, "--no-run").exit_code == 0


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a16", "quamba1-w8a8"])
def test_healthy_artifacts(tmp_path, plain, calibration_ids, recipe):
    quamba.quantize(str(plain), recipe, out=tmp_path / "out", calibration=calibration_ids)
    found = diagnosis(tmp_path / "out", "--verify")
    assert (found["verdict"], found["layout"], found["recipe"]) == ("healthy", "quamba", recipe)
    assert found["broken"] == []
    assert [check["name"] for check in found["checks"] if check["passed"]] == CHECKS


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_healthy_models_of_transformers(tmp_path, kind):
    folder = write(tmp_path / "model", *files_of(kind, "transformers"))
    found = diagnosis(folder)
    assert (found["verdict"], found["layout"]) == ("healthy", "transformers")
    assert found["family"] == {"mamba2": "mamba2"}.get(kind, "mamba1")
    (note,) = found["notes"]
    assert "no tokenizer" in note["what"]


def test_a_repaired_model(tmp_path):
    config, tensors = files_of("mamba", "transformers")
    folder = write(tmp_path / "model", config | {"d_model": 99}, {f"model.{n}": t for n, t in tensors.items()})
    found = diagnosis(folder)
    assert found["verdict"] == "repaired"
    assert len(found["repairs"]) == 2
    assert all(set(repair) == {"what", "why", "tensors"} for repair in found["repairs"])
    assert all(check["passed"] for check in found["checks"])
    result = call(folder, "--no-run")
    assert (result.exit_code, result.stdout.count("  repaired: ")) == (1, 2)
    assert "d_model = 99" in result.stdout and result.stdout.endswith("model: repaired\n")
    assert result.stderr == ""


def broken(folder, *arguments):
    """Why it is broken; text and JSON agree, and nothing is tried out on it."""
    found = diagnosis(folder, *arguments)
    assert found["verdict"] == "broken"
    result = call(folder, *arguments)
    assert result.exit_code == 2
    assert result.stdout.count("  broken: ") == len(found["broken"]) > 0
    assert result.stdout.rstrip().endswith(": broken")
    assert found["checks"] == []
    return found["broken"]


X_PROJ = "backbone.layers.1.mixer.x_proj.weight"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity(copy, value):
    folder = copy("plain")
    edit(folder, lambda t: [t[name].view(-1)[:1].fill_(value) for name in (X_PROJ, "backbone.norm_f.weight")])
    (finding,) = broken(folder)
    assert finding["what"] == "NaN or infinite values"
    assert sorted(finding["tensors"]) == [X_PROJ, "backbone.norm_f.weight"]


def test_a_bin_file_is_not_opened_for_every_tensor(tiny, monkeypatch):
    folder = tiny(layers=3)
    assert diagnosis(folder, "--no-run")["verdict"] == "healthy"
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors[X_PROJ][0, 0] = torch.nan
    torch.save(tensors, folder / "pytorch_model.bin")
    from quamba.formats import tensors as module

    loads, load = [], module.load_bin
    monkeypatch.setattr(module, "load_bin", lambda file: loads.append(file) or load(file))
    (finding,) = diagnosis(folder, "--no-run")["broken"]
    assert finding["tensors"] == [X_PROJ]
    assert len(loads) < 10


def test_a_matrix_of_zeros(copy):
    folder = copy("plain")
    edit(folder, lambda t: t[X_PROJ].zero_())
    (finding,) = broken(folder)
    assert finding["what"].startswith("all zero") and finding["tensors"] == [X_PROJ]


def test_zeros_that_are_fine(copy, calibration_ids, tmp_path):
    """Rows of the embedding beyond the vocabulary, a dead channel, biases."""
    folder = copy("plain")

    def change(t):
        t["backbone.embedding.weight"][4000:].zero_()
        t["backbone.layers.0.mixer.in_proj.weight"][5].zero_()
        t["backbone.layers.0.mixer.conv1d.bias"].zero_()

    edit(folder, change)
    assert diagnosis(folder)["verdict"] == "healthy"
    for recipe in ("w8a8", "w4a8"):
        quamba.quantize(str(folder), recipe, out=tmp_path / recipe, calibration=calibration_ids)
        found = diagnosis(tmp_path / recipe)
        assert (found["verdict"], found["broken"]) == ("healthy", [])


BLOCK = "block-00001.safetensors"


def scale_names(folder):
    names = [n for n, t in load_file(folder / BLOCK).items() if t.is_floating_point() and ("scale" in n)]
    assert names
    return names


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (0.0, "scales that are zero or negative"),
        (-0.01, "scales that are zero or negative"),
        (1e9, "scales beyond 10000"),
        (torch.nan, "NaN or infinite values"),
    ],
)
def test_absurd_scales(copy, value, what):
    folder = copy("artifact")
    for name in (scale_names(folder)[0], scale_names(folder)[-1]):
        edit(folder, lambda t, name=name: t[name].view(-1)[:1].fill_(value), BLOCK)
    (finding,) = broken(folder)
    assert finding["what"] == what and len(finding["tensors"]) == 2


def test_saturated_codes(copy):
    folder = copy("artifact")
    name = next(n for n, t in load_file(folder / BLOCK).items() if t.dtype == torch.int8 and t.shape[-1] > 20)
    edit(folder, lambda t: t[name].copy_((t[name].int() * 4).clamp(-127, 127)), BLOCK)
    (finding,) = broken(folder)
    assert "int8 codes at their limits" in finding["what"] and finding["tensors"] == [name]


def test_a_tokenizer_of_another_model(tmp_path, tiny):
    folder = tiny(files="safetensors")
    assert "no tokenizer" in diagnosis(folder)["notes"][0]["what"]
    copy_tokenizer(folder)
    (finding,) = broken(folder)
    assert "the tokenizer has" in finding["what"] and "tokens, the model 64" in finding["what"]
    (folder / "tokenizer.json").write_text("{")
    assert "can't be read" in broken(folder)[0]["what"]
    (finding,) = broken(tiny("other", files="safetensors"), "--tokenizer", "mamba1-nano")
    assert "another model's" in finding["what"]


def test_what_does_not_open(copy, tmp_path):
    folder = copy("plain")
    write_json(folder / "config.json", n_layer=5)
    (finding,) = broken(folder)
    assert "n_layer = 5, by the number of blocks 2" in finding["what"]
    (folder / "config.json").write_text("{")
    assert "can't read" in broken(folder)[0]["what"]
    (folder / "config.json").unlink()
    assert "has no config.json" in broken(folder)[0]["what"]


@pytest.mark.parametrize("model", ["./absent", "not a name", "mamba1-nanno"])
def test_a_model_that_is_not_there(tmp_path, monkeypatch, model):
    """Exit code 1 would mean: it loads, with repairs."""
    monkeypatch.chdir(tmp_path)
    (finding,) = broken(model)
    assert model in finding["what"]


def test_a_model_that_cannot_be_read(copy, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "model.safetensors")

    monkeypatch.setattr("quamba.formats.tensors.read_header", refuse)
    (finding,) = broken(copy("plain"))
    assert "Permission denied" in finding["what"]


def test_a_flipped_byte(copy):
    folder = copy("artifact")
    data = bytearray((folder / BLOCK).read_bytes())
    data[-9] ^= 1
    (folder / BLOCK).write_bytes(data)
    assert diagnosis(folder)["verdict"] in ("healthy", "broken")
    (finding,) = broken(folder, "--verify")
    assert f"{BLOCK} is not what was written: its hash differs" in finding["what"]


def test_verify_of_what_records_no_hashes_is_a_note(plain):
    assert "nothing to verify" in diagnosis(plain, "--verify")["notes"][0]["what"]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 0.3, "top_k": 3},
        {"do_sample": False, "temperature": 0.7},
        {"num_return_sequences": 2, "num_beams": 2},
        {"max_length": 10},
        {"suppress_tokens": list(range(40))},
        {"forced_bos_token_id": 3, "forced_eos_token_id": 4},
        {"use_cache": False},
        {"length_penalty": 2.0, "early_stopping": True, "eos_token_id": list(range(60))},
    ],
    ids=str,
)
def test_the_models_own_generation_settings_do_not_matter(tmp_path, settings):
    folder = write(tmp_path / "model", *files_of("mamba", "transformers"))
    write_json(folder / "generation_config.json", **settings)
    found = diagnosis(folder)
    assert (found["verdict"], found["broken"]) == ("healthy", [])


def test_a_broken_generation_config(copy):
    folder = copy("plain")
    (folder / "generation_config.json").write_text("{")
    assert "can't read" in broken(folder)[0]["what"]
