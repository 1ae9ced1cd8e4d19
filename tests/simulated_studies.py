"""Simulated studies in which nothing is related, or everything alike: how often tests are wrong.

    python tests/simulated_studies.py     # the tables of docs/verification.md, in a few minutes

The tests run the same simulations with fewer studies.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to run it as a script

from config import FAMILIES
from lora_tradeoffs.tables.predictors import OUTCOMES, PREDICTORS, across_runs, within_runs

CORRELATIONS = (0.0, 0.5, 0.8, 0.95)  # of two seeds of an arm


def unrelated(rng, arms, correlation, seeds=3, steps=1):
    """A predictor table in which no column has to do with another; random walks over the steps.

    Two seeds of an arm are correlated in every column. Both families are of the same size.
    """
    columns = [*PREDICTORS, *OUTCOMES]
    shape = len(FAMILIES), len(columns), arms, seeds, steps
    arm = rng.normal(size=(*shape[:3], 1, steps)).cumsum(axis=-1)
    seed = rng.normal(size=shape).cumsum(axis=-1)
    values = np.sqrt(correlation) * arm + np.sqrt(1 - correlation) * seed
    axes = [list(FAMILIES), range(arms), range(seeds), range(1, steps + 1)]
    table = pd.MultiIndex.from_product(axes, names=["family", "arm", "seed", "step"]).to_frame()
    table = table.reset_index(drop=True)
    runs = zip(*(table[name].astype(str) for name in ("family", "arm", "seed")))
    table = table.assign(run=["_".join(run) for run in runs])
    table = table.assign(fraction=table["step"] / steps, is_last=table["step"] == steps)
    return table.assign(**dict(zip(columns, np.moveaxis(values, 1, 0).reshape(len(columns), -1))))


def association_errors(studies, arms, correlation, steps=1, seed=0, resamples=500):
    """Shares of tests with p <= .05, and of intervals that leave the truth, 0, out; and the tests.

    Of several steps, correlations within runs.
    """
    rng, results = np.random.default_rng(seed), []
    correlate = across_runs if steps == 1 else within_runs
    for _ in range(studies):
        results.append(correlate(unrelated(rng, arms, correlation, steps=steps), resamples, 199))
    rows = pd.concat(results).dropna(subset=["rho"])
    missed = (rows["low"] > 0) | (rows["high"] < 0)
    return (rows["p_value"] <= 0.05).mean(), missed.mean(), len(rows)


if __name__ == "__main__":
    n = int(sys.argv[1])
    for arms in (4, 5, 6, 7, 8, 12, 18):
        for steps in (1, 6):
            print(arms, steps, association_errors(n, arms, 0.8, steps))
    for c in CORRELATIONS:
        for steps in (1, 6):
            print(8, c, steps, association_errors(n, 8, c, steps))
