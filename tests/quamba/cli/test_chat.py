"""`quamba generate` as a conversation, typed or piped."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from quamba.cli import main
from quamba.formats import load_tokenizer
from tests.conftest import write_checkpoint
from tests.quamba.test_writing import TEMPLATE

ROOT = Path(__file__).resolve().parents[3]
SHORT = ("--max-new-tokens", "5")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model whose tokenizer has a chat template."""
    folder = write_checkpoint(tmp_path_factory.mktemp("chat") / "talker", files="safetensors", tokenizer=True)
    words = load_tokenizer(str(folder))
    words.chat_template = TEMPLATE
    words.save_pretrained(folder)
    return folder


def call(*arguments, **options):
    result = CliRunner().invoke(main, [str(a) for a in arguments], **options)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


def turns(result):
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_piped_lines_are_turns(talker, tmp_path):
    out = tmp_path / "out.json"
    result = call("generate", talker, "--chat", "--json", *SHORT, "--output", out, input="Hello\n\nAnd now?\n")
    found = turns(result)
    assert [turn["prompt"] for turn in found] == ["Hello", "And now?"]
    first = "<user> Hello\n<assistant> " + found[0]["reply"]
    assert found[0]["text"] == first
    assert found[1]["text"] == f"{first}\n<user> And now?\n<assistant> {found[1]['reply']}"
    assert json.loads(out.read_text()) == {"turns": found}


def test_reset_and_exit(talker):
    found = turns(call("generate", talker, "--chat", "--json", *SHORT, input="Hello\n/reset\nHello\n/exit\nHello\n"))
    assert len(found) == 2 and found[0]["text"] == found[1]["text"]


def test_system_and_a_single_turn(talker):
    found = json.loads(
        call("generate", talker, "--chat", "--system", "Be kind.", "--prompt", "Hi", "--json", *SHORT).stdout
    )
    assert found["text"].startswith("<system> Be kind.\n<user> Hi\n<assistant> ")
    said = call("generate", talker, "--chat", "--system", "Be kind.", "--prompt", "Hi", *SHORT).stdout
    assert said.strip() == found["reply"].strip()  # what was asked is not repeated
    refused = CliRunner().invoke(main, ["generate", str(talker), "--prompt", "Hi", "--system", "x"])
    assert refused.exit_code == 2 and "--system belongs to --chat" in refused.stderr


def test_without_a_template_each_line_is_continued_by_itself(tiny_folder):
    result = call("generate", tiny_folder, "--chat", "--json", *SHORT, input="Once\nOnce\n")
    found = turns(result)
    assert found[0]["text"] == found[1]["text"] and found[0]["text"].startswith("Once")
    assert "no chat template" in result.stderr
    assert (
        found[0]["text"]
        == json.loads(call("generate", tiny_folder, "--prompt", "Once", "--json", *SHORT).stdout)["text"]
    )


def test_beams_answer_at_the_end(talker):
    found = turns(call("generate", talker, "--chat", "--json", "--num-beams", 2, *SHORT, input="Hello\n"))
    said = call("generate", talker, "--chat", "--num-beams", 2, *SHORT, input="Hello\n").stdout
    assert said.strip() == found[0]["reply"].strip()


def test_on_a_terminal_it_prompts_and_ctrl_d_leaves(tiny_folder):
    leader, follower = pty.openpty()
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "TERM": "dumb"}
    command = [sys.executable, "-m", "quamba", "generate", str(tiny_folder), *SHORT]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    try:
        text = read_until(leader, "> ")
        assert "/reset starts over" in text
        os.write(leader, b"Once upon\n")
        assert "Once upon" in read_until(leader, "> ")
        os.write(leader, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(leader)


def read_until(terminal, mark):
    """What is printed up to a mark at the end of it."""
    text, deadline = "", time.monotonic() + 120
    while not text.endswith(mark):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode()
    return text
