"""What a sweep of the learning rates shows: scores, forgetting and drift by arm and rate.

    table = sweep_table(adaptation, retention, drift, read_rates(runs_dir))
    print(advantage_said(table))

LoRA at its chosen rate often forgets less than full fine-tuning at its own. That may be the method,
or only that full fine-tuning was trained at a higher rate than it needed: its best-retaining rate
tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.tables.arms import FULL, Arm, arm_of
from lora_tradeoffs.tables.frames import is_trained, last_checkpoints
from lora_tradeoffs.tables.retention import MEAN, NORMAL, family_means, forgotten
from training_configs import SCALINGS, tasks_and_variant

if TYPE_CHECKING:
    from pandas import DataFrame, Series

NO_SWEEP = "no sweep of the learning rates: the defaults per arm stand"
AT_CHOSEN = "Arms whose learning rates were swept: at the chosen rate alone."
ARM = ["family", "arm"]
MEASURES = ("score", "forgetting", "drift")
SIZE, OVERALL = "relative_frobenius", -1
VERDICTS = ("survives", "lost", "reversed", "none")


def sweep_table(
    adaptation: DataFrame,
    retention: DataFrame | None = None,
    drift: DataFrame | None = None,
    choices: Iterable[Mapping[str, Any]] = (),
) -> DataFrame:
    """A row an arm and learning rate, at the last checkpoints: family, arm, learning_rate, seeds,
    chosen, and of each measure its mean over seeds and its standard error.

    `score` is the mean of the family's primary validation metrics in [0, 1], `forgetting` the
    benchmarks' mean of base minus tuned, `drift` the update's norm over that of Q and V (of all
    targets where they were not both trained); nan where it was not measured. The error is over
    items for one seed, their mean for two, over seeds and items for three and more. `choices` are
    the records of learning_rates.json; the chosen rate of an arm that is not among them has the
    highest score, and an arm for which the sweep chose none has none.
    """
    import pandas as pd

    runs = _points(adaptation, retention, drift)
    rows = []
    for (family, arm, rate), own in runs.groupby([*ARM, "learning_rate"]):
        row = {"family": family, "arm": arm, "learning_rate": rate, "seeds": own["seed"].nunique()}
        for name in MEASURES:
            row[name], row[f"{name}_stderr"] = _mean(own[name], own[f"{name}_stderr"])
        rows.append(row)
    columns = [*ARM, "learning_rate", "seeds"]
    columns += [name for m in MEASURES for name in (m, f"{m}_stderr")]
    table = pd.DataFrame(rows, columns=columns)
    choices = list(choices)
    none = dict.fromkeys(_refused(choices), math.nan)
    table["chosen"] = _is_chosen(table, none | _chosen_rates(choices))
    return table.sort_values(
        [*ARM, "learning_rate"],
        key=lambda s: s.map(_family_place) if s.name == "family" else s,
        ignore_index=True,
    )


def swept_arms(table: DataFrame) -> list[tuple[str, Arm]]:
    """Families and arms that were trained at more than one learning rate."""
    rates = table.groupby(ARM, sort=False)["learning_rate"].nunique()
    return list(rates[rates > 1].index)


def best_retaining(
    table: DataFrame, family: str, arm: Arm = FULL, within: float | None = None
) -> Series | None:
    """The row of the arm's best-retaining rate; None if forgetting was measured at none.

    That is the rate which forgets least among those that score no worse than the best rate by more
    than its standard error (the one-standard-error rule, Breiman et al. 1984), or, if given, than
    `within`. So it is a rate that one could have chosen at no cost that could be seen. Of rates
    that forget equally, the one with the higher score.
    """
    own = table[(table["family"] == family) & (table["arm"] == arm)].dropna(subset=["score"])
    if own.empty:
        return None
    best = own.loc[own["score"].idxmax()]
    allowed = best["score_stderr"] if within is None else within
    allowed = 0.0 if math.isnan(allowed) else allowed
    good = own[own["score"] >= best["score"] - allowed - 1e-12].dropna(subset=["forgetting"])
    if good.empty:
        return None
    return good.sort_values(["forgetting", "score"], ascending=[True, False]).iloc[0]


def advantages(table: DataFrame, within: float | None = None) -> DataFrame:
    """A row a LoRA arm beside a full arm that was swept: how much less LoRA forgets, at its chosen
    rate, than full fine-tuning at its chosen and at its best-retaining rate, with 95 % intervals.

    `verdict` is about the best-retaining rate: survives (LoRA forgets less), reversed (it forgets
    more), lost (neither can be told, at the chosen rate LoRA did forget less), none (nor there).
    Errors are added as if the arms were independent; on the same items the interval is too wide.
    """
    import pandas as pd

    rows = []
    arms = set(table["arm"])
    for family, full in swept_arms(table):
        own = table[table["family"] == family]
        kept = best_retaining(table, family, full, within)
        chosen = own[(own["arm"] == full) & own["chosen"]].dropna(subset=["forgetting"])
        if full.method != "full" or kept is None or chosen.empty:
            continue
        for _, lora in own[own["chosen"]].dropna(subset=["forgetting"]).iterrows():
            if lora["arm"] == full or _reference(lora["arm"], arms) != full:
                continue
            row = {"family": family, "arm": lora["arm"], "learning_rate": lora["learning_rate"]}
            row |= {"score": lora["score"], "forgetting": lora["forgetting"], "full": full}
            row |= _less("chosen", chosen.iloc[0], lora) | _less("retaining", kept, lora)
            rows.append(row | {"verdict": _verdict(row)})
    sides = ("rate", "score", "forgetting", "less", "low", "high")
    columns = [*ARM, "learning_rate", "score", "forgetting", "full"]
    columns += [f"{side}_{name}" for side in ("chosen", "retaining") for name in sides]
    return pd.DataFrame(rows, columns=[*columns, "verdict"])


def advantage_said(table: DataFrame, within: float | None = None) -> str:
    """A sentence a family: whether LoRA's advantage in forgetting survives against full
    fine-tuning at its best-retaining rate; or why that cannot be said.
    """
    if not swept_arms(table):
        return f"{NO_SWEEP[0].upper()}{NO_SWEEP[1:]}."
    found = advantages(table, within)
    said = []
    for family in dict.fromkeys(table["family"]):
        own = found[found["family"] == family]
        for full in dict.fromkeys(own["full"]):
            said.append(_sentence(family, own[own["full"] == full], within))
        if own.empty:
            said.append(f"{family}: {_why_not(table[table['family'] == family])}.")
    return "\n".join(said)


def at_chosen_rates(frame: DataFrame, choices: Iterable[Mapping[str, Any]]) -> DataFrame:
    """The records of each arm at its chosen rate alone, under the arm's plain label.

    With it tables and figures show an arm once, as without a sweep. Arms that have no chosen rate
    among `choices` (learning_rates.json), or no record at it, are left as they are.
    """
    import pandas as pd

    rates = _chosen_rates(choices)
    if not rates:
        return frame
    plain = frame["arm"].map({arm: arm.without_rate for arm in frame["arm"].unique()})
    keys = pd.Series(list(zip(frame["family"], plain)), frame.index)
    chosen = keys.map(rates).astype(float)
    at_rate = (frame["learning_rate"] / chosen - 1).abs() < 0.01
    known = keys.isin(set(keys[at_rate])) & is_trained(frame)
    kept = frame.assign(arm=frame["arm"].where(~known, plain))
    kept = kept[~known | at_rate]
    left = set(frame["run"]) - set(kept["run"])
    for name in {"other", "other_run"} & {*kept}:  # what a run is held against
        kept = kept[~kept[name].isin(left)]
    kept.attrs = dict(frame.attrs) | ({"note": AT_CHOSEN} if left else {})
    return kept


def rates_said(frame: DataFrame, choices: Iterable[Mapping[str, Any]]) -> str:
    """Where the learning rates of the arms in the records come from: a sweep, or the defaults."""
    choices = list(choices)
    rates, refused = _chosen_rates(choices), _refused(choices)
    runs = frame[is_trained(frame)]
    found = {(family, arm.without_rate) for family, arm in zip(runs["family"], runs["arm"])}
    arms = sorted(found, key=lambda key: (_family_place(key[0]), key[1]))
    chosen = [
        f"{family} {arm} {rates[family, arm]:g}" for family, arm in arms if (family, arm) in rates
    ]
    without = [arm for arm in arms if arm in refused]
    if not chosen and not without:
        return f"{NO_SWEEP[0].upper()}{NO_SWEEP[1:]}."
    said = [f"Learning rates that a sweep chose on validation: {', '.join(chosen)}."] * bool(chosen)
    said += [
        f"A sweep chose none for {' '.join(map(str, arm))}: {refused[arm]}." for arm in without
    ]
    others = [" ".join(map(str, arm)) for arm in arms if arm not in rates and arm not in refused]
    said += [f"No sweep of {', '.join(others)}: the default stands."] if others else []
    return " ".join(said)


# ------------------------------------------------------------------------------- from runs


def _points(
    adaptation: DataFrame, retention: DataFrame | None, drift: DataFrame | None
) -> DataFrame:
    """The runs' last checkpoints, one a row: family, arm, learning_rate, seed, measures."""
    means = family_means(last_checkpoints(adaptation))
    names = {"value": "score", "stderr": "score_stderr"}
    points = means[is_trained(means)].rename(columns=names)
    points = points[["run", "family", *names.values()]]
    fields = adaptation[is_trained(adaptation)].drop_duplicates("run")
    points = points.merge(fields[["run", "arm", "learning_rate", "seed"]], on="run")
    points = points[points["learning_rate"] > 0]  # unknown of outside checkpoints
    points["arm"] = [arm.without_rate for arm in points["arm"]]
    for name, rows in (("forgetting", _forgetting(retention)), ("drift", _drift(drift))):
        own = {} if rows is None else rows.drop_duplicates("run").set_index("run")
        for column, source in ((name, "value"), (f"{name}_stderr", "stderr")):
            points[column] = points["run"].map(own[source]) if len(own) else math.nan
    return points


def _forgetting(retention: DataFrame | None) -> DataFrame | None:
    if retention is None:
        return None
    rows = forgotten(retention)
    rows = rows[rows["task"] == MEAN]
    return rows[rows["shots"] == rows["shots"].min()]


def _drift(drift: DataFrame | None) -> DataFrame | None:
    if drift is None:
        return None
    rows = last_checkpoints(drift[(drift["metric"] == SIZE) & (drift["layer"] == OVERALL)])
    rows = rows[rows["module"].isin(["both", "all"])]
    return rows.sort_values("module", ascending=False)  # both, else all


def _mean(values: Series, errors: Series) -> tuple[float, float]:
    """Mean over seeds, and the error of which NORMAL times is the reach of its interval.

    Over seeds and items from three seeds on, else over items.
    """
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS
    from lora_tradeoffs.statistics.seed_intervals import reach

    known = values.dropna()
    if len(known) >= MIN_SEEDS:
        items = (errors[known.index] ** 2).mean()
        half = reach(known.var(ddof=1) / len(known), len(known), 0 if math.isnan(items) else items)
        return known.mean(), half / NORMAL
    return (known.mean(), errors[known.index].mean()) if len(known) else (math.nan, math.nan)


def _chosen_rates(choices: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Arm], float]:
    """The chosen rate by family and arm."""
    return {
        (c["family"], searched_arm(c)): float(c["learning_rate"]) for c in choices if c["chosen"]
    }


def _refused(choices: Iterable[Mapping[str, Any]]) -> dict[tuple[str, Arm], str]:
    """Why an arm that was searched has no rate, by family and arm."""
    return {(c["family"], searched_arm(c)): c["problem"] for c in choices if c.get("problem")}


def _family_place(family: str) -> int:
    return [*FAMILIES, family].index(family)


def searched_arm(choice: Mapping[str, Any]) -> Arm:
    """The arm that was searched, from its record in learning_rates.json."""
    run = f"{choice['arm']}_seed0"
    tasks, variant = tasks_and_variant(run, {**choice, "seed": 0})
    return arm_of({**choice, "run": run, "tasks": tasks, "variant": variant})


def _is_chosen(table: DataFrame, rates: Mapping[tuple[str, Arm], float]) -> list[bool]:
    best: dict[Any, float] = {}
    for key, own in table.groupby(ARM):
        highest = own.sort_values(["score", "learning_rate"], ascending=[False, True])
        best[key] = rates.get(key, highest["learning_rate"].iloc[0])
    keys = zip(table["family"], table["arm"], table["learning_rate"])
    return [math.isclose(best[family, arm], rate, rel_tol=0.01) for family, arm, rate in keys]


# ------------------------------------------------------------------------- LoRA against full


def _reference(arm: Arm, arms: set[Arm]) -> Arm | None:
    """The full arm that a LoRA arm is compared with: with the same other fields, else the plain.

    None for what is not LoRA.
    """
    if arm.method != "lora":
        return None
    words = arm.variant.split()
    shared = [w for w in words if w not in SCALINGS and not w.startswith("dropout")]
    full = replace(arm, method="full", rank=0, target_modules="qv", variant=" ".join(shared))
    return full if full in arms else FULL


def _less(side: str, full: Series, lora: Series) -> dict[str, float]:
    """How much less LoRA forgets than full fine-tuning at the rate, with its interval."""
    less = full["forgetting"] - lora["forgetting"]
    half = NORMAL * math.hypot(full["forgetting_stderr"], lora["forgetting_stderr"])
    own = {"rate": full["learning_rate"], "score": full["score"], "forgetting": full["forgetting"]}
    own |= {"less": less, "low": less - half, "high": less + half}
    return {f"{side}_{name}": value for name, value in own.items()}


def _verdict(row: Mapping[str, float]) -> str:
    if row["retaining_low"] > 0:
        return "survives"
    if row["retaining_high"] < 0:
        return "reversed"
    return "lost" if row["chosen_low"] > 0 else "none"


def _sentence(family: str, rows: DataFrame, within: float | None) -> str:
    first = rows.iloc[0]
    rule = "one standard error" if within is None else f"{within:g}"
    said = (
        f"{family}: at its best-retaining rate {first['retaining_rate']:g} full fine-tuning scores"
        f" {first['retaining_score']:.3f} (within {rule} of its best) and forgets"
        f" {first['retaining_forgetting']:.3f}, at its chosen rate {first['chosen_rate']:g}"
        f" {first['chosen_score']:.3f} and {first['chosen_forgetting']:.3f}; against the former"
    )
    texts = {
        "survives": "LoRA's advantage in forgetting survives with",
        "lost": "LoRA's advantage in forgetting does not survive (no difference can be told) with",
        "reversed": "LoRA forgets more, not less, with",
        "none": "no advantage of LoRA in forgetting can be told, at either rate, with",
    }
    parts = []
    for verdict in VERDICTS:
        own = rows[rows["verdict"] == verdict]
        if len(own):
            parts.append(f"{texts[verdict]} {', '.join(map(_difference, own.itertuples()))}")
    return f"{said} {'; '.join(parts)}."


def _difference(row: Any) -> str:
    interval = f"{row.retaining_low:.3f} to {row.retaining_high:.3f}"
    return (
        f"{row.arm} at {row.learning_rate:g} (score {row.score:.3f}, full minus LoRA"
        f" {row.retaining_less:.3f}, {interval})"
    )


def _why_not(own: DataFrame) -> str:
    full = [arm for _, arm in swept_arms(own) if arm.method == "full"]
    if not full:
        return "no sweep of full fine-tuning, so the default of that arm stands"
    known = own.dropna(subset=["forgetting"])
    if len(known) and not known[known["arm"].isin(full)]["chosen"].any():
        return "the sweep of full fine-tuning chose no learning rate"
    if known.empty:
        return "forgetting was not measured at the points of the sweep (retention_eval.py)"
    return "no LoRA arm beside the sweep of full fine-tuning whose forgetting was measured"
