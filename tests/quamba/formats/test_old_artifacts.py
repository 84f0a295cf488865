"""Artifacts of earlier times, kept as files: they load, and say what they said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quamba import QuambaLMHeadModel
from quamba.errors import CheckpointError
from quamba.formats import convert

FOLDER = Path(__file__).parent / "artifacts"
EXPECTED = load_file(FOLDER / "logits.safetensors")
NAMES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", NAMES)
def test_an_artifact_says_what_it_said(tmp_path, name):
    model = QuambaLMHeadModel.from_pretrained(FOLDER / name, strict=True)
    torch.testing.assert_close(model(EXPECTED["ids"]).logits, EXPECTED[name], rtol=1e-4, atol=1e-4)
    convert(str(FOLDER / name), tmp_path / "now")
    now = QuambaLMHeadModel.from_pretrained(tmp_path / "now", verify=True)
    assert torch.equal(now(EXPECTED["ids"]).logits, model(EXPECTED["ids"]).logits)


def test_those_without_hashes_cannot_be_verified():
    with pytest.raises(CheckpointError, match="records no hashes"):
        QuambaLMHeadModel.from_pretrained(FOLDER / "mamba1-w8a8-first", verify=True)
    QuambaLMHeadModel.from_pretrained(FOLDER / "mamba2-w4a8", verify=True)
