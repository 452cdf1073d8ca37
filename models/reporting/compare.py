"""Does one label beat another? A paired t-test over seeds, and McNemar's test over predictions.

Each says its power: the smallest difference that it would find in four cases of five.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import optimize, stats

from ..recipes.recipe import Claim, Recipe
from .frame import matching, predictions

LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Test:
    """`difference` of the first over the second, its `p` value, and what is `detectable`.

    `detectable` is NaN where no difference could be found. `of` says what was counted.
    """

    __test__ = False  # no test of pytest's

    difference: float
    p: float
    detectable: float
    of: str

    @property
    def verdict(self) -> str:
        """The outcome in words."""
        if self.p < LEVEL:
            return "better" if self.difference > 0 else "worse"
        if math.isnan(self.detectable):
            return "cannot be told: too few pairs for any difference"
        return f"not told apart: a difference below {self.detectable:.3g} is likely to be missed"


def paired_t(first: Sequence[float], second: Sequence[float]) -> Test | None:
    """Student's test of paired scores [n], two-sided; None with fewer than two pairs."""
    differences = np.subtract(first, second)
    differences = differences[np.isfinite(differences)]
    n = len(differences)
    if n < 2:
        return None
    deviation = differences.std(ddof=1)
    mean = float(differences.mean())
    of = f"{n} seeds"
    if deviation == 0:  # equal scores tell nothing; equal differences leave no doubt
        return Test(mean, 1.0 if mean == 0 else 0.0, math.nan if mean == 0 else 0.0, of)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    effect = optimize.brentq(lambda effect: t_power(n, effect) - POWER, 1e-6, 1e3)
    return Test(mean, p, float(effect * deviation), of)


def t_power(n: int, effect: float) -> float:
    """The power of the paired test with n pairs; `effect` is mean over standard deviation."""
    freedom, shift = n - 1, effect * math.sqrt(n)
    critical = stats.t.ppf(1 - LEVEL / 2, freedom)
    above = stats.nct.sf(critical, freedom, shift)
    below = stats.nct.cdf(-critical, freedom, shift)
    return float(above + (0.0 if math.isnan(below) else below))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> Test | None:
    """The exact test of which of two is right on the same rows [n]; None without rows."""
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    rows = len(one)
    if rows == 0:
        return None
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    apart = only_first + only_second
    difference = (only_first - only_second) / rows
    of = f"{only_first} rows right by the first alone, {only_second} by the second, of {rows}"
    if apart == 0:
        return Test(difference, 1.0, math.nan, of)
    p = float(stats.binomtest(only_first, apart).pvalue)
    return Test(difference, p, _mcnemar_detectable(apart) / rows, of)


def _mcnemar_detectable(apart: int) -> float:
    """The excess of rows, of `apart` rows on which two differ, that is found with `POWER`."""
    # The fewest rows for one side that make the test reject.
    sides = np.arange(apart // 2 + 1, apart + 1)
    rejects = [k for k in sides if 2 * stats.binom.sf(k - 1, apart, 0.5) < LEVEL]
    if not rejects:
        return math.nan

    def lack(share: float) -> float:
        upper = stats.binom.sf(rejects[0] - 1, apart, share)
        return float(upper + stats.binom.cdf(apart - rejects[0], apart, share)) - POWER

    share = optimize.brentq(lack, 0.5, 1.0)
    return float(2 * share - 1) * apart


def claims(recipe: Recipe, frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each claim and each combination of the other labels, by both tests.

    McNemar's test takes seed by seed the predictions of the last epoch.
    """
    rows = []
    for claim in recipe.claims:
        if not {claim.better, claim.worse} <= recipe.axes[claim.axis].keys():
            continue  # the small form leaves a label out
        others = [axis for axis in recipe.axes if axis != claim.axis]
        parts = list(frame.groupby(others, sort=False)) if others else [((), frame)]
        for labels, part in parts:
            where = ", ".join(f"{a} {v}" for a, v in zip(others, labels, strict=True))
            rows += _tests(recipe, claim, part, where)
    return pd.DataFrame(rows)


def _tests(recipe: Recipe, claim: Claim, part: pd.DataFrame, where: str) -> list[dict[str, Any]]:
    pairs = [
        matching(part, {claim.axis: label}).set_index("seed")
        for label in (claim.better, claim.worse)
    ]
    first, second = pairs
    name = {"claim": f"{claim.better} > {claim.worse}", "where": where or "all"}
    seeds = [seed for seed in first.index if seed in second.index]
    found: list[tuple[str, Test | None, str]] = [
        (
            "paired t",
            paired_t(first.loc[seeds, "score"].tolist(), second.loc[seeds, "score"].tolist()),
            "needs two seeds of both",
        )
    ]
    for seed in seeds:
        right = _right(recipe, first.loc[seed], second.loc[seed])
        if right is not None:
            found.append((f"McNemar, seed {seed}", mcnemar(*right), "has no predictions"))
    return [
        {
            **name,
            "test": test_name,
            "difference": math.nan if test is None else test.difference,
            "p": math.nan if test is None else test.p,
            "detectable": math.nan if test is None else test.detectable,
            "of": "" if test is None else test.of,
            "verdict": why if test is None else test.verdict,
        }
        for test_name, test, why in found
    ]


def _right(
    recipe: Recipe, first: pd.Series, second: pd.Series
) -> tuple[list[bool], list[bool]] | None:
    """Which rows each of two runs has right; None where they are not of the same classes."""
    if any(run["state"] != "done" or "accuracy" not in _scores(run) for run in (first, second)):
        return None
    one, other = (predictions(run["directory"], recipe.split) for run in (first, second))
    if one.keys() != other.keys() or any(one[row][0] != other[row][0] for row in one):
        return None
    ours = [label == guess for label, guess in one.values()]
    theirs = [other[row][0] == other[row][1] for row in one]
    return ours, theirs


def _scores(run: pd.Series) -> dict[str, Any]:
    scores: dict[str, Any] = run["result"]["metrics"]["train"]
    return scores
