"""A killed evaluation goes on: what was answered is not asked again, and the result is that of a run in one go."""

from __future__ import annotations

import pytest
import torch

from quamba import QuambaLMHeadModel
from quamba.evaluation import compare, evaluate, results_dict, score_text
from quamba.evaluation.kept import Answers
from quamba.formats import load_tokenizer
from tests.quamba.evaluation.local_tasks import KINDS, write_tasks

ROWS = 4
REQUESTS = 6 * ROWS  # one a row, three of the multiple-choice task


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), ROWS)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return QuambaLMHeadModel.from_pretrained(tiny_folder)


def until(limit):
    """Progress that ends the run after so many answers, and the list of (done, total) it was told."""
    calls = []

    def progress(done, total, text):
        calls.append((done, total))
        if len(calls) == limit:
            raise Killed

    return progress, calls


def run(model, tasks, answers=None, progress=None, **options):
    words = load_tokenizer("mamba1-nano")
    found = evaluate(
        {"m": model}, words, list(KINDS), include=tasks, data=tasks, answers=answers, progress=progress, **options
    )
    return results_dict(found)


@pytest.fixture(scope="module")
def whole(model, tasks):
    return run(model, tasks, batch_size=1, max_length=24)


@pytest.mark.parametrize("killed_after", [2, 18, REQUESTS - 1], ids=["log-likelihoods", "rolling", "generation"])
def test_a_killed_run_goes_on(model, tasks, whole, tmp_path, killed_after):
    progress, calls = until(killed_after)
    with pytest.raises(Killed):
        run(model, tasks, Answers(tmp_path), progress, batch_size=1, max_length=24)
    kept = Answers(tmp_path)
    assert kept.left == killed_after
    progress, calls = until(-1)
    assert run(model, tasks, kept, progress, batch_size=1, max_length=24) == whole
    # Each kind of request starts where it was left.
    assert sum(1 for _ in calls) <= REQUESTS - killed_after + len(KINDS)


def test_what_is_known_is_not_asked(model, tasks, whole, tmp_path, monkeypatch):
    assert run(model, tasks, Answers(tmp_path), batch_size=1, max_length=24) == whole
    monkeypatch.setattr(QuambaLMHeadModel, "forward", None)
    monkeypatch.setattr(QuambaLMHeadModel, "generate", None)
    assert run(model, tasks, Answers(tmp_path), batch_size=4, max_length=24) == whole


def test_sampled_texts_are_never_kept(model, tasks, tmp_path):
    from lm_eval.api.instance import Instance

    from quamba.evaluation.lm import language_model

    lm = language_model(model, load_tokenizer("mamba1-nano"), 2, 64, answers=Answers(tmp_path))
    options = {"until": ["\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 5.0}
    request = Instance("generate_until", {}, ("Once upon a time", options), 0)
    torch.manual_seed(0)
    texts = {lm.generate_until([request])[0] for _ in range(4)}
    assert len(texts) > 1 and Answers(tmp_path).left == 0


def test_texts_go_on_window_by_window(model, tmp_path):
    ids = torch.randint(0, 4096, (100,), generator=torch.Generator().manual_seed(0))
    options = {"context": 16, "batch_size": 2}
    other = QuambaLMHeadModel.from_pretrained("mamba1-nano", dtype="float32")
    for measure in (
        lambda **more: score_text(model, ids, **options, **more),
        lambda **more: compare(model, other, ids, **options, **more),
    ):
        whole = measure()
        progress, calls = until(2)
        with pytest.raises(Killed):
            measure(answers=Answers(tmp_path).of("x/"), progress=progress)
        progress, calls = until(-1)
        assert measure(answers=Answers(tmp_path).of("x/"), progress=progress) == whole
        assert len(calls) == 4  # three of two windows and the tail
        assert measure(answers=Answers(tmp_path).of("y/")) == whole  # another model's answers are not ours
