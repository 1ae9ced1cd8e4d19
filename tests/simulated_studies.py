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
from lora_tradeoffs.statistics.pooled_error import pooled_errors
from lora_tradeoffs.statistics.seed_intervals import reach
from lora_tradeoffs.tables.predictors import (
    OUTCOMES,
    PREDICTORS,
    across_runs,
    correlation_difference,
    within_runs,
)

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


def exchange_errors(studies, arms, each, between, seed=0, resamples=399):
    """Of studies in which both predictors are related to the outcome by `each`, and to each other
    by `between`: the share with p <= .05, and of intervals that leave the truth, 0, out."""
    rng, results = np.random.default_rng(seed), []
    root = np.linalg.cholesky([[1, between, each], [between, 1, each], [each, each, 1]])
    names = ["kl_tasks", "size", "text_lost"]
    for _ in range(studies):
        table = pd.DataFrame(rng.normal(size=(arms, 3)) @ root.T, columns=names)
        table = table.assign(arm=range(arms), is_last=True)
        found = correlation_difference(table, ("kl_tasks", "size"), "text_lost", resamples)
        results.append([found["p_value"] <= 0.05, not found["low"] <= 0 <= found["high"]])
    return np.mean(results, axis=0)


def difference_errors(studies, spreads, tasks=6, noisy=None, seeds=3, seed=0):
    """Of tests of arms against the first, all equal: the share of studies with any false finding
    after the correction, of tests with p <= .05, and of studies in which the error was pooled.

    `spreads` are the arms' standard deviations from seed to seed, in the first `noisy` tasks (None:
    all); elsewhere they are 1. Coverage of the 95 % intervals is 1 minus the second share.
    """
    rng, arms = np.random.default_rng(seed), len(spreads)
    scale = np.ones((tasks, arms, 1))
    scale[:noisy] = np.reshape(spreads, (1, -1, 1))
    family = single = pooled = 0
    strict = 1 - 0.05 / (tasks * (arms - 1))
    freedoms = (seeds - 1, (seeds - 1) * (arms - 1))
    bars = {(f, level): reach(1.0, f, level=level) for f in freedoms for level in (0.95, strict)}
    for _ in range(studies):
        scores = rng.normal(size=(tasks, arms, seeds)) * scale + rng.normal(size=(tasks, 1, seeds))
        errors = pooled_errors([dict(enumerate(task)) for task in scores])
        differences = scores[:, 1:] - scores[:, :1]
        means, variances = differences.mean(axis=2), differences.var(axis=2, ddof=1) / seeds
        freedom = seeds - 1
        if errors[0]:
            variances = np.array([[2 * error.variance / seeds] for error in errors])
            freedom, pooled = errors[0].freedom, pooled + 1
        ratio = abs(means) / np.sqrt(variances)
        family += (ratio > bars[freedom, strict]).any()
        single += (ratio > bars[freedom, 0.95]).mean()
    return family / studies, single / studies, pooled / studies


SPREADS = {
    "all arms alike": (1, 1, 1, 1, 1, 1),
    "full fine-tuning 1.5 times": (1.5, 1, 1, 1, 1, 1),
    "full fine-tuning 2 times": (2, 1, 1, 1, 1, 1),
    "full fine-tuning 3 times": (3, 1, 1, 1, 1, 1),
    "full fine-tuning half": (0.5, 1, 1, 1, 1, 1),
    "one rank 2 times": (1, 1, 1, 1, 1, 2),
    "one rank 4 times": (1, 1, 1, 1, 1, 4),
    "rising with the rank": (1, 1, 1.3, 1.6, 2, 2.5),
}


def main(studies=2_000):
    """Print the tables."""
    print("noise from seed to seed | tasks | any of 30 false | one test | pooled")
    for name, spreads in SPREADS.items():
        for noisy in (None, 1):
            shares = difference_errors(studies, spreads, noisy=noisy)
            print(name, noisy or 6, *(f"{share:.3f}" for share in shares), sep=" | ", flush=True)
    print("arms | correlation within arms | across: p, interval | within: p, interval")
    for arms in (8, 18):
        for correlation in CORRELATIONS:
            shares = [association_errors(72, arms, correlation, steps)[:2] for steps in (1, 6)]
            cells = (f"{p:.3f}, {missed:.3f}" for p, missed in shares)
            print(arms, correlation, *cells, sep=" | ", flush=True)
    print("arms | correlation of both predictors with the outcome, with each other | p, interval")
    for arms in (8, 12, 16, 22):
        for each, between in ((0, 0), (0.6, 0.5), (0.8, 0.8), (0.9, 0.7)):
            cells = (f"{share:.3f}" for share in exchange_errors(studies // 5, arms, each, between))
            print(arms, each, between, *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
