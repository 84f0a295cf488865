"""lm-eval's `HFLM`, used by hand on the same model, gives the same numbers; and how requests are batched changes none."""

from __future__ import annotations

import datasets
import pytest

import quamba
from quamba import QuambaLMHeadModel
from quamba.evaluation import run_tasks
from quamba.formats import load_tokenizer
from tests.quamba.evaluation.local_tasks import KINDS, write_tasks

LONGEST = 24  # tokens: some rows are cut, and rolled over several windows


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # of lm-eval's bootstrap


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def folders(tiny_folder, tiny_artifact, tmp_path_factory):
    """A float model and a quantized one, as artifacts: what transformers' Auto classes open."""
    plain = tmp_path_factory.mktemp("plain") / "tiny"
    QuambaLMHeadModel.from_pretrained(tiny_folder).save_pretrained(plain)
    load_tokenizer("mamba1-nano").save_pretrained(plain)
    quantized = tmp_path_factory.mktemp("quantized") / "tiny-w8a8"
    quamba.quantize(str(plain), "w8a8", out=quantized, samples=2, seq_len=32)
    return {"float": plain, "w8a8": quantized}


def by_hand(pretrained, tasks, **options):
    """`simple_evaluate` as lm-eval documents it, nothing of quamba's but the import."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=pretrained, device="cpu", max_length=LONGEST, **options)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=list(KINDS), task_manager=manager, bootstrap_iters=10, log_samples=True)


def ours(folder, tasks, **options):
    model, words = QuambaLMHeadModel.from_pretrained(folder), load_tokenizer(str(folder))
    found = run_tasks(model, words, list(KINDS), include=tasks, data=tasks, max_length=LONGEST, **options)
    return {result.task: result for result in found}


@pytest.mark.parametrize("precision", ["float", "w8a8"])
def test_every_kind_of_request_has_hflms_numbers(folders, tasks, precision):
    expected = by_hand(str(folders[precision]), tasks, batch_size=1)
    found = ours(folders[precision], tasks, batch_size=1)
    compared = 0
    for task, result in found.items():
        for name, metric in result.metrics.items():
            if name == "loglikelihood_per_word":  # ours alone
                continue
            assert metric.value == expected["results"][task][f"{name},none"], (task, name)
            error = expected["results"][task][f"{name}_stderr,none"]
            if error != "N/A" and name != "perplexity":  # which lm-eval draws at random
                assert metric.stderr == pytest.approx(error, rel=1e-9), (task, name)
            assert metric.stderr is not None
            compared += 1
    assert compared == 8
    rows = sorted(expected["samples"]["tiny_loglikelihood"], key=lambda row: row["doc_id"])
    assert list(found["tiny_loglikelihood"].logliks) == [row["perplexity"] for row in rows]
    texts = {row["filtered_resps"][0] for row in expected["samples"]["tiny_generation"]}
    assert len(texts) > 1  # the model doesn't write the same whatever it reads


def rows_of(found):
    scores = {task: [m.rows for m in result.metrics.values()] for task, result in found.items()}
    return scores["tiny_loglikelihood"][0], found["tiny_choice"].choices, scores["tiny_rolling"][0]


@pytest.mark.parametrize("precision", ["float", "w8a8"])
def test_batches_and_padding_change_neither_score_nor_text(folders, tasks, precision, monkeypatch):
    from lm_eval.models.huggingface import HFLM

    texts, generate = [], HFLM.generate_until

    def noted(self, requests, disable_tqdm=False):
        texts.append(generate(self, requests, disable_tqdm))
        return texts[-1]

    monkeypatch.setattr(HFLM, "generate_until", noted)
    alone = rows_of(ours(folders[precision], tasks, batch_size=1))
    for size in (3, 64):
        together = rows_of(ours(folders[precision], tasks, batch_size=size))
        # What is left is the order of float32 sums in products over several rows.
        assert together[0] == pytest.approx(alone[0], abs=1e-4)
        assert sum(together[1], ()) == pytest.approx(sum(alone[1], ()), abs=1e-4)
        assert [score for score, _ in together[2]] == pytest.approx([score for score, _ in alone[2]], abs=5e-4)
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 1
