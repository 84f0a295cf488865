"""`quamba convert`: every layout becomes an artifact of ours with the same logits, whole or not at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import quamba
from quamba import QuambaLMHeadModel
from quamba.cli import main
from quamba.errors import CheckpointError, QuambaError
from quamba.formats import ArtifactWriter, load_tokenizer, open_checkpoint
from quamba.formats.location import Location
from tests.conftest import copy_tokenizer
from tests.quamba.formats.foreign import IDS, files_of, truth, write
from tests.quamba.formats.published import published, save
from tests.quamba.formats.test_repairs import prefixed

GENERATION = {"max_new_tokens": 7, "repetition_penalty": 1.25, "eos_token_id": 3}


def call(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    return result


def good(*arguments):
    result = call("convert", *arguments)
    assert result.exit_code == 0, result.output
    return result


def bad(*arguments):
    """The one line of a conversion that ends with exit code 1."""
    result = call("convert", *arguments)
    assert result.exit_code == 1, result.output
    lines = result.stderr.strip().splitlines()
    assert lines[0].startswith("Error: "), result.stderr
    return result.stderr.strip()


@pytest.fixture
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def source(tmp_path):
    """transformers' Mamba1, tied. `truth("mamba")` are its logits."""
    return write(tmp_path / "source", *files_of("mamba", "transformers"))


LAYOUTS = {
    "transformers, Mamba1": ("mamba", "transformers", {}, {}),
    "transformers, Mamba2 untied": ("mamba2", "transformers", {"tie_word_embeddings": False}, {}),
    "transformers, FalconMamba": ("falcon_mamba", "transformers", {}, {"shards": 3}),
    "mamba-ssm, Mamba1": ("mamba", "mamba_ssm", {}, {"files": "pytorch_model.bin"}),
    "mamba-ssm, Mamba2 in shards": ("mamba2", "mamba_ssm", {}, {"files": "pytorch_model.bin", "shards": 2}),
}


@pytest.mark.parametrize(("kind", "layout", "overrides", "way"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(tmp_path, work, kind, layout, overrides, way):
    folder = write(tmp_path / "source", *files_of(kind, layout, **overrides), **way)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = good(folder, "ours", "--output", "result.json")
    assert f"source ({layout} layout, " in result.stdout and " -> ours (" in result.stdout
    assert "repaired" not in result.stdout
    told = json.loads(Path("result.json").read_text())
    size = sum(path.stat().st_size for path in (work / "ours").glob("*.safetensors"))
    assert told == {"out": "ours", "layout": layout, "bytes": size, "repairs": []}
    model = QuambaLMHeadModel.from_pretrained("ours", strict=True, verify=True)
    assert open_checkpoint("ours").layout == "quamba"
    first = QuambaLMHeadModel.from_pretrained(folder)
    assert torch.equal(model(IDS).logits, first(IDS).logits)
    torch.testing.assert_close(model(IDS).logits, truth(kind, **overrides)[1], rtol=1e-5, atol=1e-5)
    assert model.generation_config.repetition_penalty == 1.25 and model.generation_config.max_new_tokens == 7
    assert json.loads((work / "ours/generation_config.json").read_text()) == GENERATION
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in work.iterdir()) == ["ours", "result.json"]
    card = (work / "ours/README.md").read_text()
    assert "source, as a quamba artifact" in card and str(tmp_path) not in card


def test_codestral(tmp_path, work):
    overrides = {"n_groups": 8, "num_heads": 8, "head_dim": 8, "tie_word_embeddings": False}
    _, tensors = files_of("mamba2", "mamba_ssm", **overrides)
    prefixed("model.")(None, tensors)
    config = {"dim": 32, "n_layers": 2, "vocab_size": 64, "n_groups": 8, "tie_embeddings": False}
    write(tmp_path / "source", config, tensors, "consolidated.safetensors", name="params.json")
    good(tmp_path / "source", "ours")
    model = QuambaLMHeadModel.from_pretrained("ours", strict=True)
    torch.testing.assert_close(model(IDS).logits, truth("mamba2", **overrides)[1], rtol=1e-5, atol=1e-5)


def test_bundled_model_with_its_tokenizer(work):
    good("mamba2-nano", "ours")
    a, b = QuambaLMHeadModel.from_pretrained("mamba2-nano"), QuambaLMHeadModel.from_pretrained("ours")
    assert torch.equal(a(IDS).logits, b(IDS).logits) and b.dtype == torch.float16
    words = load_tokenizer("ours")
    assert words.padding_side == "left"
    assert words("The old man")["input_ids"] == load_tokenizer("mamba2-nano")("The old man")["input_ids"]
    arguments = ["--prompt", "The old man", "--max-new-tokens", "5"]
    assert call("generate", "ours", *arguments).stdout == call("generate", "mamba2-nano", *arguments).stdout
    assert call("doctor", "ours", "--verify").exit_code == 0


def test_artifacts(tmp_path, work, source, calibration_ids):
    """One of ours, quantized, stays what it is, its plan and tensors bit by bit; so does a second conversion."""
    quamba.quantize(str(source), "w4a8", out="small", calibration=calibration_ids)
    good("small", "again")
    assert (work / "small/config.json").read_bytes() == (work / "again/config.json").read_bytes()
    for file in (work / "small").glob("*.safetensors"):
        assert file.read_bytes() == (work / "again" / file.name).read_bytes()
    good(source, "one")
    good("one", "two")
    names = {path.name for path in (work / "one").iterdir()}
    assert names == {path.name for path in (work / "two").iterdir()}
    assert all((work / "one" / n).read_bytes() == (work / "two" / n).read_bytes() for n in names - {"README.md"})


@pytest.mark.parametrize("given", [False, True])
def test_tokenizers(tmp_path, work, tiny, given):
    folder = tiny("source", vocab=4096)
    if given:
        good(folder, "ours", "--tokenizer", "mamba1-nano")
    else:
        copy_tokenizer(folder)
        good(folder, "ours")
    assert load_tokenizer("ours")("Once")["input_ids"] == load_tokenizer("mamba1-nano")("Once")["input_ids"]
    (folder / "tokenizer.json").write_text("{broken")
    assert "can't be read" in bad(folder, "other")
    assert "no such folder: ./absent" in bad(folder, "other", "--tokenizer", "./absent")
    assert sorted(path.name for path in work.iterdir()) == ["ours"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "auto"])
def test_dtype(work, source, dtype):
    good(source, "ours", "--dtype", dtype)
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model = QuambaLMHeadModel.from_pretrained("ours")
    assert model.dtype == model.config.dtype == wanted
    direct = QuambaLMHeadModel.from_pretrained(source, dtype=dtype)
    assert torch.equal(model(IDS).logits, direct(IDS).logits)
    stored = load_file(work / "ours/block-00000.safetensors")
    assert stored["backbone.layers.0.mixer.in_proj.weight"].dtype == wanted
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32


def test_dtypes_that_cannot_be(tmp_path, work, source):
    assert "dtype can't be" in bad(source, "ours", "--dtype", "int8")
    config, tensors = files_of("mamba", "transformers")
    tensors["backbone.layers.1.mixer.in_proj.weight"][0, 0] = 1e6
    write(tmp_path / "large", config, tensors)
    assert "too large for float16: use --dtype bfloat16 or float32" in bad(
        tmp_path / "large", "ours", "--dtype", "float16"
    )
    assert list(work.iterdir()) == []


def test_repairs_are_told_and_strict_refuses_them(tmp_path, work):
    config, tensors = files_of("mamba", "transformers")
    folder = write(tmp_path / "source", config | {"d_model": 99}, tensors)
    error = bad(folder, "ours", "--strict")
    assert error.splitlines()[0] == "Error: source needs repairs, which strict loading refuses:"
    assert "d_model = 99" in error
    assert list(work.iterdir()) == []
    result = good(folder, "ours", "--output", "result.json")
    assert result.output.count("d_model = 99") == 1
    (repair,) = json.loads(Path("result.json").read_text())["repairs"]
    assert "d_model = 99" in repair["what"]
    assert "d_model = 99" in (work / "ours/README.md").read_text()
    good("ours", "healthy", "--strict")
    assert call("doctor", "ours").exit_code == 0


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
        (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json"),
    ],
    ids=["no config", "no weights", "generation config"],
)
def test_a_bad_source_leaves_nothing(work, source, damage, why):
    damage(source)
    assert why in bad(source, "new/parents/ours")
    assert list(work.iterdir()) == []


def test_a_broken_generation_config_is_refused_before_quantizing(work, source):
    (source / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"can't read .*source/generation_config\.json"):
        quamba.quantize(str(source), "w8a8", out="ours", calibration=IDS)
    assert list(work.iterdir()) == []


def test_nan_in_the_last_shard_leaves_nothing(tmp_path, work):
    config, tensors = files_of("mamba", "transformers")
    tensors["backbone.norm_f.weight"][3] = torch.nan
    write(tmp_path / "source", config, tensors)
    assert "backbone.norm_f.weight holds NaN" in bad(tmp_path / "source", "ours")
    assert list(work.iterdir()) == []


def test_a_destination_that_exists(tmp_path, work, source, calibration_ids):
    good(source, "ours")
    before = {path.name: path.read_bytes() for path in (work / "ours").iterdir()}
    error = bad(source, "ours")
    assert "ours exists: choose another" in error and "--overwrite" in error
    assert "(-o)" not in error  # convert has no such option
    assert {path.name: path.read_bytes() for path in (work / "ours").iterdir()} == before
    good(source, "ours", "--overwrite", "--dtype", "bfloat16")
    assert QuambaLMHeadModel.from_pretrained("ours").dtype == torch.bfloat16
    assert sorted(path.name for path in work.iterdir()) == ["ours"]
    # Onto itself: another dtype in place.
    good("ours", "ours", "--overwrite", "--dtype", "float32")
    assert QuambaLMHeadModel.from_pretrained("ours", verify=True).dtype == torch.float32


def test_a_destination_that_is_something_else(work, source):
    (work / "mine").mkdir()
    (work / "mine/thesis.txt").write_text("years of work")
    (work / "file").write_text("no folder")
    (work / "other.partial").mkdir()
    (work / "other.partial/notes.txt").write_text("mine too")
    for overwrite in ([], ["--overwrite"]):
        bad(source, "mine", *overwrite)
        bad(source, "file", *overwrite)
        bad(source, "file/below", *overwrite)
        bad(source, source, *overwrite)
        assert "other.partial is in the way" in bad(source, "other", *overwrite)
    assert "holds something else than a quantized model, which --overwrite won't replace" in bad(
        source, "mine", "--overwrite"
    )
    assert (work / "mine/thesis.txt").read_text() == "years of work"
    assert (work / "other.partial/notes.txt").read_text() == "mine too"
    assert (work / "file").read_text() == "no folder"
    assert QuambaLMHeadModel.from_pretrained(source)(IDS).logits.shape == (2, 13, 64)
    assert sorted(path.name for path in work.iterdir()) == ["file", "mine", "other.partial"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("shard", [0, 1, 3, "finish"])
@pytest.mark.parametrize("replacing", [False, True])
def test_killed_half_way(work, source, monkeypatch, shard, replacing):
    if replacing:
        good(source, "ours", "--dtype", "bfloat16")
    written = []
    write_shard, finish = ArtifactWriter.write, ArtifactWriter.finish

    def die(self, name, tensors):
        if len(written) == shard:
            raise Killed
        written.append(name)
        write_shard(self, name, tensors)

    def die_late(self):
        if shard == "finish":
            raise Killed
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "write", die)
        patch.setattr(ArtifactWriter, "finish", die_late)
        with pytest.raises(Killed):
            CliRunner().invoke(main, ["convert", str(source), "ours", "--overwrite"], catch_exceptions=False)
    assert (work / "ours").exists() == replacing
    for folder in [path for path in work.iterdir() if path.name != "ours"]:
        with pytest.raises(CheckpointError):
            QuambaLMHeadModel.from_pretrained(folder)
    if replacing:
        assert QuambaLMHeadModel.from_pretrained("ours", verify=True).dtype == torch.bfloat16
    good(source, "ours", "--overwrite")
    assert sorted(path.name for path in work.iterdir()) == ["ours"]
    model = QuambaLMHeadModel.from_pretrained("ours", verify=True)
    torch.testing.assert_close(model(IDS).logits, truth("mamba")[1], rtol=1e-5, atol=1e-5)


def test_another_conversion_after_one_that_was_killed(tmp_path, work, source, monkeypatch):
    """What the first left behind isn't taken for the second's."""
    kept = ArtifactWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "finish", lambda self: exec("raise KeyboardInterrupt"))
        assert CliRunner().invoke(main, ["convert", str(source), "ours"]).exit_code == 130
    assert ArtifactWriter.write is kept
    other = write(tmp_path / "other", *files_of("mamba2", "transformers"))
    good(other, "ours", "--dtype", "bfloat16")
    model = QuambaLMHeadModel.from_pretrained("ours", verify=True)
    assert torch.equal(model(IDS).logits, QuambaLMHeadModel.from_pretrained(other, dtype="bfloat16")(IDS).logits)


def test_an_unfinished_conversion_says_what_it_is(work, source, monkeypatch):
    monkeypatch.setattr(ArtifactWriter, "finish", lambda self: exec("raise KeyboardInterrupt"))
    CliRunner().invoke(main, ["convert", str(source), "ours"])
    with pytest.raises(CheckpointError, match="conversion"):
        open_checkpoint("ours.partial")


def test_a_flipped_byte(work, source):
    good(source, "ours")
    file = work / "ours/block-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    why = "block-00001.safetensors is not what was written: its hash differs"
    assert call("doctor", "ours", "--verify").exit_code == 2
    with pytest.raises(CheckpointError, match=why):
        QuambaLMHeadModel.from_pretrained("ours", verify=True)
    assert why in call("generate", "ours", "--prompt", "x", "--verify", "--tokenizer", "mamba1-nano").stderr
    assert why in bad("ours", "again", "--verify")
    assert "records no hashes" in bad(source, "again", "--verify")
    assert sorted(path.name for path in work.iterdir()) == ["ours"]


def test_help_and_mistakes(work, source):
    text = call("convert", "--help").output
    for option in ("--exact", "--strict", "--dtype", "--tokenizer", "--overwrite", "--verify", "--output"):
        assert option in text
    assert call("convert", source).exit_code == 2
    assert "no such folder: ./absent" in bad("./absent", "ours")
    assert list(work.iterdir()) == []


def test_inspect_tells_the_repairs(tmp_path):
    made = published("mamba2", "W8A8")
    made.state.pop("backbone.layers.1.norm.output_scale")
    save(made, tmp_path / "theirs")
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "theirs"), "--output", str(tmp_path / "facts.json")])
    assert done.exit_code == 0 and "loading it repairs:" in done.output and "every token gets its own" in done.output
    assert json.loads((tmp_path / "facts.json").read_text())["repairs"][0]["tensors"] == [
        "backbone.layers.1.norm.output_scale"
    ]


def test_a_full_disk_doesnt_promise_what_convert_does_not_do(source, work, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(ArtifactWriter, "write", full)
    error = bad(source, work / "out")
    assert "no space left on the device" in error
    assert error.endswith("run the same command again")
    monkeypatch.undo()
    good(source, work / "out")


def test_a_tokenizer_that_nobody_named_and_nobody_can_fetch(monkeypatch):
    """state-spaces' repositories have none of their own; without network a model of theirs still converts."""
    from quamba.formats import tokenizer

    def locate(name, **_):
        if name == tokenizer.STATE_SPACES_TOKENIZER:
            raise CheckpointError("no network")
        return Location(Path("nowhere"), "mamba-130m", "state-spaces/mamba-130m")

    monkeypatch.setattr(tokenizer, "locate", locate)
    assert load_tokenizer("state-spaces/mamba-130m", required=False) is None
    with pytest.raises(QuambaError, match="no tokenizer for state-spaces/mamba-130m: no network"):
        load_tokenizer("state-spaces/mamba-130m")
    with pytest.raises(QuambaError, match="no network"):
        load_tokenizer("state-spaces/mamba-130m", tokenizer.STATE_SPACES_TOKENIZER, required=False)
