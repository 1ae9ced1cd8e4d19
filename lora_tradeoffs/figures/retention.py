"""Figures of retention: scores over training, forgetting by rank, drift of the layers, and the
plane of what is learned and what is forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tradeoffs.figures import marks
from lora_tradeoffs.figures.panels import (
    NothingToDraw,
    Panels,
    dotted,
    figure_of,
    interval_notes,
    require,
)
from lora_tradeoffs.figures.style import GREY, METRIC_LABELS, style_of
from lora_tradeoffs.records import CHECKPOINT, CONTROL, HELD_OUT, LEARNED, MEAN
from lora_tradeoffs.tables.arms import BASE, Arm
from lora_tradeoffs.tables.frames import in_order, is_trained, last_checkpoints, unfinished
from lora_tradeoffs.tables.retention import (
    as_trained,
    at_chance,
    examples_sentence,
    forgotten,
    in_panels,
    matched,
    pareto_front,
    plane_points,
    plane_table,
    retained,
    shrink_effects,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from lora_tradeoffs.figures.study_records import StudyRecords

PLANE, ALONE = (3.6, 3.3), (5.0, 3.6)  # inches; two families fill a page
DOTS = {"marker": "o", "ms": 2.6}
CHECKPOINTS = DOTS | {"mew": 0}
SCALED = DOTS | {"mfc": "white", "mew": 0.6, "linestyle": (0, (1, 1.4)), "lw": 0.8}
FRONT = {"color": "#333333", "lw": 0.7, "label": "Pareto front"}


@figure_of("retention")
def retention_curves(study: StudyRecords, frame: DataFrame) -> Figure:
    """Scores on the benchmarks, their mean and held-out text over training, a row per family."""
    rows = retained(frame).dropna(subset=["fraction"])
    require(rows[is_trained(rows)], "no checkpoint's score on a benchmark")
    panels = Panels.wrapped(in_panels(rows, METRIC_LABELS), share_x="all")
    means = marks.curves(panels, "fraction")
    has_chance = False
    for _, ax, part in panels:
        low, high = ax.get_ylim()
        for chance in part["chance"].dropna().unique() if "chance" in part else ():
            if low < chance < high:
                has_chance = True
                ax.axhline(chance, color=GREY, linestyle=":", lw=1.0, label="chance")
    about = "Arms are shifted sideways at a checkpoint. The mean is over the benchmarks."
    about += examples_sentence(rows)
    sentences = [about, _mark_chance(panels, frame), *interval_notes(means)]
    return panels.finish(frame, sentences, extra=[dotted("chance")] * has_chance)


@figure_of("retention")
def forgetting_by_rank(study: StudyRecords, frame: DataFrame) -> Figure:
    """Forgetting at the last checkpoint, by LoRA rank, then full qv and full."""
    rows = require(forgotten(frame), "no last checkpoint's forgetting")
    about = "Forgetting: base minus tuned, at the last checkpoint; above the dashed line is lost."
    about += " The mean is over the benchmarks (mean_above_chance: those on which the base is above"
    about += " chance), text over the held-out texts that a run was not trained on."
    about += examples_sentence(rows) + unfinished(frame)
    return _by_rank(frame, rows, "forgetting", about, _base_of(frame))


@figure_of("retention")
def matched_forgetting(study: StudyRecords, frame: DataFrame) -> Figure:
    """Forgetting minus that of another arm where both score the same on validation, by rank."""
    rows = matched(frame)
    apart = rows[rows["value"].isna()]
    apart = ", ".join(f"{run} ({task})" for run, task in zip(apart["run"], apart["task"]))
    rows = rows.dropna(subset=["value"])
    require(rows, "no forgetting at equal validation scores (--scale-update)")
    pairs = zip(rows["task"], rows["other"])
    rows = rows.assign(task=[f"{task}, against {other}" for task, other in pairs])
    about = (
        "Difference in forgetting between updates scaled to equal validation score: above the"
        " dashed line the arm forgets more than the one that it is compared with; mean: over the"
        " benchmarks, text: over held-out text."
    )
    about += f" Left out, without a score in common: {apart}." if apart else ""
    return _by_rank(frame, rows, "difference in\nforgetting", about)


@figure_of("retention")
def shrunk_intruders(study: StudyRecords, frame: DataFrame) -> Figure:
    """What is lost where singular values of intruder dimensions, or of a control, are shrunk."""
    if study.shrunk is None:
        raise NothingToDraw("no shrunk intruder dimensions (--shrink-intruders)")
    rows = shrink_effects(study.shrunk, CONTROL, CHECKPOINT)
    rows = rows[rows["task"].isin([LEARNED, MEAN, HELD_OUT])]
    require(rows, "no last checkpoint has intruder dimensions")
    is_difference = rows["against"] == CONTROL
    column = (rows["shrunk"] + " shrunk").mask(is_difference, "intruders minus control")
    rows = rows.assign(row=rows["family"] + ", " + rows["task"], column=column)
    rows = rows.sort_values("column", key=lambda c: c.eq("intruders minus control"), kind="stable")
    panels = Panels.grid(rows, "row", "column", size=(2.2, 1.8), share_y="row")
    means = marks.curves(panels, "shrink", start=None, spread=0.02)
    for ax in panels.axes.values():
        ax.axhline(0.0, **marks.ZERO)
    panels.label("factor of the singular values", lambda row: f"lost: {row}")
    about = (
        "Last checkpoint; factor 1 is the checkpoint. Above the dashed line: more is forgotten than"
        " by the checkpoint (mean: over the benchmarks, text: held-out text, nats a token), or the"
        " score on the trained tasks' validation rows (adaptation) is lower. The control shrinks as"
        " many other directions of the nearest singular values."
    )
    return panels.finish(frame, [about, *interval_notes(means)])


def _by_rank(
    frame: DataFrame, rows: DataFrame, label: str, about: str, base: tuple[Arm, ...] = ()
) -> Figure:
    """Panels of differences from zero, by rank; zero is the base's forgetting."""
    panels = Panels.wrapped(in_panels(rows, dict.fromkeys(rows["metric"], label)), share_x="all")
    for ax in panels.axes.values():
        ax.axhline(0.0, **marks.ZERO)
    means = marks.points_by_rank(panels)
    intervals = interval_notes(means, small="; small points: single seeds")
    sentences = [about, _mark_chance(panels, frame), *intervals]
    return panels.finish(frame, sentences, "lines over points", arms=base)


@figure_of("retention")
def cka_by_layer(study: StudyRecords, frame: DataFrame) -> Figure:
    """Similarity of the hidden states to the base's (CKA) by layer, at the last checkpoint."""
    rows = as_trained(frame)
    rows = last_checkpoints(rows[(rows["metric"] == "cka") & is_trained(rows)])
    require(rows, "no last checkpoint's CKA")
    panels = Panels.wrapped(in_panels(rows, METRIC_LABELS), share_x="all")
    for ax in panels.axes.values():
        ax.axhline(1.0, **marks.ZERO)
    means = marks.curves(panels, "layer", thin=True)
    about = "Linear CKA with the base, last checkpoint; 1: the base's, but for rotation and scale."
    sentences = [about + unfinished(frame), *interval_notes(means)]
    return panels.finish(frame, sentences, arms=_base_of(frame))


@figure_of("retention")
def learning_forgetting_plane(study: StudyRecords, frame: DataFrame) -> Figure:
    """Gain on the tasks against forgetting, a panel per family, a curve per arm.

    A curve leads from the base through the checkpoints to the last, large with its intervals. The
    front is of all points drawn: checkpoints, scaled updates and the base.
    """
    from matplotlib.lines import Line2D

    points = plane_points(frame, study.adaptation)
    require(points, "no checkpoint with both forgetting and a validation score")
    means = plane_table(points).assign(label="forgetting (mean over benchmarks)")
    ends = plane_table(last_checkpoints(points[points["update_scale"] == 1]))
    means = in_order(means.assign(family=means["task"]), "family")
    size = PLANE if means["family"].nunique() > 1 else ALONE
    panels = Panels.wrapped(means, columns=2, size=size)
    for family, ax, part in panels:
        for arm, path in part.groupby("arm"):
            _paths(ax, path, arm)
        _ends(ax, ends[ends["task"] == family])
        _front(ax, part)
        ax.set_xlabel("gain on the validation scores (mean over tasks)")
    early, scaled = _kinds(points)
    extra = [Line2D([], [], label="checkpoints", color=GREY, **CHECKPOINTS)] * early
    extra += [Line2D([], [], label="scaled update", color=GREY, **SCALED)] * bool(scaled)
    sentences = [_about_plane(points, frame), *interval_notes(means)]
    arms, extra = _base_of(frame), [*extra, Line2D([], [], **FRONT)]
    return panels.finish(frame, sentences, "lines from a point", extra, arms)


def _base_of(frame: DataFrame) -> tuple[Arm, ...]:
    """The base, if there are records of it."""
    return (BASE,) * bool((frame["method"] == "base").any())


def _mark_chance(panels: Panels, frame: DataFrame) -> str:
    """Grey the panels of benchmarks on which the base is at chance; what the caption says then."""
    marked = [title for title in panels.axes if title.split(": ", 1)[1] in at_chance(frame)]
    for title in marked:
        panels.axes[title].set_facecolor("#f4f4f4")
        panels.axes[title].set_title(f"{title} †", loc="left")
    return " † Grey: the base is at chance, nothing can be forgotten here." if marked else ""


def _paths(ax: Axes, path: DataFrame, arm: Arm) -> None:
    """An arm's checkpoints from the base on, and dotted its last update at other scales."""
    style = style_of(arm)
    common = {"color": style["color"], "zorder": 3}
    plain = path[path["update_scale"] == 1].sort_values("fraction")
    x, y = ([0.0, *plain[name]] for name in ("value_gain", "value"))
    line = {"linestyle": style["linestyle"], "lw": 1.0, "markevery": slice(1, None)}
    ax.plot(x, y, label=arm, **CHECKPOINTS | common | line)
    if (path["update_scale"] != 1).any():
        last = path[path["fraction"] == path["fraction"].max()].sort_values("update_scale")
        x, y = (list(last[name]) for name in ("value_gain", "value"))
        if last["update_scale"].min() > 0:  # t = 0 is the base
            x, y = [0.0, *x], [0.0, *y]
        ax.plot(x, y, label=f"scaled {arm}", **SCALED | common)


def _ends(ax: Axes, ends: DataFrame) -> None:
    """The last checkpoints, large, with a cross of their two intervals."""
    for _, point in ends.iterrows():
        arm, style = point["arm"], style_of(point["arm"])
        bars = {"fmt": "none", "elinewidth": 0.8, "alpha": 0.55, "zorder": 4}
        marks.cross(ax, point, "_gain", arm, ecolor=style["color"], **bars)
        style |= {"linestyle": "none", "ms": 7.5, "zorder": 6}
        if style.get("markerfacecolor") != "white":
            style |= {"markeredgecolor": "white", "markeredgewidth": 0.7}
        ax.plot([point["value_gain"]], [point["value"]], **style, label=f"last {arm}")


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
    ax.plot(steps_x[1:-1], steps_y[1:-1], drawstyle="steps-pre", zorder=2, **FRONT)
    ax.plot([0], [0], linestyle="none", marker="*", ms=10, color=GREY, zorder=5, label="base")
    ax.set(xlim=(left, right), ylim=(low, high))
    ax.locator_params(axis="x", nbins=5)
    ax.set_title("better: down and right", loc="right", size=6.5, weight="normal", color=GREY)


def _kinds(points: DataFrame) -> tuple[bool, list[float]]:
    """Are there checkpoints before the last, and the scales of updates beside base and last."""
    plain = points[points["update_scale"] == 1]
    early = (plain["step"] < plain.groupby("run")["step"].transform("max")).any()
    return bool(early), sorted(set(points["update_scale"]) - {0.0, 1.0})


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
