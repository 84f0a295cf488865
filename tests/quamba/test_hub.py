"""Models by hub id and short name, from a hub on this machine; and what is said when there is none.

In processes of their own, because huggingface_hub reads its endpoint when it is imported.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time

import pytest

from tests.conftest import copy_tokenizer, write_checkpoint
from tests.stub_hub import hub_environment, stub_hub

QUICK = ["--samples", "2", "--seq-len", "16"]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """state-spaces' repositories carry no tokenizer; they take the other one's."""
    folder = tmp_path_factory.mktemp("hub")
    model = write_checkpoint(folder / "mamba-130m", files="bin", vocab=4096)
    words = folder / "gpt-neox-20b"
    words.mkdir()
    copy_tokenizer(words)
    (words / "pytorch_model-00001-of-00046.bin").write_bytes(b"40 GB that nobody asked for")
    return {"state-spaces/mamba-130m": model, "EleutherAI/gpt-neox-20b": words}


@pytest.fixture
def quamba(tmp_path, forks):
    """Run the command line in an empty folder: `quamba(endpoint, "quantize", ...)`."""
    work = tmp_path / "work"
    work.mkdir()

    def call(endpoint: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        return forks.run("-m", "quamba", *arguments, cwd=work, env=hub_environment(endpoint, tmp_path / "home") | more)

    call.work = work
    return call


def closed_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def test_the_two_commands_of_the_readme(quamba, repositories):
    requests: list[str] = []
    with stub_hub(repositories, requests) as endpoint:
        done = quamba(endpoint, "quantize", "mamba-130m", "--w8a8", *QUICK)
        assert done.returncode == 0, done.stderr
        assert "Fetching" not in done.stderr  # a bar; this is no terminal
        out = quamba.work / "mamba-130m-w8a8"
        config = json.loads((out / "config.json").read_text())
        assert config["quantization_config"]["provenance"]["base_model"] == "state-spaces/mamba-130m"
        original = repositories["EleutherAI/gpt-neox-20b"] / "tokenizer.json"
        assert json.loads((out / "tokenizer.json").read_text())["model"] == json.loads(original.read_text())["model"]
        assert "GET state-spaces/mamba-130m/resolve" in " ".join(requests)
        assert not [r for r in requests if r.endswith("of-00046.bin")]
        fetched = len(requests)
        # The artifact needs the hub no more, neither for its weights nor for its tokenizer.
        done = quamba(closed_port(), "eval", "--task", "lambada_openai", "--data", "bundled", "--limit", "4")
        assert done.returncode == 0, done.stderr
        assert "mamba-130m-w8a8" in done.stdout.splitlines()[0] + done.stderr.splitlines()[0]
        assert "lambada_openai" in done.stdout
        assert len(requests) == fetched
    # What was fetched once is found in the cache when the hub is gone.
    done = quamba(closed_port(), "inspect", "mamba-130m", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "2 blocks, 32 wide, vocabulary 4096" in done.stdout
    assert [p.name for p in quamba.work.iterdir()] == ["mamba-130m-w8a8"]


def one_error(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    *before, last = done.stderr.strip().splitlines()
    assert last.startswith("Error: ")
    assert not [line for line in before if "Error:" in line]
    return last


@pytest.mark.parametrize("way", ["closed port", "offline"])
def test_without_a_network_one_sentence_says_what_was_tried(quamba, way):
    more = {"HF_HUB_OFFLINE": "1"} if way == "offline" else {}
    endpoint = closed_port()
    started = time.monotonic()
    error = one_error(quamba(endpoint, "inspect", "mamba-130m", **more))
    assert time.monotonic() - started < 15
    assert "mamba-130m: no such folder here, and state-spaces/mamba-130m could not be fetched from " + endpoint in error
    assert "nor found in the local cache" in error
    assert error.endswith("without a network, give the path of a folder with config.json and the weights")
    assert list(quamba.work.iterdir()) == []


def test_a_repository_that_is_not_there_or_breaks_off(quamba, repositories):
    with stub_hub(repositories, []) as endpoint:
        error = one_error(quamba(endpoint, "inspect", "nobody/nothing"))
        assert f"{endpoint} has no repository nobody/nothing (or it is private: log in" in error
    with stub_hub(repositories, [], truncate="pytorch_model.bin") as endpoint:
        error = one_error(quamba(endpoint, "inspect", "state-spaces/mamba-130m"))
        assert re.search("state-spaces/mamba-130m could not be fetched from http", error)
    assert list(quamba.work.iterdir()) == []


def test_a_tokenizer_that_cannot_be_fetched(quamba, repositories):
    with stub_hub({"state-spaces/mamba-130m": repositories["state-spaces/mamba-130m"]}, []) as endpoint:
        error = one_error(quamba(endpoint, "quantize", "mamba-130m", "--w8a8", *QUICK))
    assert "no tokenizer for mamba-130m: " in error
    assert "has no repository EleutherAI/gpt-neox-20b" in error
    assert list(quamba.work.iterdir()) == []
