"""`quamba doctor`: each check of its short run can fail, and fails for its own reason."""

from __future__ import annotations

import json

import pytest
import torch

from quamba.doctor.run import try_out
from quamba.model import QuambaLMHeadModel
from tests.quamba.cli.test_doctor import CHECKS, call, diagnosis
from tests.quamba.models import random_model

FORWARD = QuambaLMHeadModel.forward


def forget_the_state(self, input_ids=None, **kwargs):
    return FORWARD(self, input_ids, **kwargs | {"past_key_values": None})


def ignore_the_prompt(self, input_ids=None, **kwargs):
    out = FORWARD(self, input_ids, **kwargs)
    out.logits = FORWARD(self, torch.zeros_like(input_ids)).logits
    return out


def ignore_the_mask(self, input_ids=None, **kwargs):
    return FORWARD(self, input_ids, **kwargs | {"attention_mask": None})


def answer_nan(self, input_ids=None, **kwargs):
    out = FORWARD(self, input_ids, **kwargs)
    out.logits = out.logits * torch.nan
    return out


def save_another(self, folder, **kwargs):
    from quamba.formats import save_model

    weight = self.backbone.layers[1].mixer.D
    kept = weight.clone()
    weight.add_(0.01)
    save_model(self, folder)
    weight.copy_(kept)


FAULTS = {
    "forgotten state": ("forward", forget_the_state, {"state hand-off"}, {"left padding", "save and load"}),
    "ignored prompt": ("forward", ignore_the_prompt, {"prompt sensitivity"}, {"save and load"}),
    "ignored mask": ("forward", ignore_the_mask, {"left padding"}, {"state hand-off", "prompt sensitivity"}),
    "changed when saved": ("save_pretrained", save_another, {"save and load"}, set(CHECKS[:4])),
    "NaN": ("forward", answer_nan, set(CHECKS), set()),
}


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
@pytest.mark.parametrize(("method", "fault", "fail", "stand"), FAULTS.values(), ids=FAULTS.keys())
def test_each_check_can_fail(monkeypatch, family, method, fault, fail, stand):
    from quamba.doctor import Diagnosis

    model = random_model(family)
    monkeypatch.setattr(QuambaLMHeadModel, method, fault)
    found = Diagnosis("x")
    try_out(model, found)
    failed = {check.name for check in found.checks if not check.passed}
    assert fail <= failed and not failed & stand, found.checks
    assert (found.verdict, found.exit_code) == ("broken", 2)


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_a_state_that_forgets_at_once_is_found(family):
    """Nothing is wrong with the numbers of such a model; what is left of it sees the convolutions' few tokens."""
    from quamba.doctor import Diagnosis

    model, found = random_model(family), Diagnosis("x")
    for block in model.backbone.layers:
        block.mixer.A_log.data.fill_(30.0)
    try_out(model, found)
    assert [check.name for check in found.checks if not check.passed] == ["prompt sensitivity"]


@pytest.mark.parametrize("family", ["mamba1", "mamba2"])
def test_beams_that_keep_their_states_are_found(monkeypatch, family):
    from quamba.doctor import Diagnosis
    from quamba.state import QuambaState

    model, found = random_model(family), Diagnosis("x")
    monkeypatch.setattr(QuambaState, "reorder_cache", lambda self, rows: None)
    try_out(model, found)
    assert [check.name for check in found.checks if not check.passed] == ["two beams"]


def test_a_fault_in_a_run_is_exit_code_2(tiny_folder, monkeypatch):
    monkeypatch.setattr(QuambaLMHeadModel, "forward", ignore_the_mask)
    result = call(tiny_folder)
    assert result.exit_code == 2
    assert "  FAILED: left padding: padded and alone differ by" in result.stdout
    assert diagnosis(tiny_folder)["verdict"] == "broken"

    def crash(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(QuambaLMHeadModel, "forward", crash)
    found = diagnosis(tiny_folder)
    assert found["verdict"] == "broken" and "cannot be multiplied" in json.dumps(found)


def test_a_vocabulary_of_one_token(tmp_path):
    model = random_model("mamba1", vocab=1)
    model.save_pretrained(tmp_path / "one")
    assert diagnosis(tmp_path / "one")["verdict"] == "healthy"
