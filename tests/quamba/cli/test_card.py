"""quamba card: measurements in a model card."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from quamba.cli import main
from quamba.formats.card import Card

ACCURACY = {"task": "lambada_openai", "data": "bundled sample", "samples": 500}


def measured(name, perplexity, acc, divergence=None):
    text = {"perplexity": perplexity, "perplexity_stderr": 0.4, "nll": 3.4, "nll_stderr": None}
    metrics = {"acc": {"value": acc, "stderr": 0.01}, "perplexity": {"value": None, "stderr": None}}
    text |= {"divergence": divergence} if divergence else {}
    return {"name": name, "texts": {"wikitext": text}, "tasks": [ACCURACY | {"metrics": metrics}]}


KL = {"mean_kl": 0.00075, "mean_kl_stderr": 0.00001, "p999_kl": 0.012, "p999_kl_stderr": None}
KL |= {"top1_agreement": 0.98, "top1_stderr": 0.001}
RESULTS = {
    "models": [measured("tiny-w8a8", 31.354, 0.1234, KL), measured("tiny", 31.33, 0.125)],
    "reference": "tiny",
}
TABLE = """|  | tiny-w8a8 | tiny |
| --- | --- | --- |
| wikitext: perplexity | 31.35 ± 0.40 | 31.33 ± 0.40 |
| wikitext: KL to tiny, mean, nats a token | 0.0007500 ± 0.0000100 |  |
| wikitext: KL to tiny, 99.9th percentile | 0.01200 |  |
| wikitext: same top token as tiny | 0.9800 ± 0.0010 |  |
| lambada_openai (bundled sample, 500 rows): acc | 0.1234 ± 0.0100 | 0.1250 ± 0.0100 |
| lambada_openai (bundled sample, 500 rows): perplexity |  |  |"""


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "tiny-w8a8")


def test_measurements_go_in_and_are_replaced(copy, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    shown = call("card", copy)
    assert shown.exit_code == 0 and "Nothing yet" in shown.output
    done = call("card", copy, "--results", tmp_path / "results.json")
    assert done.exit_code == 0, done.output
    text = (copy / "README.md").read_text()
    assert TABLE in text and "Nothing yet" not in text and done.output.strip() == text.strip()
    card = ModelCard.load(copy / "README.md")
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("lambada_openai (bundled sample, 500 rows)", "acc"): 0.1234,
        ("wikitext", "perplexity"): 31.354,
    }
    assert call("card", copy, "--results", tmp_path / "results.json").exit_code == 0
    assert (copy / "README.md").read_text() == text
    assert text.count("## Measured") == 1 and "## Licence" in text


def test_what_eval_writes_is_what_card_reads(copy, tmp_path, monkeypatch, tiny_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    shutil.copytree(tiny_folder, "float")
    options = ["--perplexity", "words.txt", "--context", "32", "--tokenizer", "mamba1-nano", "--output", "results.json"]
    done = call("eval", copy, "--against", "float", *options)
    assert done.exit_code == 0, done.output
    done = call("card", copy, "--results", "results.json")
    assert done.exit_code == 0, done.output
    text = (copy / "README.md").read_text()
    assert (
        "|  | tiny-w8a8 | float |" in text
        and "| words.txt: perplexity | " in text
        and "same top token as float" in text
    )


def test_measurements_are_those_of_the_folders_name(copy, tmp_path):
    models = [
        measured("other", 99.0, 0.5, KL),
        measured("out/tiny-w8a8", 31.0, 0.25, KL),
        measured("tiny", 31.33, 0.125),
    ]
    (tmp_path / "results.json").write_text(json.dumps({"models": models, "reference": "tiny"}))
    assert call("card", copy, "--results", tmp_path / "results.json").exit_code == 0
    card = ModelCard.load(copy / "README.md")
    assert {r.metric_value for r in card.data.eval_results} == {31.0, 0.25}
    assert "|  | out/tiny-w8a8 | tiny |" in card.text and "99.0" not in card.text
    copy.rename(tmp_path / "third")
    for several, said in ((models, "other, out/tiny-w8a8"), (models[1:], "out/tiny-w8a8"), (models[2:], "nothing")):
        (tmp_path / "results.json").write_text(json.dumps({"models": several, "reference": "tiny"}))
        done = call("card", tmp_path / "third", "--results", tmp_path / "results.json")
        assert done.exit_code == 1 and f"are of {said}, not of third" in done.output


@pytest.mark.parametrize("data", ["{}", "[]", '{"models": []}', '{"models": [{"name": "x"}]}', "{"])
def test_other_json_is_refused(copy, tmp_path, data):
    (tmp_path / "results.json").write_text(data)
    before = (copy / "README.md").read_bytes()
    done = call("card", copy, "--results", tmp_path / "results.json")
    assert done.exit_code == 1 and "results" in done.output
    assert (copy / "README.md").read_bytes() == before


def test_what_is_no_artifact_has_no_card(tiny):
    done = call("card", tiny())
    assert done.exit_code == 1 and "is no quantized model with a README.md" in done.output


def test_cards_of_other_people_are_read_and_kept(tmp_path):
    for text in ("no front matter", "---\n: [broken\n---\nwords", "---\n- a list\n---\nwords", "---\nlicense: mit\n"):
        (tmp_path / "README.md").write_text(text)
        card = Card.read(tmp_path)
        assert card is not None and card.licence == {} and not card.is_ours
    card = card.with_results("| a |", [])
    assert card.text.endswith("## Measured\n\n<!-- measured -->\n| a |\n<!-- /measured -->\n")
    (tmp_path / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\nwords")
    assert Card.read(tmp_path).licence == {"license": "mit"}
    assert Card.read(tmp_path / "nowhere") is None
