import json
import math

import pytest
from rich.console import Console

from quamba.evaluation import Divergence, TaskResult, TextScore, results_dict, results_table
from quamba.evaluation.harness import Metric
from quamba.evaluation.report import ModelResults, paired_difference


def model(name, nll, logliks):
    mean = sum(logliks) / len(logliks)
    metrics = {"acc": Metric(0.25, 0.1), "loglikelihood_per_word": Metric(mean, 0.5)}
    score = TextScore(nll * 100, 100, nll * nll * 100 + 30)
    return ModelResults(name, {"t": score}, [TaskResult("lambada_openai", "here", len(logliks), metrics, logliks)])


TWO = [model("small", 3.01, (-4.0, -6.1, -8.0)), model("float", 3.0, (-4.1, -6.0, -8.2))]
KL = {"t": Divergence(0.012, 0.001, 0.5, 0.97, 100, TextScore(301, 100, 1000), TextScore(300, 100, 1000))}


def test_paired_difference_is_mean_and_error_of_the_differences():
    mean, error = paired_difference((-4.0, -6.1, -8.0), (-4.1, -6.0, -8.2))
    differences = [0.1, -0.1, 0.2]
    centre = sum(differences) / 3
    assert mean == pytest.approx(centre)
    assert error == pytest.approx(math.sqrt(sum((d - centre) ** 2 for d in differences) / 2 / 3))


def printed(*args):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(*args))
    return console.export_text()


def test_table_of_two_models_shows_values_errors_and_differences():
    text = printed(TWO, KL)
    assert "small" in text and "float" in text and "difference" in text
    assert f"{math.exp(3.01):.4f} ±" in text
    assert f"{100 * (math.exp(0.01) - 1):+.2f} %" in text
    assert "0.0120 ± 0.0010" in text and "0.9700" in text
    assert "0.2500 ± 0.1000" in text  # an accuracy has its standard error beside it
    assert "+0.0667" in text and "nan" not in text


def test_table_of_one_model_has_no_difference():
    assert "difference" not in printed(TWO[:1])


def test_dict_is_plain_json():
    found = json.loads(json.dumps(results_dict(TWO, KL), allow_nan=False))
    assert [m["name"] for m in found["models"]] == ["small", "float"]
    assert found["models"][0]["texts"]["t"]["perplexity"] == pytest.approx(math.exp(3.01))
    assert found["models"][0]["tasks"][0]["metrics"]["acc"] == {"value": 0.25, "stderr": 0.1}
    assert found["divergence"]["t"]["mean_kl"] == 0.012


def test_what_is_not_finite_becomes_null():
    broken = ModelResults("x", {"t": TextScore(1e6, 10, 1e11)})
    found = results_dict([broken])["models"][0]["texts"]["t"]
    assert found["perplexity"] is None and found["nll"] == 1e5
