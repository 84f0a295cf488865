"""Our results in lm-eval's files: written by its tracker, read by its tools, of the same form as its own."""

from __future__ import annotations

import copy
import json

import datasets
import pytest

from quamba import QuambaLMHeadModel
from quamba.errors import QuambaError
from quamba.evaluation import evaluate
from quamba.evaluation.lm_eval_files import save_for_lm_eval
from quamba.formats import load_tokenizer
from tests.quamba.evaluation.local_tasks import KINDS, SENTENCES, write_tasks


@pytest.fixture(scope="module")
def results(tiny_folder, tmp_path_factory):
    tasks = write_tasks(tmp_path_factory.mktemp("tasks"))
    model = QuambaLMHeadModel.from_pretrained(tiny_folder)
    words = load_tokenizer("mamba1-nano")
    (found,) = evaluate({"tiny": model}, words, list(KINDS), include=tasks, data=tasks, max_length=24)
    return lambda: copy.deepcopy(found)  # writing the files changes them


def test_lm_evals_tools_read_them(results, tmp_path):
    from lm_eval.utils import (
        get_file_datetime,
        get_file_task_name,
        get_results_filenames,
        get_sample_results_filenames,
        make_table,
    )

    measured = results()
    file = save_for_lm_eval(measured, "me/tiny", tmp_path)
    assert file.parent == tmp_path / "me__tiny"
    names = [str(path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert get_results_filenames(names) == [str(file)]
    samples = get_sample_results_filenames(names)
    assert sorted(get_file_task_name(name.rsplit("/", 1)[1]) for name in samples) == sorted(KINDS)
    dates = {get_file_datetime(name.rsplit("/", 1)[1]).removesuffix(".json") for name in names}
    assert len(dates) == 1

    found = json.loads(file.read_text())
    table = make_table(found)
    for task in measured.tasks:
        assert task.task in table
        for name, metric in task.metrics.items():
            if name != "loglikelihood_per_word":
                assert found["results"][task.task][f"{name},none"] == metric.value
                assert found["results"][task.task][f"{name}_stderr,none"] == metric.stderr
                assert f"{metric.value:.4f}" in table and f"{metric.stderr:.4f}" in table
    assert "N/A" not in table
    assert found["config"]["model_args"] == {"pretrained": "me/tiny"}
    assert (found["model_source"], found["model_name"]) == ("quamba", "me/tiny")
    assert set(found["task_hashes"]) == set(KINDS)


def test_samples_load_as_data_sets(results, tmp_path):
    save_for_lm_eval(results(), "tiny", tmp_path)
    for task, config in KINDS.items():
        (file,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
        assert sorted(rows["doc_id"]) == list(range(len(SENTENCES)))
        assert len(rows[0]["arguments"]) == (3 if config["output_type"] == "multiple_choice" else 1)


def test_they_have_all_that_lm_evals_own_have(results, tmp_path, tiny_folder):
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = write_tasks(tmp_path / "tasks")
    model = HFLM(
        pretrained=QuambaLMHeadModel.from_pretrained(tiny_folder),
        tokenizer=load_tokenizer("mamba1-nano"),
        max_length=24,
    )
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(
        model, tasks=["tiny_choice"], task_manager=manager, bootstrap_iters=0, evaluation_tracker=tracker
    )
    samples = theirs.pop("samples")
    tracker.save_results_aggregated(theirs, samples)
    tracker.save_results_samples("tiny_choice", samples["tiny_choice"])
    (theirs_file,) = (tmp_path / "theirs").rglob("results_*.json")
    ours_file = save_for_lm_eval(results(), "tiny", tmp_path / "ours")
    theirs, ours = json.loads(theirs_file.read_text()), json.loads(ours_file.read_text())
    # What describes the machine is left out.
    assert set(theirs) - set(ours) == {"pretty_env_info", "upper_git_hash"}
    assert set(theirs["config"]) <= set(ours["config"])
    (theirs_rows,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    (ours_rows,) = (tmp_path / "ours").rglob("samples_tiny_choice_*.jsonl")
    first = [json.loads(file.read_text().splitlines()[0]) for file in (theirs_rows, ours_rows)]
    assert set(first[0]) == set(first[1])
    assert [row["doc_hash"] for row in first] == [first[0]["doc_hash"]] * 2


def test_what_cannot_be_written_is_said(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QuambaError, match="can't write lm-eval's files"):
        save_for_lm_eval(results(), "tiny", tmp_path / "file")
