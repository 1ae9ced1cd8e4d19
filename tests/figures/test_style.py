"""Figures show what the records hold, and an arm looks the same in all of them."""

import math
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
from figure_checks import assert_texts_are_apart, bars, drawn, lines, notes, panel
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from synthetic_records import record, study, write_study

from config import TASKS
from lora_tradeoffs.figures.adaptation import last_by_rank, learning_curves, validation_against_test
from lora_tradeoffs.figures.draw import FIGURES as ALL
from lora_tradeoffs.figures.marks import log_axis
from lora_tradeoffs.figures.panels import DEMO_NOTE, place_legend
from lora_tradeoffs.figures.style import save, style_of
from lora_tradeoffs.tables.arms import BASE as BASE_ARM
from lora_tradeoffs.tables.arms import FULL, GRID, Arm
from lora_tradeoffs.tables.frames import gaps, load_records, score_table, summarise

FIGURES = ALL["adaptation"]
ARMS = [*GRID, Arm("full_qv"), FULL, BASE_ARM]
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
DEFICIENCIES = {
    "none": np.eye(3),
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
# CIE76 distance. Marks of a few points need some 15; a rainbow or tab10 has pairs below 5.
MIN_DISTANCE = 15


def lab(colours, deficiency):
    """CIELAB of sRGB colours (n x 3) as seen with the deficiency."""
    rgb = np.asarray(colours)
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(DEFICIENCIES[deficiency]), 0, 1)
    to_xyz = [[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]]
    xyz = seen @ np.transpose(to_xyz) / [0.9505, 1, 1.0888]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def colour(arm):
    return style_of(arm)["color"]


def closest(colours, deficiency):
    points = lab([*map(to_rgb, colours)], deficiency)
    return min(np.linalg.norm(a - b) for a, b in combinations(points, 2))


@pytest.fixture
def frame(tmp_path):
    """A data frame of records, by way of the file."""

    def make(records, preset="study"):
        return load_records(write_study(tmp_path, records, preset))

    return make


# ------------------------------------------------------------------------- palette


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_arms_are_told_apart_by_colour_whatever_the_eye(deficiency):
    assert closest(map(colour, ARMS), deficiency) > MIN_DISTANCE
    words = {"dora": 8, "pissa": 8, "loraplus": 8, "oft": 32}
    adapters = [Arm("lora", 8), *(Arm(*pair) for pair in words.items()), *ARMS[len(GRID) :]]
    assert closest(map(colour, adapters), deficiency) > MIN_DISTANCE
    assert len({style_of(arm)["marker"] for arm in adapters}) == len(adapters)


def test_the_check_for_colour_blindness_can_fail():
    assert closest(["#2ca02c", "#d62728", "#8c564b"], "deuteranopia") < MIN_DISTANCE


def test_arms_differ_without_colour():
    assert len({style_of(arm)["marker"] for arm in ARMS}) == len(ARMS)
    assert style_of(BASE_ARM)["linestyle"] == "--"
    assert style_of(Arm("baseline", run="lead-3"))["linestyle"] == ":"


def test_ranks_darken_and_others_fall_between():
    ranks = [Arm("lora", rank) for rank in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 512)]
    lightness = lab([to_rgb(colour(arm)) for arm in ranks], "none")[:, 0]
    assert (np.diff(lightness) < 0).all()


def test_an_arm_keeps_its_colour_whichever_arms_are_present(frame):
    every = frame(study(seeds=(42, 43, 44)))
    some = frame(study(grid=(("full", 0), ("lora", 32)), families=("dissimilar",)))
    for draw in FIGURES:
        for records in (every, some):
            ax = panel(drawn(draw, adaptation=records), "squad_v2")
            for arm in (FULL, Arm("lora", 32)):
                found = [c for c in ax.containers if c.get_label() == str(arm)]
                colours = {to_hex(c.lines[2][0].get_color()[0]) for c in found}
                colours |= {to_hex(line.get_color()) for line in lines(ax, arm)}
                assert colours == {colour(arm)}


def test_importing_draws_in_nothing_heavy():
    code = (
        "import sys; from lora_tradeoffs.figures import style;"
        " print({'matplotlib', 'pandas', 'numpy', 'torch'} & {*sys.modules})"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "set()", done.stderr


# ------------------------------------------------------------------------- figures


def curve(run, values, **fields):
    steps = len(values)
    return [
        record(run, "sst2", v, step=10 * i, fraction=i / steps, **fields)
        for i, v in enumerate(values, start=1)
    ]


BASE = record("base", "sst2", 0.6, method="base", step=0, fraction=0.0)
BASELINE = record("majority class", "sst2", 0.5, method="baseline", step=0, fraction=0.0)


def test_curves_show_the_records_of_a_single_seed(frame):
    records = [BASE, BASELINE, *curve("similar_lora_r8_seed42", [0.7, 0.8, 0.85])]
    records += curve("similar_full_seed42", [0.75, 0.9, 0.88], method="full")
    figure = drawn(learning_curves, adaptation=frame(records))
    ax = panel(figure, "sst2")
    for arm, values in (("LoRA r=8", [0.7, 0.8, 0.85]), ("full", [0.75, 0.9, 0.88])):
        (line,) = lines(ax, arm)
        assert list(line.get_ydata()) == [0.6, *values]
        assert line.get_xdata()[0] == 0
        assert np.allclose(line.get_xdata()[1:], [1 / 3, 2 / 3, 1], atol=0.04)
        assert np.allclose(bars(ax, arm), [(v - 0.02, v + 0.025) for v in values])
    assert set(lines(ax, "base")[0].get_ydata()) == {0.6}
    assert set(lines(ax, "majority class")[0].get_ydata()) == {0.5}
    (band,) = [patch for patch in ax.patches if patch.get_alpha()]
    assert np.allclose([band.get_y(), band.get_y() + band.get_height()], [0.58, 0.625])
    assert ax.get_ylabel() == "accuracy"
    assert "over items, not over seeds" in notes(figure)


def test_three_seeds_show_their_mean_and_the_interval_over_seeds_and_items(frame):
    values = {42: 0.80, 43: 0.84, 44: 0.88}
    records = [BASE]
    for seed, value in values.items():
        records += curve(f"similar_lora_r8_seed{seed}", [0.7, value], seed=seed)
    # By hand: mean .84, standard deviation .04, t(.975, 2) = 4.3027; over items .012 each.
    half = math.hypot(4.3027 * 0.04 / math.sqrt(3), 1.96 * 0.012)
    figure = drawn(learning_curves, adaptation=frame(records))
    assert np.allclose(lines(panel(figure, "sst2"), "LoRA r=8")[0].get_ydata(), [0.6, 0.7, 0.84])
    assert "Mean of 3 seeds, bars: 95 % interval over seeds and items" in notes(figure)
    ax = panel(drawn(last_by_rank, adaptation=frame(records)), "sst2")
    assert np.allclose(lines(ax, "LoRA r=8")[0].get_ydata(), [0.84])
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.84 - half, 0.84 + half)], atol=1e-5)
    assert sorted(lines(ax, "seeds of LoRA r=8")[0].get_ydata()) == [0.80, 0.84, 0.88]


def test_two_seeds_have_a_mean_but_no_interval(frame):
    records = curve("similar_full_seed42", [0.8], method="full")
    records += curve("similar_full_seed43", [0.9], method="full", seed=43)
    figure = drawn(last_by_rank, adaptation=frame(records))
    ((low, high),) = bars(panel(figure, "sst2"), "full")
    assert low == high == pytest.approx(0.85)
    assert "too few for an interval" in notes(figure)


def test_by_rank_orders_the_arms_and_reads_test_where_it_is(frame):
    figure = drawn(last_by_rank, adaptation=frame(study()))
    assert "Split: test" in notes(figure)
    ax = panel(figure, "squad_v2")
    ticks = [tick.get_text().replace("\n", " ") for tick in ax.get_xticklabels()]
    assert ticks == ["4", "8", "16", "32", "64", "full qv", "full"]
    places = [lines(ax, arm)[0].get_xdata()[0] for arm in ARMS[:-1]]
    assert places == [0, 1, 2, 3, 4, 5, 6]
    validation = drawn(
        last_by_rank, adaptation=frame([r for r in study() if r["split"] == "validation"])
    )
    assert "Split: validation" in notes(validation)


def test_validation_lies_along_x_and_test_along_y(frame):
    run = "similar_lora_r8_seed42"
    records = [*curve(run, [0.7, 0.8]), record(run, "sst2", 0.77, step=20, split="test")]
    ax = panel(drawn(validation_against_test, adaptation=frame(records)), "sst2")
    (container,) = ax.containers
    point = container.lines[0]
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.8], [0.77])
    assert np.allclose(bars(ax, "LoRA r=8", vertical=False), [(0.78, 0.825)])
    assert np.allclose(bars(ax, "LoRA r=8"), [(0.75, 0.795)])
    (identity,) = lines(ax, "identity")
    assert list(identity.get_xdata()) == list(identity.get_ydata())


def test_a_run_that_has_not_ended_is_left_out_and_named(frame):
    records = curve("similar_full_seed42", [0.7, 0.8], method="full")
    records.append(record("similar_lora_r8_seed42", "sst2", 0.7, step=10, fraction=0.5))
    for draw in (last_by_rank, learning_curves):
        figure = drawn(draw, adaptation=frame(records))
        assert bool(lines(panel(figure, "sst2"), "LoRA r=8")) == (draw is learning_curves)
    assert "similar_lora_r8_seed42" in notes(drawn(last_by_rank, adaptation=frame(records)))
    assert "not measured at its end: similar_lora_r8_seed42" in gaps(frame(records))


def test_fields_that_all_runs_share_leave_no_gap(frame):
    records = curve("similar_full_steps40_seed42", [0.7, 0.8], method="full")
    found = gaps(frame(records))
    assert "similar: no LoRA r=4, LoRA r=8, LoRA r=16, LoRA r=32, LoRA r=64" in found
    records += curve("similar_lora_r8_seed42", [0.7, 0.8])
    found = gaps(frame(records))
    assert "similar: no LoRA r=4, LoRA r=16, LoRA r=32, LoRA r=64, full" in found


def test_other_prompts_and_metrics_do_not_enter(frame):
    run = "similar_lora_r8_seed42"
    records = [BASE, BASE | {"shots": 4, "value": 0.65}, *curve(run, [0.8])]
    records.append(record(run, "sst2", 0.1, prompt=1))
    records.append(record(run, "sst2", 0.2, metric="f1"))
    ax = panel(drawn(learning_curves, adaptation=frame(records)), "sst2")
    assert list(lines(ax, "LoRA r=8")[0].get_ydata()) == [0.6, 0.8]
    assert sorted(line.get_label() for line in ax.lines) == ["LoRA r=8", "base"]


@pytest.mark.parametrize("draw", FIGURES)
def test_panels_are_the_tasks_that_there_are(draw, frame):
    assert [ax.get_title(loc="left") for ax in drawn(draw, adaptation=frame(study())).axes] == list(
        TASKS
    )
    half = drawn(draw, adaptation=frame(study(families=("dissimilar",)))).axes
    assert [ax.get_title(loc="left") for ax in half] == list(TASKS[3:])


@pytest.mark.parametrize("draw", FIGURES)
def test_without_records_a_figure_says_what_is_missing(draw, frame):
    for records in ([], [BASE], study()[:3]):
        (ax,) = drawn(draw, adaptation=frame(records)).axes
        assert "Nothing to draw: no " in ax.texts[0].get_text()


@pytest.mark.parametrize("draw", FIGURES)
def test_the_demo_says_that_it_is_one(draw, frame):
    assert DEMO_NOTE in notes(drawn(draw, adaptation=frame(study(), preset="demo")))
    assert DEMO_NOTE in notes(drawn(draw, adaptation=frame([], preset="demo")))
    assert "demo" not in notes(drawn(draw, adaptation=frame(study(), preset="study")))


@pytest.mark.parametrize("draw", FIGURES)
@pytest.mark.parametrize("families", [("similar", "dissimilar"), ("similar",)])
def test_no_text_overlaps_another_or_leaves_the_figure(draw, families, frame):
    records = study(seeds=(42, 43, 44), families=families)
    for seeds in (("43", "44"), ("44",)):  # one arm with a single seed, one with two
        arm = "lora_r16" if len(seeds) > 1 else "full_seed"
        records = [r for r in records if arm not in r["run"] or not r["run"].endswith(seeds)]
    figure = drawn(draw, adaptation=frame(records, preset="demo"))
    assert_texts_are_apart(figure)


def test_save_writes_png_and_pdf_and_leaves_no_scraps(frame, tmp_path):
    path = save(
        drawn(learning_curves, adaptation=frame(study())), tmp_path / "new" / "curves.png", pdf=True
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    assert sorted(p.name for p in path.parent.iterdir()) == ["curves.pdf", "curves.png"]
    width = int.from_bytes(path.read_bytes()[16:20], "big")
    assert width >= 150 * 7


def test_drawing_leaves_the_users_style_alone(frame, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    save(drawn(learning_curves, adaptation=frame(study())), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


# ------------------------------------------------------------------------- tables


def test_table_reads_test_and_marks_validation(frame):
    run = "similar_lora_r8_seed42"
    records = [*curve(run, [0.7, 0.8]), record(run, "sst2", 0.77, step=20, split="test")]
    records.append(record(run, "qqp", 0.66, step=20))
    table = score_table(frame(records)).rename(str)
    assert table.loc["LoRA r=8", "sst2"] == "0.770 ± 0.012"
    assert table.loc["LoRA r=8", "qqp"] == "0.660 ± 0.012 val"


def test_summary_of_three_seeds_by_hand(frame):
    records = [
        r
        for seed, value in ((42, 0.80), (43, 0.84), (44, 0.88))
        for r in curve(f"similar_lora_r8_seed{seed}", [value], seed=seed)
    ]
    (row,) = summarise(frame(records)).itertuples()
    assert (row.value, row.seeds, row.over) == (pytest.approx(0.84), 3, "seeds and items")
    assert row.stderr == pytest.approx(math.hypot(0.04 / math.sqrt(3), 0.012))


def test_a_figure_without_an_error_over_items_has_an_interval_over_seeds(frame):
    records = [
        record(f"similar_lora_r8_seed{seed}", "sst2", value, seed=seed, stderr=None)
        for seed, value in ((42, 0.80), (43, 0.84), (44, 0.88))
    ]
    (row,) = summarise(frame(records)).itertuples()
    assert (row.stderr, row.over) == (pytest.approx(0.04 / math.sqrt(3)), "seeds")
    assert row.high == pytest.approx(0.84 + 4.3027 * 0.04 / math.sqrt(3), abs=1e-5)


def steps(number, method="lora", rank=8):
    return Arm(method, rank, variant=f"steps{number}")


@pytest.mark.parametrize(
    ("arms", "shown", "title"),
    [
        ([steps(40), steps(40, "full", 0), BASE_ARM], ["LoRA r=8", "full", "base"], "steps40"),
        ([steps(40), FULL, BASE_ARM], None, ""),
        ([steps(40), steps(80)], None, ""),
        ([steps(40), BASE_ARM], None, ""),
    ],
)
def test_what_all_arms_share_is_said_once(arms, shown, title):
    figure = Figure()
    place_legend(figure, [Line2D([], [], label=arm) for arm in arms], arms)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == (shown or [str(a) for a in arms])
    assert legend.get_title().get_text() == (f"all runs: {title}" if title else "")


@pytest.mark.parametrize("high", [0.00143, 0.00146, 0.0021, 0.0055, 0.02, 0.1, 30])
def test_a_logarithmic_axis_has_a_few_labels_that_can_be_read(high):
    figure = Figure(figsize=(2.6, 2), layout="constrained")
    figure.supxlabel("x")
    ax = figure.subplots()
    ax.plot([0.00143, high], [1, 2], "o")
    log_axis(ax, [0.00143, high])
    assert_texts_are_apart(figure)
    low, high = ax.get_xlim()
    assert 1 <= sum(low <= x <= high for x in ax.get_xticks()) <= 6
