"""What a sweep of the learning rates shows: scores, forgetting and drift by arm and rate.

    table = sweep_table(adaptation, retention, drift, read_rates(runs_dir))
    print(advantage_sentences(table))

LoRA at its chosen rate often forgets less than full fine-tuning at its own. Either the method is
the reason, or an arm was trained at a higher rate than it needed: a comparison of both at their
best-retaining rates tells which.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.tables.arms import FULL, Arm, arm_of
from lora_tradeoffs.tables.frames import in_order, is_trained, last_checkpoints, update_sizes
from lora_tradeoffs.tables.retention import family_means, mean_forgetting
from training_configs import SCALINGS, tasks_and_variant

if TYPE_CHECKING:
    from pandas import DataFrame, Series

NO_SWEEP = "no sweep of the learning rates"
NO_SWEEP_SENTENCE = f"{NO_SWEEP[0].upper()}{NO_SWEEP[1:]}."
AT_CHOSEN = "Arms whose learning rates were swept: at the chosen rate alone."
ARM = ["family", "arm"]
MEASURES = ("score", "forgetting", "drift")
VERDICTS = {
    "survives": "LoRA's advantage in forgetting survives with",
    "lost": "LoRA's advantage in forgetting does not survive (no difference can be told) with",
    "reversed": "LoRA forgets more, not less, with",
    "none": "no advantage of LoRA in forgetting can be told, at either rate, with",
}


def sweep_table(
    adaptation: DataFrame,
    retention: DataFrame | None = None,
    drift: DataFrame | None = None,
    choices: Iterable[Mapping[str, Any]] = (),
) -> DataFrame:
    """A row for each arm and learning rate, at the last checkpoints: family, arm, learning_rate,
    seeds, chosen, and of each measure its mean over seeds, its standard error and its `reach`, half
    of its 95 % interval.

    `score` is the mean of the family's primary validation metrics in [0, 1], `forgetting` the
    benchmarks' mean of base minus tuned, `drift` the update's norm over that of Q and V (of all
    targets where they were not both trained); nan where it was not measured. The error is over
    items for one seed, their mean for two, over seeds and items for three and more. `choices` are
    the records of learning_rates.json; the chosen rate of an arm that is not among them has the
    highest score, and an arm for which the sweep chose none has none.
    """
    import pandas as pd

    rows = []
    keys = [*ARM, "learning_rate"]
    for key, seeds in _run_measures(adaptation, retention, drift).groupby(keys):
        means = (_mean(seeds[name], seeds[f"{name}_stderr"]) for name in MEASURES)
        rows.append((*key, seeds["seed"].nunique(), *itertools.chain(*means)))
    measures = [name for m in MEASURES for name in (m, f"{m}_stderr", f"{m}_reach")]
    table = pd.DataFrame(rows, columns=[*keys, "seeds", *measures])
    table["chosen"] = _is_chosen(table, *_searched(choices))
    return in_order(table, *keys)


def swept_arms(table: DataFrame) -> list[tuple[str, Arm]]:
    """Families and arms that were trained at more than one learning rate."""
    rates = table.groupby(ARM, sort=False)["learning_rate"].nunique()
    return list(rates[rates > 1].index)


def best_retaining(table: DataFrame, family: str, arm: Arm = FULL) -> Series | None:
    """The row of the arm's best-retaining rate; None if forgetting was measured at none.

    That is the rate which forgets least among those that score no worse than the best rate by more
    than its standard error (the one-standard-error rule, Breiman et al. 1984), so a rate that one
    could have chosen without a visible loss. Of rates that forget equally, the one with the higher
    score.
    """
    rates = table[(table["family"] == family) & (table["arm"] == arm)].dropna(subset=["score"])
    if rates.empty:
        return None
    best = rates.loc[rates["score"].idxmax()]
    allowed = 0.0 if math.isnan(best["score_stderr"]) else best["score_stderr"]
    good = rates[rates["score"] >= best["score"] - allowed - 1e-12].dropna(subset=["forgetting"])
    good = good.sort_values(["forgetting", "score"], ascending=[True, False])
    return None if good.empty else good.iloc[0]


def advantages(table: DataFrame) -> DataFrame:
    """A row for each LoRA arm beside a swept full arm: how much less LoRA forgets than full
    fine-tuning, both at their chosen and both at their best-retaining rates, with 95 % intervals.

    Fields begin with `chosen_` or `retaining_`; those of LoRA end with `_lora`. `verdict` is about
    the best-retaining rates: survives (LoRA forgets less), reversed (it forgets more), lost (no
    difference can be told, but LoRA forgets less at the chosen rates), none (nor there). Errors
    are added as if the arms were independent; where both were measured on the same items the
    interval is too wide.
    """
    import pandas as pd

    rows = []
    known = table.dropna(subset=["forgetting"])
    for family, full in swept_arms(table):
        chosen = known[(known["family"] == family) & known["chosen"]]
        at_chosen, retaining = chosen[chosen["arm"] == full], best_retaining(table, family, full)
        if full.method != "full" or retaining is None or at_chosen.empty:
            continue
        for _, lora in chosen.iterrows():
            if _reference(lora["arm"], set(table["arm"])) == full:
                row = lora[ARM].to_dict() | {"full": full}
                row |= _less("chosen", at_chosen.iloc[0], lora)
                best = best_retaining(table, family, lora["arm"])
                row |= _less("retaining", retaining, lora if best is None else best)
                rows.append(row | {"verdict": _verdict(row)})
    return pd.DataFrame(rows, columns=None if rows else [*ARM, "full", "verdict"])


def advantage_sentences(table: DataFrame) -> str:
    """A sentence for each family: whether LoRA's advantage in forgetting survives where LoRA and
    full fine-tuning are at their best-retaining rates; or why that cannot be said.
    """
    if not swept_arms(table):
        return NO_SWEEP_SENTENCE
    rows = advantages(table)
    sentences = []
    for family, rates in table.groupby("family", sort=False):
        of_family = rows[rows["family"] == family]
        sentences += [_sentence(family, group) for _, group in of_family.groupby("full")]
        if of_family.empty:
            sentences.append(f"{family}: {_why_not(rates)}.")
    return "\n".join(sentences)


def at_chosen_rates(frame: DataFrame, choices: Iterable[Mapping[str, Any]]) -> DataFrame:
    """The records of each arm at its chosen rate alone, under the arm's plain label.

    So tables and figures show an arm once, as without a sweep. Arms that have no chosen rate among
    `choices` (learning_rates.json), or no record at it, are left as they are.
    """
    import pandas as pd

    rates, _ = _searched(choices)
    if not rates:
        return frame
    plain = frame["arm"].map({arm: arm.without_rate for arm in frame["arm"].unique()})
    keys = pd.Series(list(zip(frame["family"], plain)), frame.index)
    at_rate = (frame["learning_rate"] / keys.map(rates).astype(float) - 1).abs() < 0.01
    is_swept = keys.isin(set(keys[at_rate])) & is_trained(frame)
    shown = frame.assign(arm=frame["arm"].where(~is_swept, plain))[~is_swept | at_rate]
    left_out = set(frame["run"]) - set(shown["run"])
    for name in {"other", "other_run"} & {*shown}:  # the run that a record compares with
        shown = shown[~shown[name].isin(left_out)]
    shown.attrs = dict(frame.attrs) | ({"note": AT_CHOSEN} if left_out else {})
    return shown


def at_only_rates(frames: Mapping[str, DataFrame | None]) -> dict[str, DataFrame | None]:
    """The frames of a study, an arm that has one learning rate alone, as one that was set, under
    its plain label."""
    arms = {a for f in frames.values() if f is not None for a in f["arm"].unique() if a.is_trained}
    rates = Counter(arm.without_rate for arm in arms)
    plain = {a: a.without_rate for a in arms if a.learning_rate and rates[a.without_rate] == 1}
    shown = {}
    for name, frame in frames.items():
        if plain and frame is not None:
            attrs, known = frame.attrs, {a: plain.get(a, a) for a in frame["arm"].unique()}
            frame = frame.assign(arm=frame["arm"].map(known))
            frame.attrs = attrs
        shown[name] = frame
    return shown


def rates_sentence(frame: DataFrame, choices: Iterable[Mapping[str, Any]]) -> str:
    """Where the learning rates of the arms in the records come from: a sweep, the study, or the
    defaults."""
    rates, problems = _searched(choices)
    runs = frame[is_trained(frame)]
    arms: dict[tuple[str, Arm], set[float]] = {}  # and the rates that their labels say
    for family, arm in set(zip(runs["family"], runs["arm"])):
        arms.setdefault((family, arm.without_rate), set()).add(arm.learning_rate)
    families = [*FAMILIES, *sorted(set(runs["family"]))]
    order = sorted(arms, key=lambda arm: (families.index(arm[0]), arm[1]))
    names = {arm: f"{arm[0]} {arm[1]}" for arm in order}
    chosen = [f"{name} {rates[arm]:g}" for arm, name in names.items() if arm in rates]
    refused = [arm for arm in names if arm in problems]
    others = {arm: name for arm, name in names.items() if arm not in rates and arm not in problems}
    fixed = {a: max(arms[a]) for a in others if len(arms[a]) == 1 and arms[a] != {0.0}}
    default = [name for arm, name in others.items() if arm not in fixed]
    if not chosen and not refused and not fixed:
        return f"{NO_SWEEP_SENTENCE[:-1]}: the defaults per arm stand."
    sentences = [f"A sweep chose none for {names[arm]}: {problems[arm]}." for arm in refused]
    if chosen:
        first = f"Learning rates that a sweep chose on validation: {', '.join(chosen)}."
        sentences.insert(0, first)
    if fixed:
        given = ", ".join(f"{others[arm]} {rate:g}" for arm, rate in fixed.items())
        sentences.append(f"Learning rates that were set, not searched: {given}.")
    if default:
        sentences.append(f"No sweep of {', '.join(default)}: the default stands.")
    return " ".join(sentences)


# ------------------------------------------------------------------------------- from runs


def _run_measures(
    adaptation: DataFrame, retention: DataFrame | None, drift: DataFrame | None
) -> DataFrame:
    """The runs' last checkpoints, one a row: family, arm, learning_rate, seed, measures."""
    means = family_means(last_checkpoints(adaptation))[["run", "family", "value", "stderr"]]
    fields = adaptation[is_trained(adaptation)].drop_duplicates("run")
    runs = means.rename(columns={"value": "score", "stderr": "score_stderr"})
    runs = runs.merge(fields[["run", "arm", "learning_rate", "seed"]], on="run")
    runs = runs[runs["learning_rate"] > 0]  # unknown of outside checkpoints
    runs["arm"] = [arm.without_rate for arm in runs["arm"]]
    lost = None if retention is None else mean_forgetting(retention)
    for name, rows in (
        ("forgetting", lost),
        ("drift", None if drift is None else update_sizes(drift)),
    ):
        for column, source in ((name, "value"), (f"{name}_stderr", "stderr")):
            values = {} if rows is None else dict(zip(rows["run"], rows[source]))
            runs[column] = runs["run"].map(values).astype(float)
    return runs


def _mean(values: Series, errors: Series) -> tuple[float, float, float]:
    """Mean over seeds, its standard error, and half of its interval.

    Over seeds and items from three seeds on, else over items.
    """
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS, NORMAL
    from lora_tradeoffs.statistics.seed_intervals import estimate_over_seeds

    known = values.dropna()
    if len(known) < MIN_SEEDS:
        error = errors[known.index].mean()
        return known.mean(), error, NORMAL * error
    items = (errors[known.index] ** 2).mean()
    figures = estimate_over_seeds(known.to_numpy(), 0.0 if math.isnan(items) else items)
    return figures.value, figures.stderr, figures.high - figures.value


def searched_arm(choice: Mapping[str, Any]) -> Arm:
    """The arm that was searched, from its record in learning_rates.json."""
    run = f"{choice['arm']}_seed0"
    tasks, variant = tasks_and_variant(run, {**choice, "seed": 0})
    return arm_of({**choice, "run": run, "tasks": tasks, "variant": variant})


def _searched(
    choices: Iterable[Mapping[str, Any]],
) -> tuple[dict[tuple[str, Arm], float], dict[tuple[str, Arm], str]]:
    """By family and arm: the chosen rates, and why searches chose none."""
    by_arm = [((choice["family"], searched_arm(choice)), choice) for choice in choices]
    chosen = {arm: float(c["learning_rate"]) for arm, c in by_arm if c["chosen"]}
    return chosen, {arm: c["problem"] for arm, c in by_arm if c.get("problem")}


def _is_chosen(
    table: DataFrame, rates: Mapping[tuple[str, Arm], float], problems: Mapping[Any, str]
) -> list[bool]:
    ranked = table.sort_values(["score", "learning_rate"], ascending=[False, True])
    best = ranked.groupby(ARM)["learning_rate"].nth(0)  # also where no rate has a score
    highest = ranked.loc[best.index].set_index(ARM)["learning_rate"].to_dict()
    chosen = highest | dict.fromkeys(problems, math.nan) | rates
    keys = zip(table["family"], table["arm"], table["learning_rate"])
    return [math.isclose(chosen[family, arm], rate, rel_tol=0.01) for family, arm, rate in keys]


# ------------------------------------------------------------------------- LoRA against full


def _reference(arm: Arm, arms: set[Arm]) -> Arm | None:
    """The full arm that an adapter is compared with: with the same other fields, else the plain.

    None for what is no adapter.
    """
    if not arm.is_adapter:
        return None
    words = arm.variant.split()
    shared = [w for w in words if w not in SCALINGS and not w.startswith(("dropout", "ratio"))]
    full = replace(arm, method="full", rank=0, target_modules="qv", variant=" ".join(shared))
    return full if full in arms else FULL


def _less(side: str, full: Series, lora: Series) -> dict[str, float]:
    """How much less LoRA forgets than full fine-tuning at these rates, with its interval."""
    less = full["forgetting"] - lora["forgetting"]
    half = math.hypot(full["forgetting_reach"], lora["forgetting_reach"])
    values = {"less": less, "low": less - half, "high": less + half}
    for suffix, rates in (("", full), ("_lora", lora)):
        values |= {f"rate{suffix}": rates["learning_rate"], f"score{suffix}": rates["score"]}
        values |= {f"forgetting{suffix}": rates["forgetting"]}
    return {f"{side}_{name}": value for name, value in values.items()}


def _verdict(row: Mapping[str, float]) -> str:
    if row["retaining_low"] > 0:
        return "survives"
    if row["retaining_high"] < 0:
        return "reversed"
    return "lost" if row["chosen_low"] > 0 else "none"


def _sentence(family: str, rows: DataFrame) -> str:
    first = rows.iloc[0]
    differences = rows.apply(
        "{0[arm]} at {0[retaining_rate_lora]:g} (score {0[retaining_score_lora]:.3f}, full minus"
        " LoRA {0[retaining_less]:.3f}, {0[retaining_low]:.3f} to {0[retaining_high]:.3f})".format,
        axis=1,
    )
    parts = [
        f"{text} {', '.join(differences[rows['verdict'] == verdict])}"
        for verdict, text in VERDICTS.items()
        if (rows["verdict"] == verdict).any()
    ]
    return (
        f"{family}: at its best-retaining rate {first['retaining_rate']:g} full fine-tuning scores"
        f" {first['retaining_score']:.3f} (within one standard error of its best) and forgets"
        f" {first['retaining_forgetting']:.3f}, at its chosen rate {first['chosen_rate']:g}"
        f" {first['chosen_score']:.3f} and {first['chosen_forgetting']:.3f}; with all arms at their"
        f" best-retaining rates {'; '.join(parts)}."
    )


def _why_not(rates: DataFrame) -> str:
    """Why nothing can be said of a family's sweep."""
    full = [arm for _, arm in swept_arms(rates) if arm.method == "full"]
    if not full:
        return "no sweep of full fine-tuning, so the default of that arm stands"
    known = rates.dropna(subset=["forgetting"])
    if known.empty:
        return "forgetting was not measured at the points of the sweep (retention_eval.py)"
    if not known[known["arm"].isin(full)]["chosen"].any():
        return "the sweep of full fine-tuning chose no learning rate"
    return "no LoRA arm beside the sweep of full fine-tuning whose forgetting was measured"
