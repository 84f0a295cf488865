import itertools
import math
import random

import pytest

from quamba.evaluation.significance import ALL_UP_TO, DRAWS, mcnemar, p_value, sign_flips


def exchanged(a, b):
    """The p value by its definition: all ways to exchange the rows' two scores."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    found = abs(sum(differences)) - 1e-9
    ways = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in flips(len(a))]
    return sum(way >= found for way in ways) / len(ways)


def flips(n):
    return itertools.product((1, -1), repeat=n)


@pytest.mark.parametrize("seed", range(12))
def test_mcnemar_is_the_exchange_of_0_and_1(seed):
    source = random.Random(seed)
    a, b = ([source.randint(0, 1) for _ in range(11)] for _ in "ab")
    assert mcnemar(a, b) == pytest.approx(exchanged(a, b), rel=1e-12)
    assert mcnemar(a, b) == mcnemar(b, a) == mcnemar([bool(x) for x in a], [float(x) for x in b])


def test_mcnemar_by_hand():
    # 8 rows won, 1 lost: 2 (1 + 9) / 2^9
    assert mcnemar([1] * 8 + [0] + [1] * 50, [0] * 8 + [1] + [1] * 50) == 20 / 512
    assert mcnemar([1, 0, 1], [1, 0, 1]) == mcnemar([1, 0], [0, 1]) == 1
    assert mcnemar([1] * 2000, [0] * 2000) == pytest.approx(2.0**-1999) or mcnemar([1] * 2000, [0] * 2000) == 0


def test_mcnemar_of_many_rows_is_scipys_binomial_test():
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in ((30, 45), (700, 640), (2500, 2600)):
        expected = stats.binomtest(wins, wins + losses).pvalue
        assert mcnemar([1] * wins + [0] * losses, [0] * wins + [1] * losses) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_few_rows_are_exchanged_in_all_ways(seed):
    source = random.Random(seed)
    a, b = ([source.choice((0.0, 0.5, 1.25, 3.0)) for _ in range(10)] for _ in "ab")  # with ties
    p, exact = sign_flips([x - y for x, y in zip(a, b, strict=True)])
    assert exact and p == pytest.approx(exchanged(a, b), rel=1e-12)


def test_rows_without_a_difference_say_nothing():
    differences = [0.3, -0.1, 0.25, 0.7, 0.05]
    assert sign_flips(differences + [0.0] * 1000) == sign_flips(differences)
    assert sign_flips([0.0] * 5) == (1.0, True)


def test_many_rows_are_drawn_and_always_the_same():
    source = random.Random(1)
    differences = [source.gauss(0.05, 1) for _ in range(900)]
    p, exact = sign_flips(differences)
    assert not exact and sign_flips(differences) == (p, False)
    mean, spread = sum(differences) / 900, math.sqrt(sum(d * d for d in differences)) / 900
    normal = math.erfc(abs(mean) / spread / math.sqrt(2))  # the flips' sum is normal for so many rows
    assert p == pytest.approx(normal, abs=4 * math.sqrt(normal * (1 - normal) / DRAWS))
    assert sign_flips([1.0] * 100)[0] == 1 / (1 + DRAWS)


def test_exact_and_drawn_agree_where_they_meet():
    source = random.Random(5)
    differences = [source.gauss(0.3, 1) for _ in range(ALL_UP_TO)]
    exact, drawn = sign_flips(differences)[0], sign_flips([*differences, 1e-9])[0]
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / DRAWS))


def test_equal_models_are_told_apart_no_more_often_than_promised():
    source = random.Random(2)
    ps = [sign_flips([source.gauss(0, 1) for _ in range(12)])[0] for _ in range(400)]
    for level in (0.05, 0.2, 0.5):
        assert sum(p <= level for p in ps) / 400 <= level + 4 * math.sqrt(level * (1 - level) / 400)


def test_the_test_follows_the_scores():
    assert p_value([1, 0, 1], [0, 0, 1]) == (1.0, "McNemar, exact")
    assert p_value([1.5, 0, 1], [0, 0, 1]) == (1.0, "sign flips, exact")
    many = [float(i % 7) for i in range(50)]
    assert p_value(many, [x + 1 for x in many])[1] == "sign flips, 10,000 draws"
