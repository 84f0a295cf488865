import json
import math

import pytest
from rich.console import Console

from quamba.evaluation import Divergence, ModelResults, TaskResult, TextScore, results_dict, results_table
from quamba.evaluation.uncertainty import measured

HITS = {"small": (1, 0, 0, 1), "smaller": (0, 0, 0, 1), "float": (1, 0, 1, 1)}
LOGLIKS = {"small": (-4.0, -6.1, -8.0, -7.0), "smaller": (-4.5, -6.3, -8.3, -7.1), "float": (-4.1, -6.0, -8.2, -7.2)}
NLL = {"small": 3.01, "smaller": 3.2, "float": 3.0}


def model(name):
    hits, logliks = HITS[name], LOGLIKS[name]
    metrics = {
        "acc": measured(sum(hits) / 4, "mean", hits),
        "loglikelihood_per_word": measured(sum(logliks) / 4, "mean", logliks),
    }
    score = TextScore(NLL[name] * 100, 100, NLL[name] ** 2 * 100 + 30)
    found = ModelResults(name, {"t": score}, [TaskResult("lambada_openai", "here", 4, metrics, logliks)])
    if name != "float":
        reference = TextScore(300, 100, 930)
        windows = tuple((NLL[name] * n + shift, 3.0 * n, n) for n, shift in ((40, 0.2), (60, -0.2)))
        found.divergences["t"] = Divergence(0.012, 0.001, 0.5, 0.97, 100, score, reference, 0.04, 0.017, windows)
    return found


THREE = [model("small"), model("smaller"), model("float")]


def printed(*args):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table(*args))
    return console.export_text()


def test_table_of_several_models_shows_values_errors_and_differences():
    text = printed(THREE, "float")
    assert f"{math.exp(3.01):.4f} ±" in text and f"{math.exp(3.2):.4f} ±" in text
    assert f"{100 * (math.exp(0.01) - 1):+.2f} ±" in text
    assert "KL to float" in text and "0.0120 ± 0.0010" in text and "0.9700 ± 0.0170" in text
    assert "0.5000 ± 0.2887" in text  # an accuracy has its standard error beside it
    assert "-0.2500 ± 0.2500" in text  # and a difference the paired one's
    assert "nan" not in text and "None" not in text
    lines = [line.split() for line in text.splitlines()]
    # Every metric names each model once; the reference has no distance to itself.
    assert [sum(name in line for line in lines) for name in ("small", "smaller", "float")] == [6, 6, 3]


def test_without_a_reference_nothing_is_compared():
    text = printed(THREE)
    assert "difference" not in text and "model" in text and "smaller" in text
    assert "difference" not in printed(THREE[:1]) and "small" in printed(THREE[:1])


def test_dict_is_plain_json():
    found = json.loads(json.dumps(results_dict(THREE, "float"), allow_nan=False))
    assert found["reference"] == "float"
    assert [m["name"] for m in found["models"]] == ["small", "smaller", "float"]
    small, _, other = found["models"]
    assert small["texts"]["t"]["perplexity"] == pytest.approx(math.exp(3.01))
    divergence = small["texts"]["t"]["divergence"]
    assert divergence["mean_kl"] == 0.012 and found["divergence"] == {"t": divergence}
    assert divergence["perplexity_change"]["value"] == pytest.approx(math.exp(0.01) - 1)
    metric = small["tasks"][0]["metrics"]["acc"]
    assert metric["value"] == 0.5 and metric["stderr"] == pytest.approx(math.sqrt(1 / 12))
    assert metric["difference"] == {"value": -0.25, "stderr": 0.25, "p": 1.0, "test": "McNemar, exact"}
    assert "divergence" not in other["texts"]["t"] and "difference" not in other["tasks"][0]["metrics"]["acc"]
    assert "difference" not in results_dict(THREE)["models"][0]["tasks"][0]["metrics"]["acc"]


def test_the_error_of_a_change_is_that_of_its_windows():
    change = model("small").divergences["t"].change
    assert change.value == pytest.approx(math.exp(0.01) - 1)
    # The windows' differences from the mean one: +0.2 and -0.2 nats over 100 tokens.
    assert change.stderr == pytest.approx(math.exp(0.01) * math.sqrt(2 * (0.2**2 + 0.2**2)) / 100)
    assert (change.p, change.test) == (0.5, "sign flips, exact")


def test_what_is_not_finite_becomes_null():
    broken = ModelResults("x", {"t": TextScore(1e6, 10, 1e11)})
    found = results_dict([broken])["models"][0]["texts"]["t"]
    assert found["perplexity"] is None and found["nll"] == 1e5
