"""Figures and tables of cost, predictors and transfer: what they show, and what is missing."""

import json

import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_texts_are_apart, lines, notes, panel
from support import change_json
from synthetic_effects import ARMS, Bench, arm_fields, write_run, write_scored
from synthetic_records import kept, write_study

from config import UserError
from lora_tradeoffs.figures import study as study_figures
from lora_tradeoffs.figures.panels import DEMO_NOTE
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.figures.style import save, style_of
from lora_tradeoffs.measuring.results import adaptation_unit, item_reader
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.costs import arm_costs, cost_table, gain_costs
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.tables.transfer import transfer_table

SEEDS = (42, 43, 44)


@pytest.fixture
def empty(tmp_path):
    """Records of nothing, under either preset."""

    def make(preset="study"):
        return load_records(write_study(tmp_path, [], preset, script="retention"))

    return make


@pytest.fixture
def runs_dir(tmp_path):
    """Two finished runs, a control, and one that is not done."""
    folder = tmp_path / "models" / "demo"
    common = {"family": "similar", "seed": 42, "target_modules": "qv", "rank": 8}
    lora = common | {"method": "lora", "tasks": ["sst2", "mnli", "qqp"]}
    write_run(folder, "similar_lora_r8_seed42", lora, seconds=60.0)
    write_run(folder, "similar_lora_r8_seed43", lora | {"seed": 43}, seconds=120.0)
    full = lora | {"method": "full", "rank": 0}
    write_run(folder, "similar_full_seed42", full, seconds=240.0, size=400_000)
    write_run(folder, "sst2_lora_r8_seed42", lora | {"tasks": ["sst2"]})
    write_run(folder, "similar_lora_r4_seed42", lora | {"rank": 4})
    (folder / "similar_lora_r4_seed42" / "training.json").unlink()
    return folder


@pytest.fixture
def retention(tmp_path):
    """Validation scores of the runs' two checkpoints, in retention.json."""
    base = dict(method="base", step=0, fraction=0.0)
    records = [kept("base", "mean", "adaptation", 0.5, **base)]
    runs = {"similar_lora_r8_seed42": 0.1, "similar_lora_r8_seed43": 0.2}
    runs |= {"similar_full_seed42": 0.3, "sst2_lora_r8_seed42": 0.9}
    for run, gain in runs.items():
        arm = dict(method="full", rank=0) if "full" in run else {}
        for i in (1, 2):
            own = arm | dict(step=50 * i, fraction=i / 2, seed=int(run[-2:]))
            records.append(kept(run, "mean", "adaptation", 0.5 + gain * i / 2, **own))
    return load_records(write_study(tmp_path, records, "study", script="retention"))


def with_tables(retention=None, adaptation=None, **tables):
    """A study of these records whose tables are given."""
    study = StudyRecords(retention=retention, adaptation=adaptation)
    for name, table in tables.items():
        setattr(study, name, table)
    return study


def predicted(figure, table, frame):
    return figure(with_tables(frame, checkpoints=table))


# ------------------------------------------------------------------------------------- costs


def test_costs_are_those_of_the_finished_runs(runs_dir):
    costs = cost_table(runs_dir).set_index("run")
    assert "similar_lora_r4_seed42" not in costs.index
    run = costs.loc["similar_full_seed42"]
    assert (str(run["arm"]), run["family"], run["seed"]) == ("full", "similar", 42)
    assert (run["seconds"], run["tokens"], run["steps"]) == (240, 40_000, 100)
    assert run["trainable_share"] == 0.005
    assert run["checkpoint_bytes"] == 400_000  # without what resuming needs
    assert run["disk_bytes"] == 2 * 10 * 400_000  # two checkpoints with what resuming needs


def test_arms_are_means_over_seeds_and_say_how_many(runs_dir):
    table = arm_costs(cost_table(runs_dir)).set_index("arm").rename(str)
    assert list(table.index) == ["LoRA r=8", "LoRA r=8 (sst2 alone)", "full"]
    assert dict(table["seeds"]) == {"LoRA r=8": 2, "LoRA r=8 (sst2 alone)": 1, "full": 1}
    assert dict(table["minutes"])["LoRA r=8"] == pytest.approx(1.5)
    assert table.loc["full", "checkpoint (MB)"] == pytest.approx(0.4)
    assert (table["device"] == "an abacus").all()


def test_without_runs_the_tables_are_empty(tmp_path):
    costs = cost_table(tmp_path / "nowhere")
    assert costs.empty and arm_costs(costs).empty and gain_costs(tmp_path / "nowhere").empty


def test_a_gap_in_a_record_stays_one_and_a_missing_configuration_is_named(runs_dir, retention):
    path = runs_dir / "similar_full_seed42" / "training.json"
    training = json.loads(path.read_text()) | {"tokens": None, "peak_memory_bytes": None}
    for folder in runs_dir.iterdir():
        (folder / "training.json").write_text(json.dumps(training))
    assert arm_costs(cost_table(runs_dir))["million tokens"].isna().all()
    assert gain_costs(runs_dir, retention)["tokens"].isna().all()
    change_json(path.with_name("run.json"), config=["full"])
    with pytest.raises(UserError, match=r"run\.json is damaged: config is a list"):
        cost_table(runs_dir)


def test_gains_are_held_against_seconds_and_tokens(runs_dir, retention):
    points = gain_costs(runs_dir, retention)
    assert not points["run"].str.startswith("sst2").any()
    own = points[points["run"] == "similar_full_seed42"]
    assert list(own["gain"]) == pytest.approx([0.15, 0.3])
    assert list(own["tokens"]) == pytest.approx([20_000, 40_000])
    assert list(own["seconds"]) == pytest.approx([108, 216])  # the manifests', not in proportion
    manifest = runs_dir / "similar_full_seed42" / "checkpoint-50" / "manifest.json"
    manifest.write_text(json.dumps({"step": 50, "files": {}}))
    own = gain_costs(runs_dir, retention).query("run == 'similar_full_seed42'")
    assert list(own["seconds"]) == pytest.approx([120, 216])


def test_the_figure_of_costs_shows_means_over_seeds(runs_dir, retention):
    figure = study_figures.gain_against_cost(
        with_tables(retention, gains=gain_costs(runs_dir, retention))
    )
    minutes, tokens = figure.axes
    (line,) = lines(minutes, "LoRA r=8")
    # seeds at .9 of 60 and 120 seconds, with gains of .1 and .2
    assert np.allclose(line.get_xydata(), [(0, 0), (0.675, 0.075), (1.35, 0.15)])
    (line,) = lines(tokens, "full")
    assert np.allclose(line.get_xydata(), [(0, 0), (0.02, 0.15), (0.04, 0.3)])
    assert line.get_color() == style_of(Arm("full"))["color"]
    assert "Mean of 2 seeds (LoRA r=8): too few for an interval" in notes(figure)
    assert "One seed (full)" in notes(figure)
    assert_texts_are_apart(figure)


# -------------------------------------------------------------------------------- predictors


def predictor_rows(families=("similar", "dissimilar"), runs=9):
    """A table of runs whose forgetting follows `size` and has nothing to do with `rho`."""
    rng, rows = np.random.default_rng(0), []
    for family in families:
        for i in range(runs):
            size = 0.001 * 2 ** (i % 9)
            rows.append(
                {
                    **{"run": f"{family}{i}", "family": family, "seed": 42, "step": 10},
                    **{"arm": Arm("lora", 2 + i), "fraction": 1.0, "is_last": True},
                    **{"forgetting": size**0.5, "gain": rng.normal(), "size": size},
                    **{"rho": rng.uniform(0.5, 1.5)},
                }
            )
    return pd.DataFrame(rows)


def test_predictors_show_every_run_and_the_correlation(empty):
    table = predictor_rows()
    figure = predicted(study_figures.predictors_of_forgetting, table, empty())
    size, rho, *_ = figure.axes
    points = np.concatenate(
        [line.get_xydata() for line in size.lines if line.get_label()[0] == "L"]
    )
    own = table[table["family"] == "similar"]
    assert len(points) == 9
    assert np.allclose(sorted(points[:, 0]), sorted(own["size"]))
    assert size.get_title(loc="left") == "1.00" and size.get_xscale() == "log"
    shown = rho.get_title(loc="left")
    expected = own["rho"].corr(own["forgetting"], method="spearman")
    assert float(shown.split(" (")[0]) == pytest.approx(expected, abs=0.006)
    assert "resampled arms" in notes(figure)
    gain = predicted(study_figures.predictors_of_gain, table, empty())
    assert "gain on validation" in gain.axes[0].get_ylabel()


def test_a_predictor_that_does_not_vary_has_no_correlation(empty):
    table = predictor_rows(families=("similar",)).assign(rho=1.0, intruders=np.nan)
    figure = predicted(study_figures.predictors_of_forgetting, table, empty())
    assert len(figure.axes) == 2  # intruders were not measured
    assert figure.axes[1].get_title(loc="left") == "no correlation"


# ---------------------------------------------------------------------------------- transfer


def transferred(folder, seeds=SEEDS, arms=("lora_r8", "full"), tasks=("sst2", "mnli")):
    runs = []
    for task in tasks:
        bench = Bench(items=200)
        for arm in arms:
            for seed in seeds:
                for trained, ability in (("similar", 1.0), (task, 0.8)):
                    fields = arm_fields(arm, seed, trained) | {"task": task}
                    runs.append((fields, bench.answers(ability)))
    path, results = write_scored(folder, runs)
    frame = load_records(path)
    return transfer_table(frame, item_reader(results, adaptation_unit)), frame


def test_transfer_is_drawn_with_its_intervals(tmp_path):
    table, frame = transferred(tmp_path)
    figure = study_figures.transfer_by_task(with_tables(adaptation=frame, transfer=table))
    names = figure.axes[0].get_yticklabels()
    for row in table.itertuples():
        ax = panel(figure, row.task)
        (dot,) = lines(ax, row.arm)
        assert dot.get_xdata()[0] == pytest.approx(row.value)
        assert names[dot.get_ydata()[0]].get_text() == str(row.arm)
        ends = [tuple(line.get_xdata()) for line in lines(ax, "interval")]
        assert any(np.allclose(e, (row.low, row.high)) for e in ends)
    assert "95 % interval over seeds and items, 3 seeds" in notes(figure)
    assert_texts_are_apart(figure)


def test_one_seed_is_shown_as_one_seed(tmp_path):
    table, frame = transferred(tmp_path, seeds=(42,))
    figure = study_figures.transfer_by_task(with_tables(adaptation=frame, transfer=table))
    assert "over items, about these two runs alone (one seed)" in notes(figure)
    assert "over seeds" not in notes(figure)


def test_two_seeds_have_no_interval(tmp_path):
    table, frame = transferred(tmp_path, seeds=(42, 43))
    figure = study_figures.transfer_by_task(with_tables(adaptation=frame, transfer=table))
    assert "2 seeds: no interval" in notes(figure).replace("seed(s)", "seeds")
    assert not any(lines(ax, "interval") for ax in figure.axes)


# ---------------------------------------------------------------------------------- any figure


def test_without_data_a_figure_says_what_is_missing(empty, tmp_path):
    from lora_tradeoffs.tables.predictors import predictor_table

    frame = empty()
    figures = [
        study_figures.gain_against_cost(with_tables(frame, gains=gain_costs(tmp_path))),
        predicted(study_figures.predictors_of_forgetting, predictor_table(frame), frame),
        study_figures.transfer_by_task(
            with_tables(adaptation=frame, transfer=transfer_table(frame))
        ),
    ]
    for figure, missing in zip(
        figures, ("training.json", "measure of drift", "--single-task-controls")
    ):
        (text,) = figure.axes[0].texts
        assert "Nothing to draw" in text.get_text() and missing in text.get_text()


def test_the_demo_says_that_it_is_one(empty, tmp_path, runs_dir, retention):
    frame, points = empty("demo"), gain_costs(runs_dir, retention)
    table, _ = transferred(tmp_path / "t")
    for figure in (
        study_figures.gain_against_cost(with_tables(frame, gains=points)),
        predicted(study_figures.predictors_of_forgetting, predictor_rows(), frame),
        study_figures.transfer_by_task(with_tables(adaptation=frame, transfer=table)),
    ):
        assert DEMO_NOTE in figure.get_supxlabel()
        assert save(figure, tmp_path / "figure.png").is_file()


def test_all_arms_have_room(tmp_path, empty):
    table, frame = transferred(tmp_path, arms=tuple(ARMS), tasks=("sst2", "mnli", "qqp"))
    assert_texts_are_apart(
        study_figures.transfer_by_task(with_tables(adaptation=frame, transfer=table))
    )
    columns = dict.fromkeys(("intruders", "rotation", "kl_text", "kl_tasks"), 1e-3)
    table = predictor_rows().assign(**columns)
    figure = predicted(study_figures.predictors_of_forgetting, table, empty())
    assert_texts_are_apart(figure)
