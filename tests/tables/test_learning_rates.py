"""A sweep's points are told apart everywhere; what it shows is said in either direction."""

import math

import numpy as np
import pytest
from figure_checks import assert_texts_are_apart, bars, drawn, lines, notes, panel
from support import settings_for
from synthetic_records import rate_points, record, study, write_study

from lora_tradeoffs.figures.adaptation import last_by_rank, learning_curves
from lora_tradeoffs.figures.drift import drift_over_training
from lora_tradeoffs.figures.retention import forgetting_by_rank
from lora_tradeoffs.figures.study import learning_rate_curves
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.figures.style import save
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import gaps, load_records, score_table, summarise
from lora_tradeoffs.tables.learning_rates import (
    advantage_sentences,
    advantages,
    at_chosen_rates,
    at_only_rates,
    best_retaining,
    rates_sentence,
    sweep_table,
    swept_arms,
)
from lora_tradeoffs.tables.retention import forgotten
from lora_tradeoffs.training.learning_rates import read_rates

LORA, FULL = ("lora", 8), ("full", 0)
# Full fine-tuning scores best at 1e-3 and forgets much there; at 5e-4 it scores as well within the
# error (.01) and forgets little; at 2.5e-4 it forgets least, but scores worse.
POINTS = {
    FULL: {2.5e-4: (0.75, 0.00), 5e-4: (0.795, 0.03), 1e-3: (0.80, 0.12), 2e-3: (0.70, 0.30)},
    LORA: {5e-4: (0.70, 0.01), 1e-3: (0.79, 0.02), 2e-3: (0.78, 0.06)},
}


@pytest.fixture
def frames(tmp_path):
    """Data frames of adaptation, retention and drift, by way of the files."""

    def make(*records):
        names = ("adaptation", "retention", "drift")
        return [
            load_records(write_study(tmp_path, [*unique.values()], "study", script=name))
            for own, name in zip(records, names)
            for unique in [{str(r): r for r in own}]  # families have the base in common
        ]

    return make


def rate_curves(*frames, rates=()):
    every_rate = dict(zip(("adaptation", "retention", "drift"), frames))
    return learning_rate_curves(StudyRecords(rates=rates, at_all_rates=every_rate))


def choice(arm, rate, loss, chosen=False, **fields):
    """A record of learning_rates.json."""
    method, rank = ("lora", int(arm.split("_r")[1])) if "lora" in arm else ("full", 0)
    own = {"arm": arm, "family": "similar", "method": method, "rank": rank, "learning_rate": rate}
    return own | {"target_modules": "qv", "loss": loss, "chosen": chosen, "problem": ""} | fields


CHOICES = [
    *(choice("similar_full", rate, loss, rate == 1e-3)
      for rate, loss in ((2.5e-4, 0.6), (5e-4, 0.5), (1e-3, 0.45), (2e-3, None))),
    *(choice("similar_lora_r8", rate, loss, rate == 1e-3)
      for rate, loss in ((5e-4, 0.7), (1e-3, 0.5), (2e-3, 0.55))),
]  # fmt: skip


# ------------------------------------------------- an arm's rates are not seeds of each other


def test_runs_of_one_arm_and_seed_at_two_rates_are_two_arms_everywhere(frames):
    points = {LORA: {1e-3: (0.8, 0.02), 2e-3: (0.6, 0.10)}}
    adaptation, retention, drift = frames(*rate_points(points))
    for rows, column in (
        (summarise(adaptation[adaptation["method"] == "lora"]), (0.8, 0.6)),
        (summarise(forgotten(retention)), (0.02, 0.10)),
        (summarise(drift[(drift["layer"] == -1) & (drift["module"] == "both")]), (0.1, 0.2)),
    ):
        found = {str(arm): own["value"].unique() for arm, own in rows.groupby("arm")}
        assert list(found) == ["LoRA r=8", "LoRA r=8 (lr2e-3)"]
        assert np.allclose([values.item() for values in found.values()], column)
        assert set(rows["seeds"]) == {1}
    assert score_table(adaptation)["sst2"].str[:5].rename(str).to_dict() == {
        **{"LoRA r=8": "0.800", "LoRA r=8 (lr2e-3)": "0.600"},
        "base": "0.500",
    }


def test_figures_draw_a_mark_for_every_rate_at_its_own_value(frames):
    points = {LORA: {1e-3: (0.8, 0.02), 2e-3: (0.6, 0.10)}}
    adaptation, retention, drift = frames(*rate_points(points))
    for ax, values in (
        (panel(drawn(learning_curves, adaptation=adaptation), "sst2"), (0.8, 0.6)),
        (panel(drawn(last_by_rank, adaptation=adaptation), "sst2"), (0.8, 0.6)),
        (panel(drawn(forgetting_by_rank, retention=retention), "similar: mean"), (0.02, 0.10)),
        (panel(drawn(drift_over_training, drift=drift), "similar, Q"), (10, 20)),
    ):
        for arm, value in zip(("LoRA r=8", "LoRA r=8 (lr2e-3)"), values):
            assert lines(ax, arm)[0].get_ydata()[-1] == pytest.approx(value)


def test_a_default_rate_that_changed_within_a_study_parts_its_seeds(frames):
    """Their names are the same but for the seed: the default depends on preset and model."""
    runs = [(42, 1e-3, 0.8), (43, 1e-3, 0.82), (44, 2e-3, 0.6)]
    records = [
        record(f"similar_lora_r8_seed{seed}", "sst2", value, seed=seed, learning_rate=rate)
        for seed, rate, value in runs
    ]
    other = record("dissimilar_lora_r8_seed42", "squad_v2", 0.5, learning_rate=5e-4)
    (frame,) = frames([*records, other])
    assert list(frame["arm"].map(str)) == [
        *("LoRA r=8 (lr1e-3)", "LoRA r=8 (lr1e-3)", "LoRA r=8 (lr2e-3)", "LoRA r=8")
    ]
    table = summarise(frame[frame["task"] == "sst2"]).set_index("arm").rename(str)
    assert table["seeds"].to_dict() == {"LoRA r=8 (lr1e-3)": 2, "LoRA r=8 (lr2e-3)": 1}


def test_gaps_take_an_arm_at_its_best_measured_rate(frames):
    three = rate_points({FULL: {2e-3: (0.8, 0.1)}}, seeds=(42, 43, 44))[0]
    one = rate_points({FULL: {4e-3: (0.7, 0.1), 1e-3: (0.7, 0.1)}})[0]
    (frame,) = frames(three + [r for r in one if r["method"] != "base"])
    (missing, *others) = [said for said in gaps(frame) if said.startswith("similar")]
    assert missing == "similar: no LoRA r=4, LoRA r=8, LoRA r=16, LoRA r=32, LoRA r=64"
    assert others == ["similar: no test score of full"]
    (frame,) = frames(one)
    assert any("fewer than 3 seeds" in said and said.endswith(": full") for said in gaps(frame))


# --------------------------------------------------------------------------------- the table


def test_a_row_holds_the_mean_over_tasks_and_seeds_of_a_rate(frames):
    table = sweep_table(*frames(*rate_points({FULL: {1e-3: (0.8, 0.1), 2e-3: (0.7, 0.3)}})))
    assert list(table["learning_rate"]) == [1e-3, 2e-3]
    assert list(table["arm"]) == [Arm("full"), Arm("full")]
    first = table.iloc[0]
    assert first["score"] == pytest.approx(0.8)
    # by hand: three tasks with an error of .01 sqrt(3) each: sqrt(3 * .0003) / 3 = .01
    assert first["score_stderr"] == pytest.approx(0.01)
    assert (first["forgetting"], first["forgetting_stderr"]) == pytest.approx((0.1, 0.01))
    assert first["drift"] == pytest.approx(0.1)
    assert list(table["chosen"]) == [True, False]


def test_bleu_counts_in_hundredths(frames):
    points = {FULL: {1e-3: (0.3, 0.1)}}
    table = sweep_table(*frames(*rate_points(points, family="dissimilar")))
    assert table["score"].item() == pytest.approx(0.3)


def test_errors_are_over_seeds_from_three_on(frames):
    points = {FULL: {1e-3: (0.8, 0.1)}}
    two, three = (
        sweep_table(*frames(*rate_points(points, seeds=seeds))).iloc[0]
        for seeds in ((42, 43), (42, 43, 44))
    )
    assert (two["seeds"], two["score_stderr"]) == (2, pytest.approx(0.01))
    # scores .8, .8008, .8016: standard deviation .0008; each has an error of .01 over items;
    # 4.303 is Student's quantile of two degrees of freedom
    assert (three["seeds"], three["score"]) == (3, pytest.approx(0.8008))
    reach = math.hypot(4.303 * 0.0008 / math.sqrt(3), 1.960 * 0.01)
    assert three["score_reach"] == pytest.approx(reach, rel=1e-3)
    assert three["score_stderr"] == pytest.approx(math.hypot(0.0008 / math.sqrt(3), 0.01))


def test_the_choice_is_that_of_the_losses_where_it_is_known(frames):
    adaptation, retention, _ = frames(*rate_points(POINTS))
    other = [choice("similar_full", 5e-4, 0.4, chosen=True)]
    table = sweep_table(adaptation, retention, choices=other)
    chosen = table[table["chosen"]].set_index("arm")["learning_rate"].rename(str).to_dict()
    assert chosen == {"full": 5e-4, "LoRA r=8": 1e-3}
    assert table["drift"].isna().all()


def test_without_retention_a_table_has_scores_alone(frames):
    adaptation, *_ = frames(*rate_points(POINTS))
    table = sweep_table(adaptation)
    assert table["forgetting"].isna().all() and table["score"].notna().all()
    assert best_retaining(table, "similar") is None
    assert "forgetting was not measured" in advantage_sentences(table)


# ---------------------------------------------------------------------------- best retaining


def test_the_best_retaining_rate_forgets_least_at_no_cost_that_can_be_seen(frames):
    table = sweep_table(*frames(*rate_points(POINTS)))
    row = best_retaining(table, "similar")
    assert (row["learning_rate"], row["forgetting"]) == (5e-4, pytest.approx(0.03))
    assert best_retaining(table, "similar", Arm("lora", 8))["learning_rate"] == 1e-3
    assert best_retaining(table, "dissimilar") is None


def test_one_standard_error_is_one_with_three_seeds_too(frames):
    """Scores .9, .91, .92 have a standard error of .0058; an interval reaches 4.3 of them."""
    by_seed = []
    for seed, shift in ((42, -0.01), (43, 0.0), (44, 0.01)):
        points = {FULL: {1e-3: (0.91 + shift, 0.1), 5e-4: (0.90 + shift, 0.0)}}
        by_seed.append(rate_points(points, seeds=(seed,), error=1e-6))
    records = [[r for own in files for r in own] for files in zip(*by_seed)]
    row = best_retaining(sweep_table(*frames(*records)), "similar")
    assert row["learning_rate"] == 1e-3


def test_the_best_rate_may_be_the_one_that_retains_best(frames):
    points = {FULL: {1e-3: (0.80, 0.01), 2e-3: (0.795, 0.05)}}
    row = best_retaining(sweep_table(*frames(*rate_points(points))), "similar")
    assert row["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("lost", "verdict"), [(-0.05, "survives"), (0.02, "lost"), (0.09, "reversed")]
)
def test_lora_is_held_against_the_best_retaining_rate_in_either_direction(frames, lost, verdict):
    points = POINTS | {LORA: {5e-4: (0.70, 0.0), 1e-3: (0.79, lost)}}
    table = sweep_table(*frames(*rate_points(points)))
    (row,) = advantages(table).itertuples()
    assert (str(row.arm), str(row.full), row.verdict) == ("LoRA r=8", "full", verdict)
    assert (row.chosen_rate, row.retaining_rate) == (1e-3, 5e-4)
    assert row.chosen_less == pytest.approx(0.12 - lost)
    assert row.retaining_less == pytest.approx(0.03 - lost)
    # by hand: errors .01 and .01, 1.96 * .01 * sqrt(2) = .0277
    assert row.retaining_high - row.retaining_less == pytest.approx(0.0277, abs=1e-4)
    said = advantage_sentences(table)
    assert "\n" not in said and said.startswith("similar: at its best-retaining rate 0.0005")
    phrases = {"survives": "survives with", "lost": "does not survive", "reversed": "forgets more"}
    assert [v for v, phrase in phrases.items() if phrase in said] == [verdict]


def test_lora_may_move_to_its_best_retaining_rate_as_full_may(frames):
    # at 5e-4 LoRA scores as well within its error, and forgets nothing
    table = sweep_table(
        *frames(*rate_points(POINTS | {LORA: {5e-4: (0.785, 0.0), 1e-3: (0.79, 0.08)}}))
    )
    (row,) = advantages(table).itertuples()
    assert (row.chosen_rate_lora, row.retaining_rate_lora) == (1e-3, 5e-4)
    assert row.chosen_less == pytest.approx(0.12 - 0.08)
    assert row.retaining_less == pytest.approx(0.03) and row.verdict == "survives"
    assert "LoRA r=8 at 0.0005 (score 0.785, full minus LoRA 0.030" in advantage_sentences(table)


def test_an_advantage_that_never_was_is_not_said_to_be_lost(frames):
    points = {FULL: {5e-4: (0.7, 0.02), 1e-3: (0.8, 0.02)}, LORA: {1e-3: (0.8, 0.01)}}
    table = sweep_table(*frames(*rate_points(points)))
    assert advantages(table)["verdict"].item() == "none"
    assert "no advantage" in advantage_sentences(table) and "survive" not in advantage_sentences(
        table
    )


def test_arms_with_other_fields_are_held_against_their_own_kind(frames):
    points = {FULL: {5e-4: (0.8, 0.02), 1e-3: (0.8, 0.1)}, LORA: {1e-3: (0.8, 0.01)}}
    adaptation, retention, _ = rate_points(points)
    short = [
        [r | {"run": r["run"].replace("_seed", "_steps9_seed")} for r in own if r["run"] != "base"]
        for own in rate_points(points)[:2]
    ]
    everywhere = [
        r | {"run": r["run"].replace("_r8", "_r8_all"), "target_modules": "all"}
        for own in (adaptation, retention) for r in own if r["rank"] == 8
    ]  # fmt: skip
    half = len([r for r in everywhere if r["metric"] != "forgetting"])
    table = sweep_table(
        *frames(adaptation + short[0] + everywhere[:half], retention + short[1] + everywhere[half:])
    )
    found = advantages(table).set_index("arm")["full"].map(str).rename(str).to_dict()
    assert found == {
        "LoRA r=8": "full",
        "LoRA r=8 (all)": "full",
        "LoRA r=8 (steps9)": "full (steps9)",
    }


def test_without_a_sweep_it_is_said_that_the_defaults_stand(frames):
    one = {FULL: {1e-3: (0.8, 0.1)}, LORA: {1e-3: (0.8, 0.0)}}
    table = sweep_table(*frames(*rate_points(one)))
    assert swept_arms(table) == []
    assert advantage_sentences(table) == "No sweep of the learning rates."
    table = sweep_table(*frames(*rate_points(one | {LORA: POINTS[LORA]})))
    assert swept_arms(table) == [("similar", Arm("lora", 8))]
    assert advantage_sentences(table) == (
        "similar: no sweep of full fine-tuning, so the default of that arm stands."
    )


def test_no_records_are_no_sweep(frames):
    (empty,) = frames([])
    assert advantage_sentences(sweep_table(empty)).startswith("No sweep")


# ------------------------------------------------------------------- records at chosen rates


def test_at_chosen_rates_an_arm_stands_once_under_its_plain_label(frames):
    chosen = [choice("similar_full", 5e-4, 0.4, True), choice("similar_lora_r8", 1e-3, 0.4, True)]
    for frame in frames(*rate_points(POINTS)):
        kept = at_chosen_rates(frame, chosen)
        runs = set(kept[~kept["method"].isin(["base"])]["run"])
        assert runs == {"similar_full_lr5e-4_seed42", "similar_lora_r8_seed42"}
        assert set(kept["arm"].map(str)) - {"base"} == {"full", "LoRA r=8"}
        assert (kept["method"] == "base").sum() == (frame["method"] == "base").sum()
        assert kept.attrs["meta"] == frame.attrs["meta"] and "note" not in frame.attrs
    frame = at_chosen_rates(frames(*rate_points(POINTS))[0], chosen)
    assert "at the chosen rate alone" in notes(drawn(learning_curves, adaptation=frame))


def test_what_a_run_is_held_against_is_left_out_with_its_rate(frames):
    names = ("similar_full_seed42", "similar_full_lr5e-4_seed42")
    records = rate_points(POINTS)[0]
    held = [{**records[-1], "metric": "matched_forgetting", "other_run": name} for name in names]
    held += [{**records[-1], "metric": "update_phi", "other": name} for name in names]
    (frame,) = frames(records + held)
    kept = at_chosen_rates(frame, [choice("similar_full", 5e-4, 0.4, True)])
    assert set(kept["other_run"].dropna()) == set(kept["other"].dropna()) == {names[1]}
    assert len(kept[kept["rank"] == 8]) == len(frame[frame["rank"] == 8]) - 2


def test_it_is_said_where_the_rates_come_from(frames):
    adaptation, *_ = frames(*rate_points(POINTS))
    assert rates_sentence(adaptation, []) == (
        "No sweep of the learning rates: the defaults per arm stand."
    )
    full = [choice("similar_full", 5e-4, 0.4, True), choice("similar_full", 1e-3, 0.5)]
    assert rates_sentence(adaptation, full) == (
        "Learning rates that a sweep chose on validation: similar full 0.0005."
        " No sweep of similar LoRA r=8: the default stands."
    )
    assert rates_sentence(adaptation, CHOICES) == (
        "Learning rates that a sweep chose on validation: similar LoRA r=8 0.001,"
        " similar full 0.001."
    )


def test_an_arm_with_one_rate_that_was_set_has_its_plain_label(frames):
    set_ones = ("similar_full_lr5e-4_seed42", "similar_lora_r8_seed42")
    (frame,) = frames([r for r in rate_points(POINTS)[0] if r["run"] in (*set_ones, "base")])
    assert {str(arm) for arm in frame["arm"]} == {"full (lr5e-4)", "LoRA r=8", "base"}
    (shown, none) = at_only_rates({"adaptation": frame, "drift": None}).values()
    assert {str(arm) for arm in shown["arm"]} == {"full", "LoRA r=8", "base"} and none is None
    assert rates_sentence(frame, []) == (
        "Learning rates that were set, not searched: similar full 0.0005."
        " No sweep of similar LoRA r=8: the default stands."
    )
    (several,) = frames(rate_points(POINTS)[0])
    assert list(at_only_rates({"adaptation": several})["adaptation"]["arm"]) == list(several["arm"])


def test_a_sweep_that_chose_no_rate_is_not_said_to_be_none(frames):
    adaptation, retention, _ = frames(*rate_points(POINTS))
    refused = [c | {"chosen": False, "problem": "it is lowest at the edge"} for c in CHOICES[:4]]
    assert rates_sentence(adaptation, [*refused, *CHOICES[4:]]) == (
        "Learning rates that a sweep chose on validation: similar LoRA r=8 0.001."
        " A sweep chose none for similar full: it is lowest at the edge."
    )
    assert rates_sentence(adaptation, refused) == (
        "A sweep chose none for similar full: it is lowest at the edge."
        " No sweep of similar LoRA r=8: the default stands."
    )
    table = sweep_table(adaptation, retention, choices=[*refused, *CHOICES[4:]])
    assert set(table[table["chosen"]]["arm"]) == {Arm("lora", 8)}
    assert advantages(table).empty
    assert advantage_sentences(table) == (
        "similar: the sweep of full fine-tuning chose no learning rate."
    )


def test_an_arm_without_a_measured_choice_is_left_as_it_is(frames):
    adaptation, *_ = frames(*rate_points(POINTS))
    for choices in (
        [],
        [choice("similar_full", 8e-3, 0.4, True)],
        [choice("similar_full", 5e-4, 1.0)],
    ):
        assert at_chosen_rates(adaptation, choices).equals(adaptation)


# --------------------------------------------------------------------------------- the figure


def test_the_figure_shows_the_table(frames):
    records = rate_points(POINTS)
    figure = rate_curves(*frames(*records), rates=CHOICES)
    assert len(figure.axes) == 4
    for ax, label, values in zip(
        figure.axes,
        ("validation loss", "validation score", "forgetting", "drift of Q and V"),
        ([0.6, 0.5, 0.45], [0.75, 0.795, 0.8, 0.7], [0, 0.03, 0.12, 0.3], [0.025, 0.05, 0.1, 0.2]),
    ):
        assert ax.get_ylabel() == label and ax.get_xscale() == "log"
        (line,) = lines(ax, "full")
        assert list(line.get_xdata()) == [2.5e-4, 5e-4, 1e-3, 2e-3][: len(values)]
        assert np.allclose(line.get_ydata(), values)
        (ring,) = lines(ax, "chosen")
        assert list(ring.get_xdata()) == [1e-3, 1e-3]
        (square,) = lines(ax, "best-retaining")
        assert list(square.get_xdata()) == [1e-3, 5e-4]  # LoRA, full
        assert square.get_ydata()[1] in list(line.get_ydata())
    assert np.allclose(bars(figure.axes[1], "full")[0], (0.74, 0.76))
    assert "1 seed per point" in notes(figure)


def test_the_figure_leaves_out_what_was_not_measured_and_not_swept(frames):
    adaptation, *_ = frames(*rate_points(POINTS | {("lora", 64): {1e-3: (0.8, 0.1)}}))
    figure = rate_curves(adaptation)
    (ax,) = figure.axes
    assert ax.get_ylabel() == "validation score"
    assert {line.get_label() for line in ax.lines if not line.get_label().startswith("_")} == {
        *("full", "LoRA r=8", "chosen")
    }


def test_without_a_sweep_the_figure_says_so(frames):
    (adaptation,) = frames(study())
    (ax,) = rate_curves(adaptation).axes
    assert "no sweep of the learning rates" in ax.texts[0].get_text()


def whole_sweep(seeds=(42,)):
    """Both families, all ranks, five rates: score and forgetting are made-up bowls and slopes."""
    parts = [[], [], []]
    for family in ("similar", "dissimilar"):
        points = {}
        for method, rank in (*(("lora", r) for r in (4, 8, 16, 32, 64)), ("full", 0)):
            centre = 1e-3 if rank else 1e-4
            points[method, rank] = {
                centre * 2.0**i: (
                    0.8 - 0.02 * (i + math.log2(rank or 4) / 8) ** 2,
                    0.01 * 2.0**i * (1 + (rank == 0) + rank / 64),
                )
                for i in (-2, -1, 0, 1, 2)
            }
        for part, own in zip(parts, rate_points(points, family, seeds)):
            part += own
    return parts


def test_no_text_of_the_figure_overlaps_or_leaves_it(frames, tmp_path):
    for records in (rate_points(POINTS), whole_sweep(seeds=(42, 43, 44))):
        figure = rate_curves(*frames(*records), rates=CHOICES)
        assert_texts_are_apart(figure)
        assert save(figure, tmp_path / "figure.png").stat().st_size > 4000


# ------------------------------------------------------------------- a sweep, from run to report


@pytest.mark.slow
def test_every_point_of_a_sweep_is_measured_and_stands_in_the_table(tiny, capsys):
    import eval
    import multi_task_training
    import retention_eval
    import svd_analysis

    where = ["--model", str(tiny), "--study", "sweep-measured"]
    short = ["--limit", "16", "--max-steps", "4", "--dtype", "fp32"]
    short += ["--set", "checkpoints=1", "warmup=0", "report_to=none"]
    # the best rates of a random model in four steps lie far above the defaults
    for arm in (["--full-finetune", "--lr-sweep", "64"], ["--lora", "4", "--lr-sweep", "4"]):
        assert multi_task_training.main(["--similar", *arm, *where, *short]) == 0
    few = ["--limit", "4", "--dtype", "fp32"]
    assert eval.main([*where, *few, "--shots", "0", "--splits", "validation"]) == 0
    assert retention_eval.main([*where, *few]) == 0
    assert svd_analysis.main([*where, "--workers", "1"]) == 0

    settings = settings_for(study="sweep-measured")
    places = (
        ("performance_analysis", "adaptation"),
        ("outputs", "retention"),
        ("drift_analysis_plots", "drift"),
    )
    frames = [
        load_records(settings.output_dir / place / settings.study / f"{name}.json")
        for place, name in places
    ]
    choices = read_rates(settings.runs_dir)
    table = sweep_table(*frames, choices)
    extra = "steps4 warmup0 limit16 fp32 checkpoints1"
    assert set(table["arm"].map(str)) == {f"LoRA r=4 ({extra})", f"full ({extra})"}
    key = ["method", "learning_rate"]
    rates = {tuple(c[name] for name in key) for c in choices}
    methods = [arm.method for arm in table["arm"]]
    assert set(zip(methods, table["learning_rate"])) == rates and len(rates) == len(table) >= 6
    assert table[["score", "forgetting", "drift"]].notna().all(axis=None)
    assert table["chosen"].sum() == 2
    assert (table.groupby("arm")["drift"].diff().dropna() > 0).all()  # a higher rate moves more
    assert str(advantages(table)["full"].item()) == f"full ({extra})"
    about = rates_sentence(frames[0], choices)
    assert extra in about and "default" not in about
