"""quamba card: measurements in a model card."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from quamba.cli import main
from quamba.formats.card import Card

RESULTS = {
    "models": [
        {
            "name": "tiny-w8a8",
            "texts": {"wikitext": {"perplexity": 31.354, "perplexity_stderr": 0.4, "nll": 3.4, "nll_stderr": None}},
            "tasks": [
                {
                    "task": "lambada_openai",
                    "data": "bundled sample",
                    "samples": 500,
                    "metrics": {
                        "acc": {"value": 0.1234, "stderr": 0.01},
                        "perplexity": {"value": None, "stderr": None},
                    },
                }
            ],
        },
        {
            "name": "tiny",
            "texts": {"wikitext": {"perplexity": 31.33, "perplexity_stderr": 0.4, "nll": 3.4, "nll_stderr": None}},
            "tasks": [
                {
                    "task": "lambada_openai",
                    "data": "bundled sample",
                    "samples": 500,
                    "metrics": {"acc": {"value": 0.125, "stderr": 0.01}, "perplexity": {"value": None, "stderr": None}},
                }
            ],
        },
    ],
    "divergence": {"wikitext": {"mean_kl": 0.00075, "p999_kl": 0.012, "top1_agreement": 0.98}},
}
TABLE = """|  | tiny-w8a8 | tiny |
| --- | --- | --- |
| wikitext: perplexity | 31.35 | 31.33 |
| wikitext: KL to tiny, mean, nats a token | 0.0007500 |  |
| wikitext: KL to tiny, 99.9th percentile | 0.01200 |  |
| wikitext: same top token as tiny | 0.9800 |  |
| lambada_openai (bundled sample, 500 rows): acc | 0.1234 ± 0.0100 | 0.1250 ± 0.0100 |
| lambada_openai (bundled sample, 500 rows): perplexity |  |  |"""


def call(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "copy")


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


def test_what_eval_writes_is_what_card_reads(copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("It was the best of times, it was the worst of times. " * 20)
    done = call("eval", copy, "--perplexity", "words.txt", "--context", "32", "--output", "results.json")
    if done.exit_code != 0:  # the shared artifact has no tokenizer in some layouts
        pytest.skip(done.output)
    done = call("card", copy, "--results", "results.json")
    assert done.exit_code == 0, done.output
    assert "| words.txt: perplexity | " in (copy / "README.md").read_text()


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
