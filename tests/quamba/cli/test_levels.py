"""What every command has: --json, quiet and verbose runs, colours for terminals only, and exit codes that stay."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from quamba.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[3]
OWN = ("lm-eval",)  # everything goes to another program
QUICK = ["--samples", "2", "--seq-len", "12"]


@pytest.fixture
def work(tmp_path, monkeypatch, tiny_folder, tiny_artifact):
    """A current folder with a text and two models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    shutil.copytree(tiny_folder, tmp_path / "float")
    shutil.copytree(tiny_artifact, tmp_path / "small")
    return tmp_path


RUNS = {
    "quantize": ["float", "--w8a8", "-o", "new", "--calibration", "text.txt", *QUICK],
    "eval": ["small", "--perplexity", "text.txt", "--tokenizer", "mamba1-nano"],
    "generate": ["small", "--prompt", "Once", "--max-new-tokens", "2", "--tokenizer", "mamba1-nano"],
    "card": ["small"],
    "convert": ["float", "new"],
    "doctor": ["small", "--no-run"],
    "inspect": ["small"],
    "completion": ["bash"],
}


def in_need_of_repair(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = 4000  # the tensors have 4096 rows
    (folder / "config.json").write_text(json.dumps(config))


def call(*arguments, **options):
    return CliRunner().invoke(main, [str(a) for a in arguments], **options)


def test_this_page_covers_every_command():
    assert sorted([*RUNS, *OWN]) == sorted(COMMANDS)


@pytest.mark.parametrize("command", RUNS)
def test_json_is_all_that_stdout_gets(work, command):
    result = call(command, *RUNS[command], "--json", "--output", "out.json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((work / "out.json").read_text()) and isinstance(found, dict)


@pytest.mark.parametrize("command", RUNS)
def test_quiet_leaves_only_results(work, command):
    loud = call(command, *RUNS[command])
    shutil.rmtree("new", ignore_errors=True)
    quiet = call("-q", command, *RUNS[command])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    numbers = re.compile(r"[\d.,]+ (s|MB)\b")  # time and memory
    assert numbers.sub("", quiet.stdout) == numbers.sub("", loud.stdout.partition("next:")[0])


def test_verbose_says_why_and_where(work):
    assert "kernels" not in call("-q", "generate", *RUNS["generate"]).stderr
    assert "kernels" in call("generate", *RUNS["generate"]).stderr
    plain, traced = call("inspect", "./gone"), call("-vv", "inspect", "./gone")
    assert plain.stderr == "Error: no such folder: ./gone\n"
    assert "Traceback" in traced.stderr and traced.stderr.endswith(plain.stderr) and traced.exit_code == 1
    both = call("-q", "-v", "inspect", "small")
    assert both.exit_code == 2 and "contradict" in both.stderr


def test_repairs_are_logged_unless_quiet(work):
    in_need_of_repair(work / "float")
    arguments = ["generate", "float", "--prompt", "Once", "--max-new-tokens", "1"]
    loud, quiet = call(*arguments), call("-q", *arguments)
    assert loud.exit_code == quiet.exit_code == 0, loud.output
    assert "vocabulary of 4000" in loud.stderr and quiet.stderr == ""


def test_logging_is_as_before_afterwards(work):
    import logging

    logger = logging.getLogger("quamba")
    before = (logger.level, logger.propagate, list(logger.handlers))
    call("-vv", "inspect", "small")
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


@pytest.mark.parametrize(
    ("environment", "coloured"), [({}, True), ({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False)]
)
def test_colours_are_for_terminals(work, environment, coloured, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = call("doctor", "small", "--no-run").stdout
    assert "\x1b" not in plain
    # As on a terminal: the runner doesn't strip what click lets through.
    shown = call("doctor", "small", "--no-run", color=True, env=environment).stdout
    assert ("\x1b[32mhealthy" in shown) == coloured
    assert click.unstyle(shown) == plain


CODES = [
    (0, ["--help"]),
    (0, ["--version"]),
    (0, ["inspect", "small"]),
    (0, ["doctor", "small", "--no-run"]),
    (0, ["lm-eval", "--help"]),
    (1, ["inspect", "./gone"]),
    (1, ["quantize", "float", "--w8a8", "-o", "small"]),
    (1, ["quantize", "float", "--recipe", "gone.yaml"]),
    (1, ["eval", "float", "--perplexity", "gone.txt"]),
    (1, ["eval", "float", "--task", "no_such_task"]),
    (1, ["generate", "float", "--prompt", ""]),
    (1, ["generate", "float", "--prompt", "x", "--device", "warp:9"]),
    (1, ["convert", "float", "small"]),
    (1, ["doctor", "repaired", "--no-run"]),
    (2, []),
    (2, ["doctor", "broken", "--no-run"]),
    (2, ["no-such-command"]),
    (2, ["inspect"]),
    (2, ["inspect", "small", "--no-such-option"]),
    (2, ["quantize", "float"]),
    (2, ["eval", "float"]),
    (2, ["generate", "float"]),
    (2, ["completion", "tcsh"]),
    (2, ["lm-eval", "run", "--no_such_option"]),
]


@pytest.mark.parametrize(("code", "arguments"), CODES, ids=[" ".join(words) or "nothing" for _, words in CODES])
def test_exit_codes(work, code, arguments):
    if "repaired" in arguments:
        shutil.copytree("float", "repaired")
        in_need_of_repair(Path("repaired"))
    if "broken" in arguments:
        shutil.copytree("float", "broken")
        Path("broken/model.safetensors").write_bytes(b"")
    result = call(*arguments)
    assert result.exit_code == code, result.output + repr(result.exception)
    assert code == 0 or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output


def test_an_interrupt_ends_with_130(work, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("quamba.model.QuambaLMHeadModel.from_pretrained", interrupted)
    for command, resumes in (("generate", False), ("eval", True)):
        result = call(command, *RUNS[command])
        assert result.exit_code == 130
        assert ("to resume" in result.stderr) == resumes


def test_the_documentation_names_every_command_option_and_code():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    context = click.Context(main)
    for name in COMMANDS:
        assert f"## quamba {name}\n" in page and f"| [`{name}`](#quamba-{name}) |" in page
        command = main.get_command(context, name)
        for option in (o for o in command.params if isinstance(o, click.Option)):
            for flag in option.opts + option.secondary_opts:
                assert f"`{flag}" in page or f"/{flag}" in page or f", {flag}" in page, (name, flag)
    for code in ("0", "1", "2", "130"):
        assert re.search(rf"^\| {code} \|", page, re.MULTILINE)
