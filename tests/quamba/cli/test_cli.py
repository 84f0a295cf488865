"""The command line, in process, and a few runs as the user's shell would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import quamba
from quamba import QuambaLMHeadModel
from quamba.cli import COMMANDS, main
from quamba.formats import load_tokenizer

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--samples", "3", "--seq-len", "12"]


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder with a calibration text beside it."""
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def call(*arguments, **options):
    return CliRunner().invoke(main, [str(a) for a in arguments], **options)


def good(*arguments, **options):
    result = call(*arguments, **options)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result


def bad(code, *arguments, **options):
    """The error line of a command that must end with this code and without a traceback."""
    result = call(*arguments, **options)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert isinstance(result.exception, SystemExit)
    return result.stderr.strip().splitlines()[-1]


def test_help_names_every_command_and_how_to_start():
    text = good("--help").output
    assert text == good("-h").output
    for name, (_, _, line) in COMMANDS.items():
        assert name in text
        assert line in text
    assert "quamba quantize mamba1-nano --w8a8" in text
    assert good("--version").output == f"quamba, version {quamba.__version__}\n"


@pytest.mark.parametrize("command", ["quantize", "generate", "inspect"])
def test_help_of_a_command_explains_every_option(command):
    text = good(command, "--help").output
    assert text.startswith(f"Usage: main {command} [OPTIONS] MODEL")
    options = [line.strip() for line in text.split("Options:")[1].splitlines() if line.strip().startswith("-")]
    assert len(options) >= 2
    assert "--output FILE" in text


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["quantise", "x"], "there is no command 'quantise': did you mean 'quantize'?"),
        (["zzz"], "there is no command 'zzz': the keys here are quantize, eval, generate, card, convert"),
        (
            ["quantize", "mamba1-nano", "--w8a9"],
            "No such option '--w8a9'. (Did you mean one of: '--w4a16', '--w4a8'",
        ),
        (
            ["quantize", "mamba1-nano", "--w8a8", "--sample", "3"],
            "No such option '--sample'. Did you mean '--samples'?",
        ),
        (["quantize", "--w8a8"], "Missing argument 'MODEL'."),
        (["quantize", "mamba1-nano", "--w8a8", "--samples", "0"], "0 is not in the range x>=1."),
        (["quantize", "mamba1-nano"], "say how: exactly one of --w8a8, --w4a8, --w4a16, --recipe FILE.yaml"),
        (
            ["quantize", "mamba1-nano", "--w8a8", "--recipe", "x.yaml"],
            "exactly one of --w8a8, --w4a8, --w4a16, --recipe",
        ),
        (["generate", "mamba1-nano"], "Missing option '--prompt'."),
        (["generate", "mamba1-nano", "--prompt", "x", "--temperature", "0"], "0.0 is not in the range x>0."),
        (["generate", "mamba1-nano", "--prompt", "x", "--top-p", "1.5"], "1.5 is not in the range 0<x<=1."),
        (["inspect", "mamba1-nano", "--output", "no/such/folder.json"], "can't write to"),
        (["inspect", "mamba1-nano", "--output", "."], "is a directory"),
    ],
)
def test_mistyped_commands_and_options(work, arguments, why):
    assert why in bad(2, *arguments)
    assert list(work.iterdir()) == []


def test_quantize_writes_where_its_name_says_and_reports(work, tiny_folder):
    arguments = ["quantize", tiny_folder, "--w8a8", "--calibration", "../text.txt", *QUICK]
    text = good(*arguments, "--output", "results.json").stdout
    out = work / "tiny-w8a8"
    results = json.loads((work / "results.json").read_text())
    size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    source = sum(t.nbytes for t in load_file(tiny_folder / "model.safetensors").values())
    assert results["out"] == "tiny-w8a8"
    assert results["recipe"] == "w8a8"
    assert (results["bytes"], results["source_bytes"]) == (size, source)
    assert 0 < results["seconds"] < 100
    assert 50e6 < results["peak_memory_bytes"] < 50e9
    for piece in ("tiny -> tiny-w8a8", f"{source / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB", "peak memory", "quamba eval"):
        assert piece in text
    assert 'quamba generate tiny-w8a8 --prompt "' in text
    assert sorted(p.name for p in work.iterdir()) == ["results.json", "tiny-w8a8"]
    assert load_tokenizer("tiny-w8a8").padding_side == "left"
    # The same in Python gives the same files.
    quamba.quantize(str(tiny_folder), out="python", calibration="../text.txt", samples=3, seq_len=12)
    assert all(p.read_bytes() == (work / "python" / p.name).read_bytes() for p in out.iterdir())

    before = (out / "config.json").stat().st_mtime_ns
    assert "tiny-w8a8 exists: choose another folder (-o) or replace it with --overwrite" in bad(1, *arguments)
    assert (out / "config.json").stat().st_mtime_ns == before
    good(*arguments, "--overwrite", "--seed", "1")
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]["calibration"]["seed"] == 1
    )


def test_quantize_with_a_recipe_of_ones_own(work, tiny_folder):
    shipped = (quamba.recipe.configs_dir() / "mamba1-w8a8.yaml").read_text()
    Path("mine.yaml").write_text(
        shipped.replace("name: w8a8", "name: mine").replace("observer: minmax", "observer: mse")
    )
    good("quantize", tiny_folder, "--recipe", "mine.yaml", "--calibration", "../text.txt", *QUICK)
    assert QuambaLMHeadModel.from_pretrained("tiny-mine").config.plan.recipe == "mine"
    Path("wrong.yaml").write_text(shipped.replace("observer:", "observr:"))
    error = bad(1, "quantize", tiny_folder, "--recipe", "wrong.yaml")
    assert error == "Error: unknown key wrong.yaml.observr: did you mean 'observer'?"
    assert sorted(p.name for p in work.iterdir()) == ["mine.yaml", "tiny-mine", "wrong.yaml"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--recipe", "absent.yaml"], "can't read recipe absent.yaml"),
        (["--w8a8", "--calibration", "absent.txt"], "can't read calibration text absent.txt"),
        (["--w8a8", "--calibration", "../text.txt", "--seq-len", "100000"], "less than one window of 100000"),
        (["--w8a8", "--dtype", "int8"], "dtype can't be torch.int8: choose float32, float16, bfloat16 or auto"),
        (["--w8a8", "--device", "warp:9"], "device 'warp:9' can't be used here"),
        (["--w8a8", "--backend", "magic"], "unknown backend 'magic': choose one of auto, reference, cpu"),
        (["--w8a8", "--tokenizer", "./absent"], "no tokenizer for .*: no such folder: ./absent"),
        (["--w8a8", "--tokenizer", "."], "holds no tokenizer"),
        (["--w8a8", "-o", "../text.txt/out"], "can't write to .*text.txt"),
        (["--w8a8", "-o", "x" * 300], "File name too long"),
    ],
)
def test_a_quantize_that_cannot_be_leaves_nothing(work, tiny_folder, options, why):
    import re

    more = [] if "--calibration" in options else ["--calibration", "../text.txt"]
    more += [] if "--seq-len" in options else QUICK
    assert re.search(why, bad(1, "quantize", tiny_folder, *options, *more))
    assert list(work.iterdir()) == []


def test_a_model_without_tokenizer_and_one_that_does_not_fit(work, tiny):
    source = tiny()
    error = bad(1, "quantize", source, "--w8a8", "--calibration", "../text.txt", *QUICK)
    assert error.endswith("tiny has no tokenizer (tokenizer.json); name one with --tokenizer FOLDER_OR_HUB_ID")
    error = bad(1, "quantize", source, "--w8a8", "--calibration", "../text.txt", *QUICK, "--tokenizer", "mamba1-nano")
    assert "but the model's vocabulary has 64 entries: this tokenizer belongs to another model" in error
    error = bad(1, "generate", source, "--prompt", "zebra", "--tokenizer", "mamba1-nano")
    assert "larger than the model's vocabulary" in error
    (source / "tokenizer.json").write_text("{broken")
    assert "can't be read" in bad(1, "generate", source, "--prompt", "x")
    assert list(work.iterdir()) == []


def test_inspect_of_a_float_model_and_of_an_artifact(work, tiny_folder, tiny_artifact):
    for folder, layout in ((tiny_folder, "mamba_ssm"), (tiny_artifact, "quamba")):
        text = good("inspect", folder, "--output", "plan.json").stdout
        results = json.loads(Path("plan.json").read_text())
        stored = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        assert results["bytes"] == sum(t.nbytes for t in stored.values())
        assert (results["layout"], results["layers"], results["hidden_size"]) == (layout, 2, 32)
        assert results["embedding"]["bytes"] == 4096 * 32 * 4
        assert results["lm_head"]["tied_to_embedding"] is True
        (group,) = results["blocks"]
        assert (group["first"], group["last"]) == (0, 1)
        total = sum(row["bytes"] for row in group["components"])
        assert 2 * total + results["embedding"]["bytes"] + results["final_norm"]["bytes"] == results["bytes"]
        rows = {row["component"]: row for row in group["components"]}
        assert rows["in_proj"]["bytes"] == (128 * 32 * 4 if layout == "mamba_ssm" else 128 * 32 + 128 * 4)
        assert all(name in text for name in ("in_proj", "out_proj", "embedding", "final norm", "head"))
        assert ("recipe w8a8" in text) == (layout == "quamba")
    assert "int8" in text
    assert "token ids given by the caller" in text


def test_the_other_family_and_its_switches(work):
    assert "block 0 to 7 (mamba2)" in good("inspect", "mamba2-nano").output
    assert "The old man" in good("generate", "mamba2-nano", "--prompt", "The old man", "--max-new-tokens", "3").output
    few = ("--samples", "2", "--seq-len", "32")
    switches = ("--no-quantize-lm-head", "--apply-gptq", "--group-heads")
    good("quantize", "mamba2-nano", "--w8a8", "-o", "small", *few, *switches)
    shown = good("inspect", "small", "--output", "small.json").output
    assert "tied to embedding" in shown and "bits a weight: 8." in shown and "Hadamard" in shown
    summary = json.loads(Path("small.json").read_text())
    assert summary["embedding"]["precision"] == summary["lm_head"]["precision"] == "float16"
    assert summary["blocks"][0]["components"][-1]["sites"]["x"] == "int8 static per group (16)"
    assert bad(1, "quantize", "mamba1-nano", "--w8a8", "--group-heads").startswith(
        "Error: group_heads belongs to Mamba2"
    )
    why = bad(1, "quantize", "mamba2-nano", "--w8a8", "--no-quantize-lm-head", "--quantize-embedding")
    assert why.startswith("Error: this model's head is its embedding, one matrix in one format")
    assert sorted(path.name for path in work.iterdir()) == ["small", "small.json"]


def test_generate_greedy_equals_the_uncached_model(work, tiny_artifact):
    text = "The old man and the"
    result = good("generate", tiny_artifact, "--prompt", text, "--max-new-tokens", "7", "--output", "out.json")
    model, words = QuambaLMHeadModel.from_pretrained(tiny_artifact), load_tokenizer(str(tiny_artifact))
    ids = words(text, return_tensors="pt")["input_ids"]
    for _ in range(7):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = words.decode(ids[0], skip_special_tokens=True)
    results = json.loads(Path("out.json").read_text())
    assert results["text"] == expected
    assert results["prompt"] == text
    assert results["new_tokens"] == 7
    assert expected.strip() in result.stdout
    assert "7 tokens in" in result.stderr


def generated(*arguments, **options):
    good("generate", *arguments, "--output", "out.json", **options)
    return json.loads(Path("out.json").read_text())["text"]


def test_generate_samples_by_seed(work, tiny_artifact):
    arguments = [tiny_artifact, "--prompt", "Once", "--max-new-tokens", "8"]
    first = generated(*arguments, "--temperature", "30", "--seed", "1")
    assert generated(*arguments, "--temperature", "30", "--seed", "1") == first
    assert generated(*arguments, "--temperature", "30", "--seed", "2") != first
    greedy = generated(*arguments)
    assert generated(*arguments, "--top-k", "1") == greedy
    assert generated(*arguments, "--top-p", "1e-6") == greedy
    assert generated(*arguments, "--num-beams", "1") == greedy


def test_generate_beams_equal_transformers_own_search(work, tiny_artifact):
    found = generated(tiny_artifact, "--prompt", "Once upon", "--max-new-tokens", "5", "--num-beams", "3")
    model, words = QuambaLMHeadModel.from_pretrained(tiny_artifact), load_tokenizer(str(tiny_artifact))
    ids = words("Once upon", return_tensors="pt")["input_ids"]
    options = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    expected = model.generate(ids, max_new_tokens=5, num_beams=3, use_cache=False, do_sample=False, **options)
    assert found == words.decode(expected[0], skip_special_tokens=True)


def test_generate_from_standard_input_and_long_prompts(work, tiny_artifact):
    assert generated(tiny_artifact, "--prompt", "-", "--max-new-tokens", "3", input="Once upon") == generated(
        tiny_artifact, "--prompt", "Once upon", "--max-new-tokens", "3"
    )
    text = " ".join(f"word {i}" for i in range(400))
    model, words = QuambaLMHeadModel.from_pretrained(tiny_artifact), load_tokenizer(str(tiny_artifact))
    ids = words(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 1024  # read in three pieces
    found = generated(tiny_artifact, "--prompt", text, "--max-new-tokens", "4")
    for _ in range(4):
        ids = torch.cat([ids, model(ids, logits_to_keep=1).logits.argmax(-1)], dim=1)
    assert found == words.decode(ids[0], skip_special_tokens=True)


def test_generate_from_nothing_is_refused(work, tiny_artifact):
    assert "the prompt is empty" in bad(1, "generate", tiny_artifact, "--prompt", "")
    assert "the prompt is empty" in bad(1, "generate", tiny_artifact, "--prompt", "-", input="")
    assert list(work.iterdir()) == []


def shell(*arguments, cwd, **environment):
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | paths | environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_help_and_bad_paths_answer_at_once(tmp_path):
    for arguments, code in ((["--help"], 0), (["quantize", "--help"], 0), (["inspect", "./absent"], 1)):
        times = []
        for _ in range(3):
            started = time.monotonic()
            done = shell("-m", "quamba", *arguments, cwd=tmp_path)
            times.append(time.monotonic() - started)
            assert done.returncode == code, done.stderr
            if times[-1] < 1:
                break
        assert min(times) < 1, (arguments, times)
    assert done.stderr == "Error: no such folder: ./absent\n"


def test_the_heavy_modules_wait_until_they_are_needed(tmp_path):
    code = (
        "import sys, quamba, quamba.cli; print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules])"
    )
    assert shell("-c", code, cwd=tmp_path).stdout == "[]\n"


def test_from_a_checkout_without_installing(tmp_path):
    done = shell(ROOT / "cli.py", "--version", cwd=tmp_path, PYTHONPATH="")
    assert (
        done.stdout == f"cli.py, version {quamba.__version__}\n"
        or done.stdout == f"quamba, version {quamba.__version__}\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", [("--w8a8", "--w4a8"), ("--w4a8", "--w8a8"), ("--w8a8", "--recipe", "mamba1-w8a8"), ()]
)
def test_exactly_one_recipe(flags):
    result = CliRunner().invoke(main, ["quantize", "mamba1-nano", *flags])
    assert result.exit_code == 2 and "exactly one" in result.output


def test_sampling_takes_no_top_k_that_was_not_asked_for(monkeypatch):
    seen = {}

    def generate(self, ids, **options):
        seen.update(options)
        return ids

    monkeypatch.setattr("quamba.model.QuambaLMHeadModel.generate", generate)
    monkeypatch.setattr("quamba.writing.time.monotonic", iter(range(9)).__next__)
    CliRunner().invoke(
        main, ["generate", "mamba1-nano", "--prompt", "x", "--temperature", "0.5"], catch_exceptions=False
    )
    assert (seen["do_sample"], seen["top_k"], seen["top_p"]) == (True, 0, 1.0)


def test_eval_refuses_what_would_do_nothing(tmp_path):
    for words in (
        ["mamba1-nano", "--perplexity", "novels", "--limit", "3"],
        ["mamba1-nano", "--against", "mamba1-nano"],
    ):
        result = CliRunner().invoke(main, ["eval", *words])
        assert result.exit_code == 2, result.output
    assert CliRunner().invoke(main, ["eval", "not-here", "--perplexity", "novels"]).exit_code == 1
