"""The table that each analysis prints when it ends: every run at its last checkpoint.

print(adaptation_table(document["records"]))
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K
from dataset_descriptions import describe, ordered
from lora_tradeoffs.records import BOTH, CONTROL, INTRUDERS, MEAN, OVERALL, TEXT
from lora_tradeoffs.tables.retention import retained

if TYPE_CHECKING:
    from pandas import DataFrame

DRIFT_COLUMNS = {  # title, metric, format
    "share": ("update_share", ".1%"),
    "|dW|/|W0|": ("relative_frobenius", ".2e"),
    "stable rank": ("stable_rank", ".1f"),
    "rank90": ("rank90", ".1f"),
    "rho": ("rho", ".2f"),
    "intruders": ("intruders", ".2f"),
}

# A metric that papers report under the primary's name: on CNN/DailyMail ROUGE-Lsum as ROUGE-L.
SHOWN_BESIDE = {"rougeL": "rougeLsum"}
NO_RECORDS = "no records: no checkpoint could be measured"


def adaptation_table(records: Iterable[dict[str, Any]]) -> str:
    """Runs by tasks: the primary metric, on test where it was measured, and SHOWN_BESIDE it."""
    rows = _last_checkpoints(records)
    main = rows["task"].map(lambda task: describe(task).metrics[0])
    rows = rows[(rows["metric"] == main) | (rows["metric"] == main.map(SHOWN_BESIDE))]
    scores = rows[rows["prompt"] == 0].astype({"value": float, "stderr": float})
    shots = scores["shots"].map(lambda n: f" ({n:.0f} shots)" if n else "")
    scores = scores.assign(row=scores["run"] + shots)
    order = scores["row"].unique()
    scores = scores.sort_values("split", key=lambda split: split != "test", kind="stable")
    scores = scores.drop_duplicates(["row", "task", "metric"])
    is_validation = scores["split"] == "validation"
    best = scores.groupby(["task", "metric", is_validation])["value"].transform("max")
    cells = scores["value"].map("{:.3f}".format) + " +- " + scores["stderr"].map("{:.3f}".format)
    cells += (scores["value"] == best).map({True: "*", False: " "})
    cells += is_validation.map({True: " v", False: "  "})
    scores = scores.assign(cell=cells, column=scores["task"] + " " + scores["metric"])
    titles = [
        f"{task} {metric}" for task in ordered(rows["task"]) for metric in describe(task).metrics
    ]
    titles = [title for title in titles if title in set(scores["column"])]
    note = "value +- standard error over items; v: validation, else test; *: highest on its split"
    return "\n".join([_as_text(scores, order, titles), *_prompt_lines(rows), note])


def _prompt_lines(rows: DataFrame) -> list[str]:
    """Mean and standard deviation of a score over prompts, where several were used."""
    rows = rows[(rows["shots"] == 0) & ~rows["metric"].isin(SHOWN_BESIDE.values())]
    prompts = rows.groupby(["run", "task", "split"], sort=False)["value"]
    spread = prompts.agg(["size", "mean", "std"])
    return [
        f"over {n} prompts: {' '.join(key)} mean {mean:.3f}, sd {sd:.3f}"
        for key, n, mean, sd in spread[spread["size"] > 1].itertuples()
    ]


def retention_table(records: Iterable[dict[str, Any]]) -> str:
    """Runs by tasks: the score, and its change against the base with the standard error.

    A task with in-context examples is a column of its own for each number of them.
    """
    import pandas as pd

    records = list(records)
    frame = pd.DataFrame(record for record in records if not record.get("shrunk"))
    shots = frame["shots"].map(lambda n: f" ({n:.0f} shots)" if n else "")
    frame["task"] += shots
    rows = _last_checkpoints(frame)
    scores = retained(rows)
    rows = rows[rows["update_scale"] == 1]
    cells = scores.set_index(["run", "task"])["value"].map("{:.3f}".format)
    losses = rows[rows["metric"] == "forgetting"]
    if len(losses):
        known = losses.dropna(subset=["stderr"]).set_index(["run", "task"])
        marks = (known["p_value"] < 0.05).map({True: "*)", False: " )"})
        changes = (-known["value"]).map(" ({:+.3f}".format) + known["stderr"].map(
            " +- {:.3f}".format
        )
        cells = cells.add(changes + marks, fill_value="")
    tasks = sorted(set(scores["task"]), key=lambda t: (t.startswith(TEXT), t.startswith(MEAN), t))
    cells = cells.rename_axis(["row", "column"]).rename("cell").reset_index()
    note = (
        "in brackets: change against the base on the same items +- standard error; *: p < .05 in"
        " the paired test, uncorrected; text: nats per token"
    )
    table = _as_text(cells, frame["run"].unique(), tasks)
    return "\n".join([table, *_retention_notes(frame, losses), note, *_shrink_notes(records)])


def _shrink_notes(records: list[dict[str, Any]]) -> list[str]:
    """A line for each checkpoint and factor: the intruders left, and what their shrinking cost."""
    notes: dict[str, None] = {}
    shrunk = [record for record in records if record.get("shrunk") == INTRUDERS]
    for count in (record for record in shrunk if record["metric"] == INTRUDERS):
        run, factor, directions = count["run"], count["shrink"], count["directions"]
        if not directions:
            notes[f"{run}: no intruder dimensions, so nothing was shrunk"] = None
            continue
        keys = {"run": run, "shrink": factor, "metric": "shrink_effect", "against": CONTROL}
        effects = [record for record in shrunk if keys.items() <= record.items()]
        lost = [
            f"{r['task']} {r['value']:+.3f}"
            + ("" if r["stderr"] is None else f" +- {r['stderr']:.3f}")
            for r in effects
        ]
        note = f"{run}: {directions} intruders x {factor:g}, {count['value']} are left;"
        notes[f"{note} lost more than with the control: {', '.join(lost) or 'unknown'}"] = None
    return list(notes)


def _retention_notes(frame: DataFrame, losses: DataFrame) -> list[str]:
    """Benchmarks on which nothing can be forgotten, and contexts that had to be cut."""
    notes = []
    if "at_chance" in losses and losses["at_chance"].eq(True).any():
        names = ", ".join(sorted(set(losses["task"][losses["at_chance"].eq(True)])))
        notes.append(
            f"the base is at chance (not two standard errors above it) on {names}: forgetting"
            " cannot be measured there"
        )
    if "truncated" in frame and frame["truncated"].fillna(0).any():
        cut = frame[frame["truncated"] > 0].groupby("task")["truncated"].max()
        counts = ", ".join(f"{n:.0f} of {task}" for task, n in cut.items())
        notes.append(f"contexts longer than the model's window, cut from the left: {counts}")
    return notes


def drift_table(records: Iterable[dict[str, Any]]) -> str:
    """Runs and modules: the size of the update and its spectrum; intruders per matrix."""
    metrics = [metric for metric, _ in DRIFT_COLUMNS.values()]
    published = [
        r
        for r in records
        if r["metric"] in metrics
        and r["layer"] == OVERALL
        and r["k"] in (None, INTRUDER_K)
        and r["eps"] in (None, INTRUDER_EPSILON)
    ]
    if not published:
        return NO_RECORDS
    table = _last_checkpoints(published).pivot_table(
        index=["run", "module"], columns="metric", values="value", aggfunc="last", sort=False
    )
    table = table.reindex(columns=metrics).dropna(subset=["relative_frobenius"])
    table.columns = list(DRIFT_COLUMNS)
    for title, (_, form) in DRIFT_COLUMNS.items():
        table[title] = table[title].map(f"{{:{form}}}".format, na_action="ignore").fillna("")
    note = (
        f"share: of ||dW||^2 of all tensors; rho, intruders: k = {INTRUDER_K}, eps ="
        f" {INTRUDER_EPSILON}, mean over the matrices"
    )
    return f"{table.reset_index('module').rename_axis(None).to_string()}\n{note}"


def gradient_table(records: Iterable[dict[str, Any]]) -> str:
    """For each family, runs by pairs of tasks: the gradients' cosine over all layers."""
    import pandas as pd

    overall = [r for r in records if (r["layer"], r["module"]) == (OVERALL, BOTH)]
    if not overall:
        return NO_RECORDS
    rows = _last_checkpoints(overall)
    known = rows.dropna(subset=["value"])
    keys = ["family", "run", "task", "other"]
    within = known[known["metric"] == "within_cosine"].groupby(keys[:2])["value"].mean()
    within = within.map("{:+.3f}".format).rename("cell").reset_index().assign(column="within")
    cosines = known[known["metric"] == "gradient_cosine"]
    shares = known[known["metric"] == "gradient_conflict"][[*keys, "value"]]
    pairs = cosines.merge(shares, on=keys, suffixes=("", "_share"))
    errors = pairs["stderr"].map(" +- {:.3f}".format, na_action="ignore").fillna("")
    pairs["cell"] = pairs["value"].map("{:+.3f}".format) + errors
    pairs["cell"] += pairs["value_share"].map(" ({:4.0%})".format)
    names = pairs["task"] + " " + pairs["other"]
    pairs["column"] = names.where(pairs["task"] != MEAN, MEAN)
    cells = pd.concat([pairs, within]).rename(columns={"run": "row"})
    tables = []
    for family in (f for f in FAMILIES if f in set(cells["family"])):
        own = cells[cells["family"] == family]
        columns = sorted(set(own["column"]), key=lambda c: (c == "within", c == MEAN, c))
        order = rows[rows["family"] == family]["run"].unique()
        tables.append(f"{family}\n{_as_text(own, order, columns)}")
    note = (
        "cosine +- standard error over batches (share of batches in conflict); within: of a task"
        " with itself, on halves of its batches, mean over the tasks: a reference for noise"
    )
    return "\n".join([*tables, note])


def _last_checkpoints(records: Any) -> DataFrame:
    """The records of each run's last measured checkpoint."""
    import pandas as pd

    frame = pd.DataFrame(records)
    return frame[frame["step"] == frame.groupby("run")["step"].transform("max")]


def _as_text(cells: DataFrame, rows: Iterable[str], columns: Iterable[str]) -> str:
    """The column `cell` as a table of `row` by `column`, in this order; "-" where there is none."""
    table = cells.pivot(index="row", columns="column", values="cell")
    table = table.reindex(index=list(rows), columns=list(columns))
    return table.rename_axis(index=None, columns=None).fillna("-").to_string()
