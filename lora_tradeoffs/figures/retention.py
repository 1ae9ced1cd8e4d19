"""Figures of retention: scores over training, forgetting by rank, drift of the layers, and the
plane of what is learned and what is forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from config import FAMILIES
from lora_tradeoffs.figures import marks, panels
from lora_tradeoffs.figures.style import GREY, METRIC_LABELS, style_of, styled
from lora_tradeoffs.tables.arms import BASE, Arm
from lora_tradeoffs.tables.frames import is_trained, last_checkpoints, summarise, unfinished
from lora_tradeoffs.tables.retention import (
    as_trained,
    at_chance,
    blocks,
    forgotten,
    in_panels,
    matched,
    pareto_front,
    plane_points,
    plane_table,
    retained,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

PLANE, ALONE = (3.6, 3.3), (5.0, 3.6)  # inches; two families fill a page


@styled()
def retention_curves(study: StudyRecords) -> Figure:
    """Scores on the benchmarks, their mean and held-out text over training, a row per family."""
    rows = in_panels(retained(study.retention))
    trained = rows[is_trained(rows)].dropna(subset=["fraction"])
    if trained.empty:
        return panels.nothing(study.retention, "no checkpoint's score on a benchmark")
    table = summarise(trained.assign(fraction=trained["fraction"].round(4)), by=("fraction",))
    chance = _chance(rows)
    figure, axes = panels.titled(blocks(trained, METRIC_LABELS), share_x="all")
    panels.training_curves(axes, rows, table)
    for title, ax in axes.items():
        low, high = ax.get_ylim()
        if low < chance.get(title, -1) < high:
            ax.axhline(chance[title], color=GREY, linestyle=":", lw=1.0, label="chance")
    about = "Arms are shifted sideways at a checkpoint. The mean is over the benchmarks."
    about += _mark_chance(axes, study.retention)
    labels = {line.get_label() for ax in axes.values() for line in ax.lines}
    extra = [panels.dotted("chance")] * ("chance" in labels)
    arms = {*table["arm"], *rows["arm"][rows["method"] == "base"]}
    sentences = [about, *panels.interval_notes(table)]
    return panels.finish(figure, study.retention, arms, sentences, extra=extra)


def forgetting_by_rank(study: StudyRecords) -> Figure:
    """Forgetting at the last checkpoint, by LoRA rank, then full qv and full."""
    rows = forgotten(study.retention)
    if rows.empty:
        return panels.nothing(study.retention, "no last checkpoint's forgetting")
    about = "Forgetting: base minus tuned, at the last checkpoint; above the dashed line is lost."
    about += " The mean is over the benchmarks." + unfinished(study.retention)
    return _by_rank(study.retention, in_panels(rows), "forgetting", about)


def matched_forgetting(study: StudyRecords) -> Figure:
    """Forgetting minus that of another arm where both score the same on validation, by rank."""
    rows = matched(study.retention)
    if rows.empty:
        missing = "no forgetting at equal validation scores (--scale-update)"
        return panels.nothing(study.retention, missing)
    rows = in_panels(rows.assign(task=[f"against {other}" for other in rows["other"]]))
    about = (
        "Difference in forgetting between updates scaled to equal validation score: above the"
        " dashed line the arm forgets more than the one that it is compared with."
    )
    return _by_rank(study.retention, rows, "difference in forgetting", about)


@styled()
def _by_rank(frame: DataFrame, rows: DataFrame, label: str, about: str) -> Figure:
    """Panels of differences from zero, by rank; zero is the base's forgetting."""
    table = summarise(rows)
    has_base = label == "forgetting" and (frame["method"] == "base").any()
    figure, axes = panels.titled(blocks(rows, dict.fromkeys(rows["metric"], label)), share_x="all")
    for ax in axes.values():
        ax.axhline(0.0, **marks.ZERO)
    panels.points_by_rank(axes, rows, table)
    about += _mark_chance(axes, frame)
    arms = {*table["arm"], *([BASE] if has_base else [])}
    sentences = [about, *panels.interval_notes(table, "; small points: single seeds")]
    return panels.finish(figure, frame, arms, sentences, "lines over points")


@styled()
def cka_by_layer(study: StudyRecords) -> Figure:
    """Similarity of the hidden states to the base's (CKA) by layer, at the last checkpoint."""
    frame = study.retention
    rows = as_trained(frame)
    rows = last_checkpoints(rows[(rows["metric"] == "cka") & is_trained(rows)])
    if rows.empty:
        return panels.nothing(frame, "no last checkpoint's CKA")
    rows = in_panels(rows)
    table = summarise(rows, by=("layer",))
    arms = sorted(set(table["arm"]))
    figure, axes = panels.titled(blocks(rows, METRIC_LABELS), share_x="all")
    for title, ax in axes.items():
        ax.axhline(1.0, **marks.ZERO)
        for arm, points in table[table["task"] == title].groupby("arm"):
            # every arm marks and bars other layers, so that they do not overlap
            marked = slice(2 * arms.index(arm) % len(arms), None, len(arms))
            x, y = points["layer"], points["value"]
            ax.plot(x, y, label=arm, markevery=marked, **style_of(arm))
            marks.bars(ax, x[marked], points[marked], arm)
        ax.xaxis.get_major_locator().set_params(integer=True)
    panels.label_edges(axes, "layer")
    about = "Linear CKA with the base, last checkpoint; 1: the base's, but for rotation and scale."
    shown = {*arms, *frame["arm"][frame["method"] == "base"]}
    return panels.finish(
        figure, frame, shown, [about + unfinished(frame), *panels.interval_notes(table)]
    )


@styled()
def learning_forgetting_plane(study: StudyRecords) -> Figure:
    """Gain on the tasks against forgetting, a panel per family, a curve per arm.

    A curve leads from the base through the checkpoints to the last, large with its intervals. The
    front is of all points drawn: checkpoints, scaled updates and the base.
    """
    retention = study.retention
    points = plane_points(retention, study.adaptation)
    if points.empty:
        return panels.nothing(
            retention, "no checkpoint with both forgetting and a validation score"
        )
    table = plane_table(points)
    ends = plane_table(last_checkpoints(points[points["update_scale"] == 1]))
    families = sorted(table["task"].unique(), key=[*FAMILIES].index)
    titles = dict.fromkeys(families, "forgetting (mean over benchmarks)")
    figure, axes = panels.titled([titles], columns=2, size=PLANE if len(titles) > 1 else ALONE)
    for family, ax in axes.items():
        for arm, path in table[table["task"] == family].groupby("arm"):
            _paths(ax, path, arm)
        _ends(ax, ends[ends["task"] == family])
        _front(ax, table[table["task"] == family])
        ax.set_xlabel("gain on the validation scores (mean over tasks)")
    sentences = [_about_plane(points, retention), *panels.interval_notes(table)]
    arms = {*table["arm"], *retention["arm"][retention["method"] == "base"]}
    extra = _plane_legend(points)
    return panels.finish(figure, retention, arms, sentences, "lines from a point", extra)


def _mark_chance(axes: Mapping[str, Axes], frame: DataFrame) -> str:
    """Grey the panels of benchmarks on which the base is at chance; what the caption says then."""
    marked = [title for title in axes if title.split(": ", 1)[1] in at_chance(frame)]
    for title in marked:
        axes[title].set_facecolor("#f4f4f4")
        axes[title].set_title(f"{title} †", loc="left")
    return " † Grey: the base is at chance, nothing can be forgotten here." if marked else ""


def _chance(rows: DataFrame) -> dict[str, float]:
    """What guessing scores, by panel."""
    if "chance" not in rows:
        return {}
    known = rows.dropna(subset=["chance"])
    return dict(zip(known["task"], known["chance"].astype(float)))


def _paths(ax: Axes, path: DataFrame, arm: Arm) -> None:
    """An arm's checkpoints from the base on, and dotted its last update at other scales."""
    style = style_of(arm)
    colour, small = style["color"], {"ms": 2.6, "zorder": 3}
    plain = path[path["update_scale"] == 1].sort_values("fraction")
    x, y = ([0.0, *plain[name]] for name in ("value_gain", "value"))
    dots = {"marker": "o", "mew": 0, "markevery": slice(1, None), "linestyle": style["linestyle"]}
    ax.plot(x, y, color=colour, lw=1.0, label=arm, **dots | small)
    if (path["update_scale"] != 1).any():
        last = path[path["fraction"] == path["fraction"].max()].sort_values("update_scale")
        x, y = (list(last[name]) for name in ("value_gain", "value"))
        if last["update_scale"].min() > 0:  # t = 0 is the base
            x, y = [0.0, *x], [0.0, *y]
        dots = {"marker": "o", "mfc": "white", "mew": 0.6, "linestyle": (0, (1, 1.4))}
        ax.plot(x, y, color=colour, lw=0.8, label=f"scaled {arm}", **dots | small)


def _ends(ax: Axes, ends: DataFrame) -> None:
    """The last checkpoints, large, with a cross of their two intervals."""
    for _, point in ends.iterrows():
        style = style_of(point["arm"]) | {"linestyle": "none", "ms": 7.5, "zorder": 6}
        gain = {name: point[f"{name}_gain"] for name in ("value", "low", "high")}
        at = [gain["value"]], [point["value"]]
        lengths = {"xerr": marks.interval_lengths(gain), "yerr": marks.interval_lengths(point)}
        cross = {"fmt": "none", "elinewidth": 0.8, "alpha": 0.55, "zorder": 4}
        ax.errorbar(*at, **lengths, **cross, ecolor=style["color"], label=point["arm"])
        if style.get("markerfacecolor") != "white":
            style |= {"markeredgecolor": "white", "markeredgewidth": 0.7}
        ax.plot(*at, **style, label=f"last {point['arm']}")


def _front(ax: Axes, points: DataFrame) -> None:
    """The Pareto front as steps, what it beats in grey, and the base at the origin."""
    x, y = ([0.0, *points[name]] for name in ("value_gain", "value"))
    chosen = pareto_front(x, y)
    ax.axhline(0.0, **marks.ZERO | {"lw": 0.7, "label": "zero"})
    ax.axvline(0.0, **marks.ZERO | {"lw": 0.7, "label": "zero"})
    ax.margins(0.06)
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    steps_x = [left, *(x[i] for i in chosen), x[chosen[-1]]]
    steps_y = [y[chosen[0]], *(y[i] for i in chosen), high]
    ax.fill_between(steps_x, steps_y, high, step="pre", color="#f3f3f3", lw=0, zorder=0)
    front = {"drawstyle": "steps-pre", "color": "#333333", "lw": 0.7, "zorder": 2}
    ax.plot(steps_x[1:-1], steps_y[1:-1], label="Pareto front", **front)
    ax.plot([0], [0], linestyle="none", marker="*", ms=10, color=GREY, zorder=5, label="base")
    ax.set(xlim=(left, right), ylim=(low, high))
    ax.locator_params(axis="x", nbins=5)
    ax.set_title("better: down and right", loc="right", size=6.5, weight="normal", color=GREY)


def _kinds(points: DataFrame) -> tuple[bool, list[float]]:
    """Are there checkpoints before the last, and the scales of updates beside base and last."""
    plain = points[points["update_scale"] == 1]
    early = (plain["step"] < plain.groupby("run")["step"].transform("max")).any()
    return bool(early), sorted(set(points["update_scale"]) - {0.0, 1.0})


def _plane_legend(points: DataFrame) -> list[Any]:
    from matplotlib.lines import Line2D

    early, scaled = _kinds(points)
    dots, entries = {"color": GREY, "marker": "o", "ms": 2.6}, []
    if early:
        entries.append(Line2D([], [], label="checkpoints", **dots | {"mew": 0}))
    if scaled:
        dots |= {"mfc": "white", "linestyle": (0, (1, 1.4)), "lw": 0.8}
        entries.append(Line2D([], [], label="scaled update", **dots))
    return [*entries, Line2D([], [], label="Pareto front", color="#333333", lw=0.7)]


def _about_plane(points: DataFrame, retention: DataFrame) -> str:
    early, scaled = _kinds(points)
    about = "Small points: checkpoints, from the base on; large:" if early else "Large points:"
    about += (
        " the last checkpoint, with its intervals (along x that of the score: the base's error,"
        " common to all arms, is left out)."
    )
    if scaled:
        about += f" Open: its update scaled by {', '.join(f'{t:g}' for t in scaled)}."
    about += (
        " Pareto front: of all points drawn and the base, those that none beats in both; whatever"
        " lies in grey is beaten. A front picks lucky points, too."
    )
    items = points["gain_n"].dropna().astype(int)
    if items.nunique() > 1:
        about += f" Points were scored on {items.min()} to {items.max()} validation items."
    tasks = at_chance(retention)
    if tasks:
        about += f" On {', '.join(tasks)}, part of the mean, the base is at chance."
    return about + unfinished(points, "No large point")
