"""The figures of retention show what the records hold: forgetting, drift, and the plane."""

import json
import math
import random

import numpy as np
import pytest
from figure_checks import (
    assert_texts_are_apart,
    bars,
    content,
    drawn,
    lines,
    notes,
    panel,
    says_nothing,
)
from synthetic_records import GRID, kept, record, retention_study, shrunk_study, study, write_study

from lora_tradeoffs.figures.draw import FIGURES as ALL
from lora_tradeoffs.figures.panels import DEMO_NOTE
from lora_tradeoffs.figures.retention import (
    cka_by_layer,
    forgetting_by_rank,
    learning_forgetting_plane,
    matched_forgetting,
    retention_curves,
    shrunk_intruders,
)
from lora_tradeoffs.figures.style import save
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.retention import matched, pareto_front, plane_points, retention_gaps

FIGURES = ALL["retention"]
RUN = "similar_lora_r8_seed42"
T = 4.3027 / math.sqrt(3)  # half a 95 % interval over three seeds, in standard deviations


@pytest.fixture
def frame(tmp_path):
    """A data frame of records of retention (or of adaptation), by way of the file."""

    def make(records, preset="study", script="retention"):
        return load_records(write_study(tmp_path, records, preset, script=script))

    return make


def base(task, metric, value, family=None, **others):
    return kept("base", task, metric, value, family, method="base", step=0, fraction=0.0, **others)


def points(gains, losses, run=RUN, **others):
    """A run's checkpoints, with the base: gains over .5 and what was forgotten."""
    records = [base("mean", "adaptation", 0.5, "similar")]
    for i, (gain, lost) in enumerate(zip(gains, losses), start=1):
        common = {"step": 10 * i, "fraction": i / len(gains)} | others
        records.append(kept(run, "mean", "adaptation", 0.5 + gain, half=0.01, **common))
        records.append(kept(run, "mean", "forgetting", lost, **common))
    return records


# ------------------------------------------------------------------------- over training, by rank


def test_curves_show_acc_norm_where_it_is_defined_and_the_bases_band(frame):
    at_end = {"step": 20, "fraction": 1.0}
    records = [
        base("hellaswag", "acc", 0.5),
        base("hellaswag", "acc_norm", 0.6, chance=0.25),
        kept(RUN, "hellaswag", "acc", 0.4, **at_end),
        kept(RUN, "hellaswag", "acc_norm", 0.55, **at_end),
        kept(RUN, "hellaswag", "forgetting", 0.05, **at_end),
        kept(RUN, "hellaswag", "acc_norm", 0.1, update_scale=0.5, **at_end),
        base("winogrande", "acc", 0.58, chance=0.57),
        kept(RUN, "winogrande", "acc", 0.57, **at_end),
        kept(RUN, "text_prose", "log_likelihood", -2.5, **at_end),
        kept(RUN, "text", "kl", 0.1, **at_end),
    ]
    figure = drawn(retention_curves, retention=frame(records))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["similar: hellaswag", "similar: winogrande", "similar: text_prose"]
    ax = panel(figure, "similar: hellaswag")
    (line,) = lines(ax, "LoRA r=8")
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.0, 1.0], [0.6, 0.55])
    (band,) = [patch for patch in ax.patches if patch.get_alpha()]
    assert np.allclose([band.get_y(), band.get_y() + band.get_height()], [0.58, 0.625])
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.53, 0.575)])
    # Chance is drawn where it does not stretch the axis.
    assert not lines(ax, "chance") and lines(panel(figure, "similar: winogrande"), "chance")
    assert panel(figure, "similar: text_prose").get_ylabel() == "nats per token"


def test_curves_with_examples_in_context_begin_at_the_base_with_as_many(frame):
    records = []
    for shots, value in ((0, 0.5), (5, 0.6)):
        records.append(base("hellaswag", "acc_norm", value, shots=shots))
        records.append(kept(RUN, "hellaswag", "acc_norm", value - 0.1, shots=shots))
    figure = drawn(retention_curves, retention=frame(records))
    ax = panel(figure, "similar: hellaswag")
    for arm, values in (("LoRA r=8", [0.5, 0.4]), ("LoRA r=8 (5-shot)", [0.6, 0.5])):
        assert np.allclose(lines(ax, arm)[0].get_ydata(), values)
    assert {"base", "base (5-shot)"} <= set(content(figure)["similar: hellaswag"])


def test_benchmarks_that_were_all_asked_with_examples_are_named_and_the_arms_are_plain(frame):
    records = [base("gsm8k", "acc", 0.5, shots=5), kept(RUN, "gsm8k", "acc", 0.4, shots=5)]
    records += [
        kept(RUN, "mean", "forgetting", 0.1),
        kept(RUN, "gsm8k", "forgetting", 0.1, shots=5),
    ]
    for draw in (retention_curves, forgetting_by_rank):
        figure = drawn(draw, retention=frame(records))
        assert lines(panel(figure, "similar: gsm8k"), "LoRA r=8")
        assert "In-context examples: gsm8k 5." in notes(figure)


def test_families_have_rows_of_their_own_and_share_the_base(frame):
    figure = drawn(retention_curves, retention=frame(retention_study(points=2)))
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    tasks = ["hellaswag", "arc_challenge †", "winogrande", "mean", "text_prose", "text_wikitext"]
    assert titles == [f"{family}: {t}" for family in ("similar", "dissimilar") for t in tasks]
    assert all(lines(ax, "base") for ax in figure.axes)


def test_runs_of_no_family_stand_in_every_panel(frame):
    records = retention_study(grid=GRID[-1:], points=1)
    records.append(kept("someone--adapter", "mean", "forgetting", 0.3, None))
    figure = drawn(forgetting_by_rank, retention=frame(records))
    for family in ("similar", "dissimilar"):
        assert lines(panel(figure, f"{family}: mean"), "LoRA r=8 (someone--adapter)")
    alone = drawn(forgetting_by_rank, retention=frame(records[-1:]))
    assert [ax.get_title(loc="left") for ax in alone.axes] == ["all runs: mean"]


def test_forgetting_is_of_the_last_checkpoint_with_its_paired_interval(frame):
    records = points([0.1, 0.2], [0.01, 0.04])
    records.append(kept(RUN, "mean", "forgetting", 0.9, step=20, update_scale=1.25))
    ax = panel(drawn(forgetting_by_rank, retention=frame(records)), "similar: mean")
    assert list(lines(ax, "LoRA r=8")[0].get_ydata()) == [0.04]
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.02, 0.065)])
    assert set(lines(ax, "base")[0].get_ydata()) == {0.0}


def test_a_benchmark_at_chance_is_marked(frame):
    records = frame(retention_study(points=2, families=("similar",)))
    for draw in (retention_curves, forgetting_by_rank):
        figure = drawn(draw, retention=records)
        marked = panel(figure, "similar: arc_challenge †")
        assert marked.get_facecolor() != panel(figure, "similar: hellaswag").get_facecolor()
        assert "at chance" in notes(figure)
    assert "arc_challenge" in notes(drawn(learning_forgetting_plane, retention=records))
    assert any("at chance" in said and "arc_challenge" in said for said in retention_gaps(records))


def test_cka_runs_over_the_layers_of_the_last_checkpoint(frame):
    records = [
        kept(
            RUN,
            "text",
            "cka",
            1 - layer / 10 * step / 20,
            step=step,
            fraction=step / 20,
            layer=layer,
        )
        for step in (10, 20)
        for layer in (2, 0, 1)
    ]
    ax = panel(drawn(cka_by_layer, retention=frame(records)), "similar: text")
    (line,) = lines(ax, "LoRA r=8")
    assert np.allclose(line.get_xydata(), [(0, 1.0), (1, 0.9), (2, 0.8)])


def pair(run, other, value, score=0.6):
    seed = int(run[-2:])
    method = "full" if "full" in run else "lora"
    fields = {"other_run": other, "score": score, "seed": seed, "method": method}
    return kept(run, "mean", "matched_forgetting", value, **fields)


def test_matched_forgetting_is_held_against_full_at_the_highest_score(frame):
    full = "similar_full_seed42"
    records = [
        kept(full, "mean", "forgetting", 0.1, method="full"),
        pair(RUN, full, -0.03),
        pair(RUN, full, -0.01, score=0.5),
    ]
    figure = drawn(matched_forgetting, retention=frame(records))
    ax = panel(figure, "similar: mean, against full")
    assert list(lines(ax, "LoRA r=8")[0].get_ydata()) == [-0.03]
    assert np.allclose(bars(ax, "LoRA r=8"), [(-0.05, -0.005)])
    assert "One seed" in notes(figure)
    # The other way round it is the same number.
    turned = [records[0], kept(RUN, "mean", "forgetting", 0.1), pair(full, RUN, 0.03)]
    (row,) = matched(frame(turned)).itertuples()
    assert (row.run, str(row.arm), str(row.other), row.value) == (RUN, "LoRA r=8", "full", -0.03)
    assert (row.low, row.high) == pytest.approx((-0.055, -0.01))


def test_matched_forgetting_pairs_runs_of_one_seed(frame):
    runs = {f"similar_{arm}_seed{s}": s for s in (42, 43, 44) for arm in ("lora_r8", "full")}
    records = [
        kept(run, "mean", "forgetting", 0.1, seed=s, method="full" if "full" in run else "lora")
        for run, s in runs.items()
    ]
    names = sorted(runs)
    records += [
        pair(one, other, 0.01 * runs[one] if runs[one] == runs[other] else 9.0)
        for i, one in enumerate(names)
        for other in names[i + 1 :]
    ]
    rows = matched(frame(records))
    # Full's runs come first in the records, so the sign turns.
    assert sorted(rows["value"]) == pytest.approx([-0.44, -0.43, -0.42])
    assert "Mean of 3 seeds" in notes(drawn(matched_forgetting, retention=frame(records)))


# ------------------------------------------------------------------------- the plane


def test_a_curve_leads_from_the_base_through_the_checkpoints(frame):
    records = points([0.1, 0.15, 0.2], [0.01, 0.02, 0.04])
    ax = panel(drawn(learning_forgetting_plane, retention=frame(records)), "similar")
    expected = [(0, 0), (0.1, 0.01), (0.15, 0.02), (0.2, 0.04)]
    assert np.allclose(lines(ax, "LoRA r=8")[0].get_xydata(), expected)
    assert np.allclose(lines(ax, "last LoRA r=8")[0].get_xydata(), expected[-1:])
    assert np.allclose(lines(ax, "base")[0].get_xydata(), [(0, 0)])
    # The cross of the last one: the paired interval, and the score's.
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.02, 0.065)])
    assert np.allclose(bars(ax, "LoRA r=8", vertical=False), [(0.19, 0.2125)])
    assert not lines(ax, "scaled LoRA r=8")


@pytest.mark.parametrize("with_base", [True, False])
def test_scaled_updates_lead_from_the_base_through_the_last_checkpoint(frame, with_base):
    records = points([0.1, 0.2], [0.01, 0.04])
    at_end = {"step": 20, "fraction": 1.0}
    for t, gain, lost in ((1.25, 0.21, 0.07), (0.5, 0.15, 0.01), (0.0, 0.0, 0.0)):
        if t or with_base:
            scaled = at_end | {"update_scale": t}
            records.append(kept(RUN, "mean", "adaptation", 0.5 + gain, **scaled))
            records.append(kept(RUN, "mean", "forgetting", lost, **scaled))
    figure = drawn(learning_forgetting_plane, retention=frame(records))
    (line,) = lines(panel(figure, "similar"), "scaled LoRA r=8")
    assert np.allclose(line.get_xydata(), [(0, 0), (0.15, 0.01), (0.2, 0.04), (0.21, 0.07)])
    assert "scaled by 0.5, 1.25" in notes(figure)


def test_three_seeds_are_means_with_intervals_over_seeds_and_items_on_both_axes(frame):
    records = []
    for seed, gain, lost in ((42, 0.18, 0.02), (43, 0.20, 0.05), (44, 0.22, 0.08)):
        run = f"similar_lora_r8_seed{seed}"
        records += points([0.1, gain], [0.01, lost], run=run, seed=seed)[bool(records) :]
    figure = drawn(learning_forgetting_plane, retention=frame(records))
    ax = panel(figure, "similar")
    expected = [(0, 0), (0.1, 0.01), (0.2, 0.05)]
    assert np.allclose(lines(ax, "LoRA r=8")[0].get_xydata(), expected)
    # over items the errors are half of `half`: .01 of forgetting, .005 of the score
    half = math.hypot(T * 0.03, 1.96 * 0.01)
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.05 - half, 0.05 + half)], atol=1e-5)
    across, half = bars(ax, "LoRA r=8", vertical=False), math.hypot(T * 0.02, 1.96 * 0.005)
    assert np.allclose(across, [(0.2 - half, 0.2 + half)], atol=1e-5)
    assert "Mean of 3 seeds" in notes(figure)


def test_gains_come_from_adaptation_where_retention_has_no_score(frame):
    tasks = {"squad_v2": (0.3, 0.6), "codexglue": (10.0, 16.0), "cnn_dailymail": (0.2, 0.2)}
    run, adaptation = "dissimilar_lora_r8_seed42", []
    for task, (start, end) in tasks.items():
        adaptation.append(record("base", task, start, method="base", step=0, fraction=0.0))
        adaptation.append(record(run, task, end))
        adaptation.append(record(run, task, 0.0, split="test"))
        adaptation.append(record(run, task, 0.0, prompt=1))
        adaptation.append(record("lead-3", task, 0.0, method="baseline", step=0))
    adaptation.append(record(run, "squad_v2", 0.5, step=50, fraction=0.5))  # one task of three
    records = [
        kept(run, "mean", "forgetting", 0.03, "dissimilar", step=step, fraction=step / 100)
        for step in (50, 100)
    ]
    both = frame(records), frame(adaptation, script="adaptation")
    (row,) = plane_points(*both).itertuples()
    # BLEU counts in hundredths: (.3 + .06 + 0) / 3. The error: .012 each, of three tasks.
    assert (row.gain, row.value, row.task) == (pytest.approx(0.12), 0.03, "dissimilar")
    half = 1.96 * 0.012 / math.sqrt(3)
    assert (row.gain_low, row.gain_high) == pytest.approx((0.12 - half, 0.12 + half), abs=1e-5)
    own = [
        base("mean", "adaptation", 0.4, "dissimilar"),
        kept(run, "mean", "adaptation", 0.6, "dissimilar"),
    ]
    (row,) = plane_points(frame(records + own), both[1]).itertuples()
    assert row.gain == pytest.approx(0.2)
    assert plane_points(both[0]).empty


def test_controls_stand_in_the_plane_only_where_they_are_alone(frame):
    control = points([0.05], [0.0], run="sst2_lora_r8_seed42")
    alone = panel(drawn(learning_forgetting_plane, retention=frame(control)), "similar")
    assert lines(alone, "LoRA r=8 (sst2 alone)")
    ax = panel(
        drawn(learning_forgetting_plane, retention=frame(points([0.2], [0.04]) + control[1:])),
        "similar",
    )
    assert lines(ax, "LoRA r=8") and not lines(ax, "LoRA r=8 (sst2 alone)")


def test_a_run_that_has_not_ended_has_a_curve_and_no_large_point(frame):
    half = [r for r in points([0.1, 0.2], [0.01, 0.04]) if r["fraction"] < 1]
    records = half + points([0.2], [0.05], run="similar_full_seed42", method="full")[1:]
    figure = drawn(learning_forgetting_plane, retention=frame(records))
    ax = panel(figure, "similar")
    assert lines(ax, "LoRA r=8") and not lines(ax, "last LoRA r=8")
    assert f"not measured at its end: {RUN}" in notes(figure)
    assert RUN in notes(drawn(forgetting_by_rank, retention=frame(records)))


def test_the_front_holds_what_no_point_beats():
    noise = random.Random(0)
    gain = [round(noise.uniform(0, 1), 1) for _ in range(60)]
    lost = [round(noise.uniform(0, 1), 1) for _ in range(60)]
    cloud = set(zip(gain, lost))
    unbeaten = {
        p for p in cloud if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in cloud)
    }
    front = [(gain[i], lost[i]) for i in pareto_front(gain, lost)]
    assert front == sorted(unbeaten)
    assert len(front) > 1
    assert list(pareto_front([0.3], [0.1])) == [0]


def test_the_front_runs_below_all_points_of_all_arms(frame):
    figure = drawn(learning_forgetting_plane, retention=frame(retention_study(seeds=(42, 43, 44))))
    for ax in figure.axes:
        (front,) = lines(ax, "Pareto front")
        corners = front.get_xydata()
        assert (np.diff(corners, axis=0)[:, 0] >= 0).all()
        assert (np.diff(corners, axis=0)[:, 1] >= 0).all()
        shown = [line.get_xydata() for line in ax.lines if "LoRA" in line.get_label()]
        for x, y in np.concatenate(shown):
            beating = [lost for gain, lost in corners if gain >= x]
            assert not beating or y >= min(beating) - 1e-12


# ------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("draw", FIGURES)
def test_without_records_a_figure_says_what_is_missing(draw, frame):
    for records in ([], [r for r in retention_study(points=1) if r["method"] == "base"]):
        (ax,) = drawn(draw, retention=frame(records)).axes
        assert "Nothing to draw: no " in ax.texts[0].get_text()


@pytest.mark.parametrize(
    "draw, needs, suffices",
    [
        (retention_curves, (), ("retention",)),
        (forgetting_by_rank, ("forgetting",), ("forgetting",)),
        (learning_forgetting_plane, ("forgetting", "adaptation"), ()),
        (matched_forgetting, ("matched_forgetting",), ()),
        (cka_by_layer, ("cka",), ("cka",)),
    ],
)
def test_each_part_is_drawn_without_the_others(draw, needs, suffices, frame):
    """All that a figure shows is there without the metrics that it does not need."""
    small = dict(grid=[("lora", 8), ("full", 0)], points=1, families=("similar",))
    records = retention_study(**small, scales=(0.5,))
    whole = content(drawn(draw, retention=frame(records)))
    assert any("LoRA r=8" in labels for labels in whole.values())
    for metric in ("forgetting", "adaptation", "retention", "cka", "matched_forgetting"):
        of_metric = [[r for r in records if (r["metric"] == metric) == is_it] for is_it in (0, 1)]
        without, alone = (drawn(draw, retention=frame(part)) for part in of_metric)
        assert says_nothing(without) == (metric in needs), metric
        assert says_nothing(alone) == (metric not in suffices), metric
        if metric not in needs:
            titles = whole.keys() - {"similar: mean"} if metric in suffices else whole.keys()
            assert content(without) == {title: whole[title] for title in titles}, metric
    without_base = content(drawn(draw, retention=frame([r for r in records if r["run"] != "base"])))
    if draw is learning_forgetting_plane:  # a gain is over the base
        assert "similar" not in without_base
    else:
        arms = {title: [x for x in labels if x != "base"] for title, labels in whole.items()}
        assert {t: [x for x in labels if x != "base"] for t, labels in without_base.items()} == arms


def test_the_plane_takes_scores_from_adaptation_where_retention_has_none(frame):
    small = dict(grid=[("lora", 8), ("full", 0)], points=2, families=("similar",))
    records = [r for r in retention_study(**small) if r["metric"] != "adaptation"]
    adaptation = frame(study(**small), script="adaptation")
    figure = drawn(learning_forgetting_plane, retention=frame(records), adaptation=adaptation)
    assert {"LoRA r=8", "last LoRA r=8", "full", "last full"} <= set(content(figure)["similar"])


@pytest.mark.parametrize("draw", FIGURES)
def test_the_demo_says_that_it_is_one(draw, frame):
    records = retention_study(grid=GRID[:1], points=1)
    assert DEMO_NOTE in notes(drawn(draw, retention=frame(records, preset="demo")))
    assert DEMO_NOTE in notes(drawn(draw, retention=frame([], preset="demo")))
    assert "demo" not in notes(drawn(draw, retention=frame(records)))


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("families", [("similar", "dissimilar"), ("dissimilar",)])
def test_no_text_overlaps_another_or_leaves_the_figure(draw, families, frame):
    records = retention_study(seeds=(42, 43, 44), families=families)
    records = [r for r in records if "r16" not in r["run"] or r["run"].endswith("42")]
    retention = frame(records, preset="demo")
    shrunk = frame([*shrunk_study({"mean": -0.04, "text": 0.01, "adaptation": 0.02})])
    assert_texts_are_apart(drawn(draw, retention=retention, shrunk=shrunk))


def test_a_script_saves_them_all(frame, tmp_path):
    retention = frame(retention_study(points=2, grid=GRID[-2:]))
    figures = {draw.__name__: drawn(draw, retention=retention) for draw in FIGURES}
    paths = [save(figure, tmp_path / f"{name}.png") for name, figure in figures.items()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert "learning_forgetting_plane" in [path.stem for path in paths]


def test_gaps_name_the_arms_runs_and_parts_that_are_not_there(frame):
    grid = [arm for arm in GRID if arm != ("lora", 16)]
    records = retention_study(grid=grid, families=("similar",), scales=())
    records = [r for r in records if r["metric"] != "adaptation" or "r64" not in r["run"]]
    adaptation = frame(study(points=1, families=("similar",), grid=GRID[:3]), script="adaptation")
    said = "\n".join(retention_gaps(frame(records), adaptation))
    assert "similar: no LoRA r=16" in said and "dissimilar: no run" in said
    assert "fewer than 3 seeds" in said and "test score" not in said
    assert "retention is not: similar_lora_r16_seed42" in said
    assert "no validation score: similar_lora_r64_seed42" in said
    assert "no scaled updates" in said


def test_records_survive_json_without_the_optional_fields(tmp_path):
    small = dict(grid=[("lora", 8), ("full", 0)], points=1, families=("similar",))
    path = write_study(tmp_path, retention_study(**small), script="retention")
    whole = load_records(path)
    document = json.loads(path.read_text())
    for row in document["records"]:
        for name in ("chance", "at_chance", "p_value", "stderr", "n"):
            row.pop(name, None)
    path.write_text(json.dumps(document))
    for draw in FIGURES:
        figure = drawn(draw, retention=load_records(path))
        assert content(figure) == content(drawn(draw, retention=whole)) and "†" not in notes(figure)


def test_shrunk_directions_are_shown_beside_their_control_and_their_difference(frame):
    records = frame([*shrunk_study({"mean": -0.04, "text": 0.01, "adaptation": 0.02})])
    figure = drawn(shrunk_intruders, retention=records, shrunk=records)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:3] == ["intruders shrunk", "control shrunk", "intruders minus control"]
    drawn_values = [lines(ax, "LoRA r=8")[0].get_ydata() for ax in figure.axes]
    by_row = {ax.get_ylabel(): i for i, ax in enumerate(figure.axes) if ax.get_ylabel()}
    first = by_row["lost: similar, mean"]
    for values, lost in zip(drawn_values[first : first + 3], (-0.08, -0.04, -0.04)):
        assert values.tolist() == pytest.approx([lost + 1e-4, (lost + 1e-4) / 2])
    assert_texts_are_apart(figure)
    without = frame([*shrunk_study({"mean": 0.0}, directions=0)])
    assert says_nothing(drawn(shrunk_intruders, retention=without, shrunk=without))
    assert says_nothing(drawn(shrunk_intruders, retention=without))
