import math
import random

import pytest

from quamba.evaluation.uncertainty import (
    GROUPS,
    Metric,
    contributions,
    difference,
    jackknife,
    mean_and_stderr,
    measured,
)

SOURCE = random.Random(0)
N = 400
LOGLIKS = [-abs(SOURCE.gauss(3, 1)) for _ in range(N)]
WEIGHTS = [SOURCE.randint(5, 60) for _ in range(N)]
PAIRS = [(score * weight, weight) for score, weight in zip(LOGLIKS, WEIGHTS, strict=True)]


def mean(rows):
    return sum(rows) / len(rows)


def weighted(rows):
    return sum(score for score, _ in rows) / sum(weight for _, weight in rows)


METRICS = {
    "mean": (LOGLIKS, mean),
    "perplexity": (LOGLIKS, lambda rows: math.exp(-mean(rows))),
    "weighted": (PAIRS, lambda rows: math.exp(-weighted(rows))),
    "bits": (PAIRS, lambda rows: -weighted(rows) / math.log(2)),
}


def spread_by_leaving_out(rows, metric):
    """The jackknife's standard error, one row at a time: n evaluations, no formula."""
    values = [metric(rows[:i] + rows[i + 1 :]) for i in range(len(rows))]
    centre = mean(values)
    return math.sqrt((len(rows) - 1) / len(rows) * sum((v - centre) ** 2 for v in values))


@pytest.mark.parametrize("kind", METRICS)
def test_standard_errors_are_the_jackknifes(kind):
    rows, metric = METRICS[kind]
    found = measured(metric(rows), kind, rows)
    # Exact for a mean, to first order (1/n) for the others.
    assert found.stderr == pytest.approx(spread_by_leaving_out(rows, metric), rel=1e-9 if kind == "mean" else 0.02)


@pytest.mark.parametrize("kind", METRICS)
def test_the_error_of_a_difference_is_the_jackknifes(kind):
    rows, metric = METRICS[kind]
    noise = [SOURCE.gauss(0.05, 0.1) for _ in range(N)]
    other = [(r[0] + e * r[1], r[1]) if isinstance(r, tuple) else r + e for r, e in zip(rows, noise, strict=True)]
    found = difference(measured(metric(other), kind, other), measured(metric(rows), kind, rows))
    both = list(zip(other, rows, strict=True))

    def change(pairs):
        return metric([a for a, _ in pairs]) - metric([b for _, b in pairs])

    assert found.value == pytest.approx(change(both))
    assert found.stderr == pytest.approx(spread_by_leaving_out(both, change), rel=1e-9 if kind == "mean" else 0.05)
    assert found.stderr < measured(metric(rows), kind, rows).stderr / 3
    assert 0 < found.p < 0.01 and found.test == "sign flips, 10,000 draws"


def test_pseudo_values_of_a_mean_are_the_rows():
    rows = LOGLIKS[:GROUPS]
    assert jackknife(mean, rows) == pytest.approx(rows)
    assert measured(mean(rows), "groups", jackknife(mean, rows)).stderr == pytest.approx(mean_and_stderr(rows)[1])


def test_many_rows_are_left_out_in_groups():
    calls = []

    def counted(rows):
        calls.append(len(rows))
        return mean(rows)

    found = jackknife(counted, LOGLIKS)
    assert len(found) == GROUPS and len(calls) == GROUPS + 1
    assert set(calls[1:]) == {N - N // GROUPS}
    error = measured(mean(LOGLIKS), "groups", found).stderr
    assert error == pytest.approx(mean_and_stderr(LOGLIKS)[1], rel=0.3)  # a spread estimated from 100 values


def test_accuracies_are_tested_by_mcnemar():
    a, b = measured(0.75, "mean", [1, 1, 1, 0]), measured(0.25, "mean", [0, 0, 1, 0])
    found = difference(a, b)
    assert (found.value, found.test, found.p) == (0.5, "McNemar, exact", 0.5)
    assert found.stderr == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))


def test_without_matching_rows_there_is_neither_error_nor_test():
    a = measured(0.5, "mean", [1, 0])
    for b in (Metric(0.25, 0.1), measured(0.3, "mean", [1, 0, 0]), measured(2.0, "perplexity", [-1.0, -1.0])):
        found = difference(a, b)
        assert (found.value, found.stderr, found.p) == (0.5 - b.value, None, None)
    assert measured(1.0, "mean", [1]).stderr is None


def test_contributions_average_to_a_mean():
    assert contributions(mean(LOGLIKS), "mean", LOGLIKS) == LOGLIKS
    assert mean(contributions(METRICS["weighted"][1](PAIRS), "weighted", PAIRS)) == pytest.approx(0, abs=1e-9)
