import json
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from torch import nn

from quamba import bundled
from quamba.errors import DataError, QuambaError
from quamba.evaluation import run_tasks
from quamba.evaluation.catalogue import catalogue, task_config, template_columns
from quamba.formats import load_tokenizer
from tests.quamba.evaluation.local_tasks import write_tasks

TEXTS = [json.loads(line)["text"] for line in bundled.sample("lambada_openai").read_text("utf-8").splitlines()]
ROWS = 6


class Scripted(nn.Module):
    """Knows the rows by heart and gives the next token, plus `off`, a score `gap` above the rest.

    It has what lm-eval asks of a model: config, device, tie_weights, eval, and logits of input ids.
    """

    def __init__(self, tokenizer, texts, off=0, gap=30.0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(tokenizer), model_type="scripted")
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.gap = gap
        self.next = {}
        for text in texts:
            ids = tokenizer.encode(text)
            for i in range(1, len(ids)):
                self.next[tuple(ids[:i])] = (ids[i] + off) % len(tokenizer)

    def tie_weights(self):
        pass

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        for row, ids in enumerate(input_ids.tolist()):
            for i in range(len(ids)):
                logits[row, i, self.next.get(tuple(ids[: i + 1]), 0)] = self.gap
        return SimpleNamespace(logits=logits)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("mamba1-nano")


def lambada(model, tokenizer, **options):
    options = {"limit": ROWS, "data": "bundled", **options}
    return run_tasks(model, tokenizer, ["lambada_openai"], **options)[0]


def targets(tokenizer):
    """Number of tokens of each row's last word, as they stand in the whole row."""
    return [len(tokenizer.encode(t)) - len(tokenizer.encode(t.rsplit(" ", 1)[0])) for t in TEXTS[:ROWS]]


def test_an_oracle_scores_all_and_a_wrong_model_nothing(tokenizer):
    right = lambada(Scripted(tokenizer, TEXTS[:ROWS]), tokenizer)
    assert (right.metrics["acc"].value, right.metrics["acc"].stderr, right.samples) == (1, 0, ROWS)
    assert right.metrics["perplexity"].value == pytest.approx(1, abs=1e-4)
    wrong = lambada(Scripted(tokenizer, TEXTS[:ROWS], off=1), tokenizer)
    assert wrong.metrics["acc"].value == 0
    token = 30 + math.log1p((len(tokenizer) - 1) * math.exp(-30))  # of a token that is not the favourite
    assert wrong.logliks == pytest.approx([-n * token for n in targets(tokenizer)], rel=1e-5)


def test_errors_are_those_of_the_rows(tokenizer):
    half = lambada(Scripted(tokenizer, TEXTS[: ROWS // 2], gap=3.0), tokenizer)
    accuracy = half.metrics["acc"]
    assert accuracy.value == 0.5
    assert accuracy.stderr == pytest.approx(math.sqrt(0.25 * ROWS / (ROWS - 1) / ROWS))
    mean = sum(half.logliks) / ROWS
    error = math.sqrt(sum((x - mean) ** 2 for x in half.logliks) / (ROWS - 1) / ROWS)
    words = half.metrics["loglikelihood_per_word"]
    assert (words.value, words.stderr) == (pytest.approx(mean), pytest.approx(error))
    perplexity = half.metrics["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-mean))
    assert perplexity.stderr == pytest.approx(perplexity.value * error)


def test_batch_size_does_not_change_scores(tokenizer):
    model = Scripted(tokenizer, TEXTS[:3], gap=5.0)
    assert lambada(model, tokenizer, batch_size=1).logliks == lambada(model, tokenizer, batch_size=4).logliks


def test_half_precision_logits_are_scored_in_float32(tokenizer):
    model = Scripted(tokenizer, TEXTS[:3], gap=5.0)
    exact, forward = lambada(model, tokenizer).logliks, model.forward
    model.forward = lambda ids: SimpleNamespace(logits=forward(ids).logits.half())  # 5 and 0 are exact
    assert lambada(model, tokenizer).logliks == exact


def test_a_quantized_model_runs(tiny_artifact, tokenizer):
    from quamba import QuambaLMHeadModel

    result = lambada(QuambaLMHeadModel.from_pretrained(tiny_artifact), tokenizer, limit=2)
    assert result.samples == 2 and math.isfinite(result.metrics["loglikelihood_per_word"].value)


def test_it_is_silent_counts_and_leaves_no_cache(tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    monkeypatch.chdir(tmp_path)  # no git repository
    calls = []
    result = lambada(Scripted(tokenizer, TEXTS[:ROWS]), tokenizer, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(i + 1, ROWS) for i in range(ROWS)]
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "home").exists()
    assert result.data == "bundled sample of 5,153 rows"


def test_it_is_silent_where_lm_eval_reads_the_data(tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home")
    tasks = write_tasks(tmp_path / "tasks", rows=2)
    run_tasks(Scripted(tokenizer, []), tokenizer, ["tiny_loglikelihood"], include=tasks)
    assert capfd.readouterr() == ("", "") and (tmp_path / "home").exists()
    assert not datasets.utils.are_progress_bars_disabled()


def test_rows_go_to_the_split_the_task_evaluates(tokenizer, tmp_path):
    rows = [{"goal": "to boil water", "sol1": "heat it", "sol2": "cool it", "label": i % 2} for i in range(4)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["Question: to boil water\nAnswer: heat it"]
    found = run_tasks(Scripted(tokenizer, texts), tokenizer, ["piqa"], data=tmp_path)[0]
    assert found.metrics["acc"].value == 0.5 and found.metrics["acc"].stderr == pytest.approx(math.sqrt(0.25 / 3))


def refused(tokenizer, task="lambada_openai", **options):
    with pytest.raises(DataError) as caught:
        run_tasks(None, tokenizer, [task], **options)
    return str(caught.value)


def test_unknown_tasks_and_groups_are_named(tokenizer):
    assert "lambada_openai" in refused(tokenizer, "lambada_opnai")
    assert "group" in refused(tokenizer, "mmlu")


def test_unusable_data_is_named(tokenizer, tmp_path):
    assert "no folder" in refused(tokenizer, data=tmp_path / "gone")
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a"}\n')
    message = refused(tokenizer, data=tmp_path)
    assert "lambada_openai.jsonl" in message and "piqa.jsonl" in message
    message = refused(tokenizer, "piqa", data=tmp_path)
    assert "line 1" in message and "label, sol1, sol2" in message
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "a b"}\n[1]\n')
    assert "line 2" in refused(tokenizer, data=tmp_path)
    (tmp_path / "lambada_openai.jsonl").write_text("")
    assert "empty" in refused(tokenizer, data=tmp_path)


def test_without_network_both_ways_are_named(tokenizer):
    with pytest.raises(DataError, match=r"--data DIR.*--data bundled"):
        run_tasks(Scripted(tokenizer, TEXTS[:1]), tokenizer, ["lambada_openai"])


def test_a_foreign_tokenizer_and_nan_are_refused(tokenizer):
    model = Scripted(tokenizer, TEXTS[:1])
    model.gap = math.nan
    with pytest.raises(QuambaError, match="NaN"):
        lambada(model, tokenizer, limit=1)
    model.config.vocab_size = 10
    with pytest.raises(DataError, match="vocabulary has 10"):
        lambada(model, tokenizer, limit=1)


def test_the_catalogue_reads_includes_functions_and_columns():
    config = task_config(catalogue().tasks["hellaswag"])
    assert config["process_docs"] == "utils.process_docs" and template_columns(config) == set()
    assert template_columns(task_config(catalogue().tasks["piqa"])) == {"goal", "sol1", "sol2", "label"}
    assert task_config(catalogue().tasks["lambada_standard"])["task"] == "lambada_standard"
