"""What predicts forgetting and learning: measures of drift correlated with both over runs.

    table = predictor_table(retention, drift, adaptation)
    print(across_runs(table), within_runs(table))

All of it is exploratory: correlations among the arms of one grid, in which rank, method and rate
move everything together. The unit is the arm (at one learning rate): ten checkpoints of a run are
one trajectory, and the seeds of an arm are one cluster. Seeds are averaged, and arms are resampled
and permuted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K
from lora_tradeoffs.statistics.comparisons import LEVEL, POWER, holm
from lora_tradeoffs.tables.frames import is_trained, last_checkpoints
from lora_tradeoffs.tables.retention import MEAN, TEXT, as_trained, plane_points

if TYPE_CHECKING:
    import numpy as np
    from pandas import DataFrame, Series

PREDICTORS = {
    "size": "‖ΔW‖ / ‖W0‖",
    "rho": "ρ",
    "intruders": "intruders",
    "rotation": "1 − φ",
    "kl_tasks": "KL on the tasks",
    "kl_text": "KL on held-out text",
    "cka_loss": "1 − CKA",
}
OUTCOMES = {"forgetting": "forgetting", "gain": "gain on validation"}
RESAMPLES = 2_000
PERMUTATIONS = 10_000
ENOUGH_FOR_P = 8  # arms; with fewer the order of a few points decides
ENOUGH = 6  # arms; of fewer that are unrelated, up to 34 % of the intervals leave 0 out
KEYS = ["run", "step"]
RESULT = (
    *("family", "outcome", "predictor", "rho", "low", "high", "p_value"),
    *("corrected", "detectable"),
    *("runs", "arms", "checkpoints", "reason"),
)


def predictor_table(
    retention: DataFrame, drift: DataFrame | None = None, adaptation: DataFrame | None = None
) -> DataFrame:
    """A row for each run's checkpoint: forgetting, gain on validation, and the predictors.

    Forgetting is the mean over benchmarks, `text_lost` that over held-out text, the gain that over
    tasks. Of drift: ||dW||_F / ||W0||_F of the whole model (where a run lacks it, of q_proj and
    v_proj in all), and over the matrices q_proj and v_proj the mean of rho = sigma_1(dW) /
    sigma_k(W0), of the intruders among the first k, and of 1 - phi of the left leading k; k = 10,
    epsilon = .5. KL(base || tuned) in nats is a mean over the tokens of the family's answers, mean
    over tasks, and over those of held-out text; 1 - CKA is the mean over layers. What is not there
    is nan. `is_last` marks the last checkpoint of a run that ended. Single-task controls are left
    out.
    """
    rows = as_trained(retention)
    lost = rows[(rows["metric"] == "forgetting") & is_trained(rows)]
    lost = lost[(lost["tasks"] == lost["family"]) & lost["task"].isin([MEAN, TEXT])]
    by_task = lost.drop_duplicates([*KEYS, "task"]).set_index([*KEYS, "task"])["value"].unstack()
    lost = lost.drop_duplicates(KEYS)
    table = lost.set_index(KEYS)[["family", "arm", "seed", "fraction"]]
    for name, task in (("forgetting", MEAN), ("text_lost", TEXT)):
        table[name] = by_task.get(task)
    points = plane_points(retention, adaptation)
    points = points[points["update_scale"] == 1].drop_duplicates(KEYS)
    table["gain"] = points.set_index(KEYS)["gain"]
    for name, values in _predictors(rows, drift).items():
        table[name] = values.reindex(table.index)
    ended = last_checkpoints(lost).set_index(KEYS).index
    return table.assign(is_last=table.index.isin(ended)).reset_index()


def across_runs(
    table: DataFrame, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> DataFrame:
    """Spearman's rank correlation over the arms' last checkpoints, by family, outcome, predictor.

    Of an arm the mean over its seeds counts. The interval is the percentile bootstrap's over arms,
    the p-value that of permuted arms (from eight arms on), `corrected` by Holm over an outcome's
    tests; `detectable` is the correlation that the first, strictest step finds with 80 % power
    (Fieller, Hartley and Pearson 1957). `reason` says why figures are nan. Coverage and error
    rates at several correlations within arms: docs/verification.md.
    """
    from scipy.stats import norm

    rows = table[table["is_last"]]
    table = _by_family(rows, lambda points: _across(points, resamples, permutations, seed))
    tests = table.groupby("outcome")["p_value"].transform("count")
    reach = norm.isf((1 - LEVEL) / 2 / tests.clip(lower=1)) + norm.ppf(POWER)
    error = (1.06 / (table["arms"] - 3).clip(lower=1)) ** 0.5
    detectable = (reach * error).map(math.tanh).where(table["p_value"].notna())
    return table.assign(detectable=detectable)


def within_runs(
    table: DataFrame, resamples: int = RESAMPLES, permutations: int = PERMUTATIONS, seed: int = 0
) -> DataFrame:
    """The same over checkpoints within runs, with the step partialled out.

    At every checkpoint the arms of a family, each the mean of its seeds, are ranked among each
    other, which takes out whatever training does to all of them; then each arm's mean rank is taken
    off, and what is left is correlated: does an arm that climbs among the others in drift climb in
    forgetting? Arm by arm, with the step as a number, nothing could be said: a drift that rises at
    every checkpoint is the step's own rank. Ranks over all checkpoints would not do either: taking
    means off them leaves a trace of the trend that both measures share. Of checkpoints those count
    that all runs have. Whole trajectories of arms are resampled and permuted.
    """
    return _by_family(table, lambda points: _within(points, resamples, permutations, seed))


def correlation_difference(
    table: DataFrame,
    predictors: tuple[str, str],
    outcome: str,
    resamples: int = PERMUTATIONS,
    seed: int = 0,
) -> dict[str, Any]:
    """Spearman's correlation of the outcome with the first predictor minus that with the second.

    Over the last checkpoints of one family, arms at their learning rates as in `across_runs`. The
    interval is the percentile bootstrap's over arms. The p-value (from eight arms on) is that of
    exchanging the two predictors' ranks arm by arm: if both are related to the outcome alike, each
    pair of ranks could as well stand the other way round. Error rates and coverage:
    docs/verification.md. `reason` says why figures are nan.
    """
    import numpy as np
    from scipy.stats import rankdata

    rows = table[table["is_last"]].dropna(subset=[*predictors, outcome])
    means = rows.groupby("arm")[[*predictors, outcome]].mean()
    arms, rng = len(means), np.random.default_rng(seed)
    if arms < ENOUGH:
        return _nothing(f"{ENOUGH} arms are needed, here {arms}", 1) | {"arms": arms}
    first, second, y = (rankdata(means[name])[:, None] for name in (*predictors, outcome))

    def correlations(first: np.ndarray, second: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        y = _residuals(y)
        return [_cosine(_residuals(x), y) for x in (first, second)]

    each = tuple(float(rho[0]) for rho in correlations(first[None], second[None], y[None]))
    value = each[0] - each[1]
    if math.isnan(value):
        reason = "a predictor or the outcome is the same in all arms"
        return _nothing(reason, 1) | {"arms": arms}
    drawn = rng.integers(arms, size=(resamples, arms))
    draws = np.subtract(*correlations(first[drawn], second[drawn], y[drawn]))
    draws = draws[np.isfinite(draws)]
    low, high = map(float, np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    p_value = math.nan
    if arms >= ENOUGH_FOR_P:
        turned = rng.random((resamples, arms, 1)) < 0.5
        others = [np.where(turned, a, b) for a, b in ((second, first), (first, second))]
        far = np.abs(np.subtract(*correlations(*others, y[None]))) >= abs(value) - 1e-12
        p_value = float((far.sum() + 1) / (resamples + 1))
    reason = "" if arms >= ENOUGH_FOR_P else f"{arms} arms: no p-value below {ENOUGH_FOR_P}"
    figures = {"rho": value, "low": low, "high": high, "p_value": p_value}
    figures |= {"stderr": float(draws.std(ddof=1)), "each": each}
    return figures | {"arms": arms, "reason": reason}


# ---------------------------------------------------------------------------- the measures


def _predictors(retention: DataFrame, drift: DataFrame | None) -> dict[str, Series]:
    """Each predictor's values by (run, step)."""
    measures = {}
    if drift is not None:
        measures["size"] = _size(drift)
        measures["rho"] = _measure(drift, "rho")
        measures["intruders"] = _measure(drift, "intruders", eps=INTRUDER_EPSILON)
        measures["rotation"] = 1 - _measure(drift, "phi", side="left")
    answers = retention[retention["metric"] == "answer_kl"]
    measures["kl_tasks"] = answers.groupby(KEYS)["value"].mean()
    text = retention[(retention["metric"] == "kl") & (retention["task"] == TEXT)]
    measures["kl_text"] = text.groupby(KEYS)["value"].mean()
    cka = retention[retention["metric"] == "cka"].groupby(KEYS)["value"].mean()
    measures["cka_loss"] = 1 - cka
    return {name: values for name, values in measures.items() if len(values)}


def _measure(drift: DataFrame, metric: str, side: str | None = None, **fields: float) -> Series:
    """A metric of q_proj and v_proj over all layers, at the k that is always measured."""
    rows = drift[(drift["metric"] == metric) & (drift["layer"] == -1) & (drift["module"] == "both")]
    for name, value in ({"k": INTRUDER_K} | fields).items():
        rows = rows[rows[name] == value]
    if side is not None:
        rows = rows[rows["side"] == side]
    return rows.drop_duplicates(KEYS).set_index(KEYS)["value"]


def _size(drift: DataFrame) -> Series:
    """Of the whole model where all runs have it: two kinds of size would not be compared."""
    rows = drift[(drift["metric"] == "relative_frobenius") & (drift["layer"] == -1)]
    whole = rows[rows["module"] == "all"]
    if set(whole["run"]) != set(rows["run"]):
        whole = rows[rows["module"] == "both"]
    return whole.drop_duplicates(KEYS).set_index(KEYS)["value"]


# -------------------------------------------------------------------------- correlations


def _by_family(table: DataFrame, correlate: Callable[[Any], dict[str, Any]]) -> DataFrame:
    """A row for each family, outcome and predictor that the table holds."""
    import pandas as pd

    rows = []
    for family in (f for f in FAMILIES if (table["family"] == f).any()):
        for outcome in OUTCOMES:
            for name in (p for p in PREDICTORS if p in table):
                points = table[table["family"] == family]
                points = points.assign(x=points[name], y=points[outcome]).dropna(subset=["x", "y"])
                row = {"family": family, "outcome": outcome, "predictor": name}
                row |= {"runs": points["run"].nunique(), "arms": points["arm"].nunique()}
                rows.append(row | correlate(points))
    correlations = pd.DataFrame(rows, columns=list(RESULT))
    correlations["detectable"] = math.nan
    correlations["corrected"] = correlations.groupby("outcome")["p_value"].transform(_holm)
    return correlations


def _holm(p_values: Series) -> Series:
    """Corrected over the tests that could be made; what was not measured is no test."""
    corrected = p_values.copy()
    corrected[p_values.notna()] = holm(p_values.dropna())
    return corrected


def _across(rows: DataFrame, resamples: int, permutations: int, seed: int) -> dict[str, Any]:
    means = rows.groupby("arm")[["x", "y"]].mean()
    x, y = (means[[name]].to_numpy(float) for name in ("x", "y"))  # (arms, 1)
    return _correlation(x, y, resamples, permutations, seed)


def _within(rows: DataFrame, resamples: int, permutations: int, seed: int) -> dict[str, Any]:
    at = rows.assign(at=rows["fraction"].fillna(1.0).round(4))
    at = at[at.groupby("at")["run"].transform("nunique") == at["run"].nunique()]
    if (checkpoints := at["at"].nunique()) < 2:
        return _nothing(f"2 checkpoints that all runs have are needed, here {checkpoints}", 0)
    means = at.groupby(["arm", "at"])[["x", "y"]].mean()
    x, y = (means[name].unstack().to_numpy() for name in ("x", "y"))
    return _correlation(x, y, resamples, permutations, seed)


def _correlation(
    x: np.ndarray, y: np.ndarray, resamples: int, permutations: int, seed: int
) -> dict[str, Any]:
    """Correlation of residuals of ranks, (arms, checkpoints) each, with interval and p-value."""
    import numpy as np

    arms, checkpoints = x.shape
    if arms < ENOUGH:
        return _nothing(f"{ENOUGH} arms are needed, here {arms}", checkpoints)
    ranks = [_residuals(values[None]) for values in (x, y)]
    for name, values in zip(("the predictor", "the outcome"), ranks):
        if np.allclose(values, 0):
            constant = "is the same in all arms"
            reason = constant if checkpoints == 1 else "never changes the arms' order"
            return _nothing(f"{name} {reason}", checkpoints)
    rho = float(_cosine(*ranks)[0])
    rng = np.random.default_rng(seed)
    drawn = rng.integers(arms, size=(resamples, arms))
    draws = _cosine(*(_residuals(values[drawn]) for values in (x, y)))
    draws = draws[np.isfinite(draws)]  # a resample of one arm alone has no order
    low, high = map(float, np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    p_value = math.nan
    if arms >= ENOUGH_FOR_P:
        orders = rng.permuted(np.tile(np.arange(arms), (permutations, 1)), axis=1)
        others = _cosine(ranks[0], ranks[1][0][orders])
        far = np.abs(others) >= abs(rho) - 1e-12
        p_value = float((far.sum() + 1) / (permutations + 1))
    figures = {"rho": rho, "low": low, "high": high, "p_value": p_value}
    reason = "" if arms >= ENOUGH_FOR_P else f"{arms} arms: no p-value below {ENOUGH_FOR_P}"
    if low == high:
        figures |= {"low": math.nan, "high": math.nan}
        reason = "; ".join(filter(None, ["in perfect order, resampling knows no other", reason]))
    return figures | {"checkpoints": checkpoints, "reason": reason}


def _nothing(reason: str, checkpoints: int) -> dict[str, Any]:
    figures = dict.fromkeys(("rho", "low", "high", "p_value"), math.nan)
    return figures | {"checkpoints": checkpoints, "reason": reason}


def _residuals(values: np.ndarray) -> np.ndarray:
    """Ranks among the arms at each checkpoint, less their mean; of several checkpoints, less each
    arm's own mean. Shape (draws, arms, checkpoints).
    """
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=1)
    return ranks - ranks.mean(axis=2 if values.shape[2] > 1 else 1, keepdims=True)


def _cosine(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation of centred values, shape (draws,); nan where one of them is constant."""
    import numpy as np

    product, size = (x * y).sum(axis=(1, 2)), (x**2).sum(axis=(1, 2)) * (y**2).sum(axis=(1, 2))
    return np.divide(product, np.sqrt(size), out=np.full(len(product), np.nan), where=size > 1e-9)
