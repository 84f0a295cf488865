"""Calibration text to windows of tokens."""

import hashlib
import time

import pytest
import torch

from quamba import bundled
from quamba.errors import DataError
from quamba.formats import load_tokenizer
from quamba.quantizer.calibration import calibration_set, given_ids

WORDS = " ".join(f"word{i}" for i in range(200))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("mamba1-nano")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS, encoding="utf-8")
    return str(path)


def windows(source, tokenizer, vocab=4096, **options):
    return calibration_set(source, tokenizer, vocab, **({"samples": 3, "seq_len": 16, "seed": 0} | options))


def test_windows_are_consecutive_pieces_of_the_text_in_its_order(tokenizer, text):
    ids = tokenizer(WORDS)["input_ids"]
    count = len(ids) // 16
    pieces = [ids[16 * i : 16 * i + 16] for i in range(count)]
    found = windows(text, tokenizer, samples=1000)
    assert found.ids.dtype == torch.int64
    assert found.ids.tolist() == pieces  # all of them, the tail cut off
    some = windows(text, tokenizer, samples=5).ids.tolist()
    places = [pieces.index(window) for window in some]
    assert len(places) == 5
    assert places == sorted(set(places))


def test_the_seed_chooses_and_decides_alone(tokenizer, text):
    first, again, other = (windows(text, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids)
    assert first.provenance == again.provenance
    assert not torch.equal(first.ids, other.ids)
    assert first.provenance["sha256"] != other.provenance["sha256"]


def test_provenance_says_what_was_read_but_not_where(tokenizer, text):
    found = windows(text, tokenizer)
    sha = hashlib.sha256(found.ids.numpy().tobytes()).hexdigest()
    expected = {"source": "text.txt", "samples": 3, "seq_len": 16, "seed": 0, "sha256": sha}
    assert found.provenance == expected


def test_the_bundled_text_gives_the_default_amount(tokenizer):
    found = windows("bundled", tokenizer, samples=128, seq_len=512)
    assert found.ids.shape == (128, 512)
    assert found.provenance["source"] == "bundled"
    assert tokenizer.decode(found.ids[0][:40]).strip() in bundled.calibration_text()


def test_too_short(tokenizer, text):
    tokens = len(tokenizer(WORDS)["input_ids"])
    assert windows(text, tokenizer, seq_len=tokens).ids.shape == (1, tokens)
    with pytest.raises(
        DataError, match=f"has {tokens} tokens, less than one window of {tokens + 1}.*smaller --seq-len"
    ):
        windows(text, tokenizer, seq_len=tokens + 1)


@pytest.mark.parametrize("content", [b"", b" \n\t\n "])
def test_empty(tokenizer, tmp_path, content):
    (tmp_path / "empty.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"empty\.txt is empty"):
        windows(str(tmp_path / "empty.txt"), tokenizer)


def test_ids_beyond_the_vocabulary(tokenizer, text):
    largest = max(tokenizer(WORDS)["input_ids"])
    assert windows(text, tokenizer, vocab=largest + 1).ids.numel()
    with pytest.raises(DataError, match=f"id {largest}, but the model's vocabulary has {largest} entries.*--tokenizer"):
        windows(text, tokenizer, vocab=largest)


def test_unreadable(tokenizer, tmp_path):
    (tmp_path / "latin.txt").write_bytes("Äther".encode("latin-1"))
    for name in ("absent.txt", "latin.txt", "."):
        with pytest.raises(DataError, match="can't read calibration text"):
            windows(str(tmp_path / name), tokenizer)


def test_token_ids_of_the_caller():
    ids = torch.tensor([[0, 5], [63, 2]], dtype=torch.int32)
    found = given_ids(ids, 64, seed=4)
    assert torch.equal(found.ids, ids.long())
    assert (found.provenance["samples"], found.provenance["seq_len"], found.provenance["seed"]) == (2, 2, 4)
    for bad, why in (
        (ids.float(), "must be integers"),
        (ids[0], "must be integers"),
        (ids[:0], "must be integers"),
        (ids + 1, r"must lie in 0\.\.63"),
        (ids - 1, r"must lie in 0\.\.63"),
    ):
        with pytest.raises(DataError, match=why):
            given_ids(bad, 64, seed=0)


def test_a_hub_data_set_without_a_network_ends_in_one_sentence(tokenizer, monkeypatch, tmp_path):
    import datasets
    import huggingface_hub.constants

    # What HF_HUB_OFFLINE=1 sets when the libraries are imported.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        windows("hf:nobody/nothing", tokenizer)
    assert time.monotonic() - started < 5
    message = str(caught.value)
    assert message.startswith("can't load data set nobody/nothing from the hub (")
    assert message.endswith("; without a network use --calibration bundled or a text file")
    assert "\n" not in message
