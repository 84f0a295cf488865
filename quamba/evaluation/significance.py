"""Is the difference between two models on the same rows more than chance? Two-sided tests, exact where they say so.

Both models answer the same rows, so rows are compared one by one. If the models were equally good, each row's two scores
might as well have come the other way round; the p value is the share of such exchanges that give a difference at least as
large as the one found.

`mcnemar`     scores of 0 and 1: only rows on which the models differ count, and each is a fair coin (McNemar 1947, the
              exact binomial form). All exchanges are counted, in whole numbers.
`sign_flips`  any other scores: the paired randomization test (Fisher 1935; Noreen 1989). All 2^n exchanges up to n = 16
              rows that differ; else 10,000 random ones, and p = (1 + as large) / (1 + 10,000), which never claims too
              much (Phipson and Smyth 2010) and is the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

ALL_UP_TO = 16
DRAWS = 10_000
_CHUNK = 2**22  # signs held at once


def p_value(a: Sequence[float], b: Sequence[float]) -> tuple[float, str]:
    """p and the name of the test for the scores of two models on the same rows."""
    if {*a, *b} <= {0, 1}:
        return mcnemar(a, b), "McNemar, exact"
    p, exact = sign_flips([x - y for x, y in zip(a, b, strict=True)])
    return p, "sign flips, exact" if exact else f"sign flips, {DRAWS:,} draws"


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Exact two-sided p of 0/1 scores: twice the smaller tail of a binomial of the rows that differ, at most 1."""
    wins = sum(x > y for x, y in zip(a, b, strict=True))
    losses = sum(x < y for x, y in zip(a, b, strict=True))
    n, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):  # term: n over k
        tail += term
        term = term * (n - k) // (k + 1)
    return float(min(Fraction(1), Fraction(2 * tail, 2**n)))


def sign_flips(differences: Sequence[float]) -> tuple[float, bool]:
    """(p, whether it is exact) that the mean of these differences is 0, each one's sign being as likely as the other.

    1 where all differences are 0.
    """
    d = np.abs(np.asarray([x for x in differences if x != 0], dtype=np.float64))
    if not len(d):
        return 1.0, True
    # Sums in another order differ in their last bits: such a tie counts as at least as large.
    found = abs(float(np.sum(differences))) - 1e-12 * float(d.sum())
    if len(d) <= ALL_UP_TO:
        sums = np.zeros(1)
        for size in d:
            sums = np.concatenate((sums + size, sums - size))
        return float((np.abs(sums) >= found).mean()), True
    random, larger, step = np.random.default_rng(0), 0, max(1, _CHUNK // len(d))
    for start in range(0, DRAWS, step):
        signs = random.integers(0, 2, (min(step, DRAWS - start), len(d)), dtype=np.int8)
        larger += int((np.abs(2 * (signs @ d) - d.sum()) >= found).sum())
    return (1 + larger) / (1 + DRAWS), False
