"""The search for a learning rate: grid, choice, edge, and what is written of it."""

import dataclasses
import json
import math

import pytest
from support import settings_for

from config import FAMILIES, UserError
from lora_tradeoffs.training.learning_rates import (
    FACTORS,
    FILE,
    REACH,
    Search,
    best_rate,
    chosen_rate,
    mean_losses,
    rates_around,
    rates_table,
    read_rates,
    search,
    search_records,
    untried,
    write_rates,
)
from lora_tradeoffs.training.run import Run
from training_configs import default_config


def config_of(method="lora", rank=8, **changes):
    default = default_config(settings_for(), FAMILIES["similar"], method, rank, 42, 2048)
    return dataclasses.replace(default, **changes), default


def run_of(runs_dir, method="lora", rank=8, **changes):
    """A run whose default is its own configuration, so that its arm is the grid's by its name."""
    config, _ = config_of(method, rank, **changes)
    return Run("run", config, runs_dir / "run", config)


def searched(loss_of, rates=(0.5, 1.0, 2.0)):
    """The search over a made-up loss curve, and the rates in the order that they were trained."""
    asked = []

    def train(wanted):
        asked.extend(wanted)
        return {rate: [loss_of(rate)] for rate in wanted}

    return search(list(rates), train), asked


def bowl(optimum):
    """A loss that rises with the number of doublings from its optimum."""
    return lambda rate: 1 + math.log2(rate / optimum) ** 2


# -------------------------------------------------------------------------------- the grid


def test_the_first_rates_are_factors_of_the_default():
    assert rates_around(4.9e-5) == [2.45e-5, 4.9e-5, 9.8e-5]
    assert rates_around(1e-3, [4, 0.25, 1, 4]) == [2.5e-4, 1e-3, 4e-3]
    assert 1 in FACTORS  # so that the arm's default run is a point of its sweep


@pytest.mark.parametrize("factor", [0, -1, math.inf, math.nan])
def test_a_factor_that_is_no_positive_number_is_refused(factor):
    with pytest.raises(UserError, match=r"--lr-sweep .* above 0"):
        rates_around(1e-3, [1, factor])


# ------------------------------------------------------------------------------ the choice


def test_the_choice_has_the_lowest_mean_over_seeds():
    losses = {1e-3: [1.0, 1.4], 2e-3: [1.1, 1.2], 4e-3: [0.9, 1.6]}
    assert mean_losses(losses) == pytest.approx({1e-3: 1.2, 2e-3: 1.15, 4e-3: 1.25})
    assert best_rate(losses) == 2e-3


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_rate_at_which_a_seed_diverged_is_worse_than_all(broken):
    losses = {1e-3: [0.1, broken], 2e-3: [9.0, 9.0]}
    assert best_rate(losses) == 2e-3
    assert mean_losses(losses)[1e-3] == math.inf
    assert best_rate({1e-3: [broken], 2e-3: [broken]}) is None


def test_of_equal_rates_the_lowest_is_chosen():
    assert best_rate({4e-3: [1.0], 2e-3: [1.0], 1e-3: [1.5]}) == 2e-3


def test_next_are_half_and_twice_the_best_unless_they_were_tried():
    assert untried({1.0: [3.0], 2.0: [1.0], 4.0: [2.0]}) == []
    assert untried({1.0: [3.0], 2.0: [2.0], 4.0: [1.0]}) == [8.0]
    assert untried({1.0: [1.0], 2.0: [2.0], 4.0: [3.0]}) == [0.5]
    assert untried({1.0: [2.0], 4.0: [1.0], 16.0: [2.0]}) == [2.0, 8.0]
    assert untried({1.0: [math.inf], 2.0: [math.inf]}) == [0.5]
    # 6.125e-6 halved is 3.0625e-6, of four figures 3.062e-6: the same rate
    assert untried({3.062e-6: [2.0], 6.125e-6: [1.0], 1.225e-5: [2.0]}) == []


# ------------------------------------------------------------------------------ the search


def test_an_optimum_inside_the_grid_needs_no_further_run():
    found, asked = searched(bowl(1.1))
    assert (found.rate, found.problem) == (1.0, "")
    assert asked == [0.5, 1.0, 2.0]


def test_an_optimum_at_the_edge_widens_the_grid_until_it_lies_inside():
    found, asked = searched(bowl(7))
    assert (found.rate, found.problem) == (8.0, "")
    assert asked == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    found, asked = searched(bowl(0.26))
    assert (found.rate, asked[3:]) == (0.25, [0.25, 0.125])
    assert list(found.losses) == sorted(asked)


@pytest.mark.parametrize("direction", [1, -1])
def test_a_loss_that_keeps_falling_is_refused_by_name(direction):
    found, asked = searched(lambda rate: 5 - direction * math.log2(rate))
    edge = 2 * REACH if direction > 0 else 0.5 / REACH
    assert found.rate is None
    assert f"lowest at {edge:g}, the edge" in found.problem and "--lr-sweep" in found.problem
    assert (max(asked), min(asked)) == ((edge, 0.5) if direction > 0 else (2.0, edge))


def test_a_flat_loss_is_refused_too():
    """Nothing was learned at any rate, so none can be told to be best."""
    assert searched(lambda rate: 1.0)[0].rate is None


def test_a_coarse_grid_is_checked_at_half_and_twice_its_best():
    found, asked = searched(bowl(1.9), rates=(0.25, 1.0, 4.0))
    assert asked == [0.25, 1.0, 4.0, 0.5, 2.0]
    assert found.rate == 2.0
    found, asked = searched(bowl(3), rates=(1.0,))
    assert asked == [1.0, 0.5, 2.0, 4.0, 8.0]
    assert found.rate == 4.0


def test_rates_above_which_runs_diverge_are_an_edge_that_was_checked():
    found, asked = searched(lambda rate: 5 - math.log2(rate) if rate < 3 else math.nan)
    assert (found.rate, asked) == (2.0, [0.5, 1.0, 2.0, 4.0])


def test_where_all_diverge_lower_rates_are_tried_and_then_it_is_said():
    found, asked = searched(lambda rate: bowl(0.2)(rate) if rate < 0.3 else math.inf)
    assert (found.rate, asked[3:]) == (0.25, [0.25, 0.125])
    found, asked = searched(lambda rate: math.inf)
    assert found.rate is None and "every learning rate" in found.problem
    assert min(asked) == 0.5 / REACH and max(asked) == 2.0


# ------------------------------------------------------------------------- learning_rates.json


def written(runs_dir, arm="similar_lora_r8", config=None, found=None):
    config, default = config or config_of()
    found = found or Search({1e-3: [1.2, 1.4], 2e-3: [1.0, 1.2], 4e-3: [math.inf, 1.0]}, 2e-3)
    path = write_rates(runs_dir, arm, search_records(arm, config, default.learning_rate, found))
    assert path == runs_dir / FILE
    return json.loads(path.read_text())["records"]


def test_records_are_flat_and_say_what_was_tried_and_chosen(tmp_path):
    records = written(tmp_path)
    assert [r["learning_rate"] for r in records] == [1e-3, 2e-3, 4e-3]
    assert [r["loss"] for r in records] == [pytest.approx(1.3), pytest.approx(1.1), None]
    assert [r["chosen"] for r in records] == [False, True, False]
    names = ("arm", "family", "method", "rank", "target_modules", "scaling", "seeds", "problem")
    assert [records[0][n] for n in names] == [
        *("similar_lora_r8", "similar", "lora", 8, "qv", "2r", 2, "")
    ]
    assert not any(isinstance(v, (list, dict)) for record in records for v in record.values())
    default = config_of()[1].learning_rate
    assert [r["factor"] for r in records] == pytest.approx(
        [r["learning_rate"] / default for r in records], rel=1e-3
    )


def test_an_arm_that_is_searched_again_replaces_its_own_records_alone(tmp_path):
    written(tmp_path)
    written(tmp_path, "similar_full", config_of("full", 0))
    again = Search({1e-4: [3.0], 5e-4: [2.0], 1e-3: [2.5]}, 5e-4)
    records = written(tmp_path, found=again)
    assert [(r["arm"], r["learning_rate"]) for r in records] == [
        *(("similar_full", rate) for rate in (1e-3, 2e-3, 4e-3)),
        *(("similar_lora_r8", rate) for rate in (1e-4, 5e-4, 1e-3)),
    ]


def test_the_chosen_rate_is_read_back(tmp_path):
    written(tmp_path)
    assert chosen_rate(run_of(tmp_path)) == 2e-3
    other = run_of(tmp_path, seed=43, dtype="bf16", learning_rate=0.5)
    assert chosen_rate(other) == 2e-3


def test_an_arm_without_a_choice_names_the_command(tmp_path):
    written(tmp_path)
    full = config_of("full", 0)
    with pytest.raises(UserError) as error:
        chosen_rate(run_of(tmp_path, "full", 0))
    command = f"--lr-sweep --study {tmp_path.name} --similar --adapter full"
    assert "no learning rate was chosen for similar_full;" in str(error.value)
    assert str(error.value).endswith(command)
    refused = Search({1e-4: [2.0], 2e-4: [1.0]}, None, "it is lowest at the edge")
    written(tmp_path, "similar_full", full, refused)
    with pytest.raises(UserError, match="it is lowest at the edge"):
        chosen_rate(run_of(tmp_path, "full", 0))


def test_a_choice_under_other_settings_is_not_used(tmp_path):
    written(tmp_path)
    with pytest.raises(UserError, match=r"epochs 0.5 -> 2") as error:
        chosen_rate(run_of(tmp_path, epochs=2.0))
    assert "examples_per_task" not in str(error.value)


def edited(**changes):
    """A record of a sweep that was edited by hand."""
    record = {"arm": "similar_full", "family": "similar", "method": "full", "rank": 0}
    record |= {"learning_rate": 1e-3, "loss": 1.5, "chosen": True, "problem": ""}
    return json.dumps({"records": [record | changes]})


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"records": [1]}', '{"records": [{"arm": 1}]}'),
        *(edited(learning_rate="1e-3"), edited(loss="low"), edited(chosen=1), edited(family=None)),
    ],
)
def test_a_foreign_file_is_one_line(tmp_path, text):
    (tmp_path / FILE).write_text(edited())
    assert len(read_rates(tmp_path)) == 1
    (tmp_path / FILE).write_text(text)
    with pytest.raises(UserError, match=FILE) as error:
        read_rates(tmp_path)
    assert "\n" not in str(error.value)


def test_the_table_marks_the_choice_and_says_what_diverged(tmp_path):
    records = written(tmp_path)
    lines = rates_table(records).splitlines()
    assert len(lines) == 4
    assert [line.split()[-1] for line in lines[1:]] == ["1.3000", "chosen", "diverged"]
    assert lines[1].startswith("similar_lora_r8 ") and "2e-3" in lines[2]
    found = Search({1e-4: [2.0], 2e-4: [1.0]}, None, "it is lowest at the edge")
    records = written(tmp_path, "similar_full", config_of("full", 0), found)
    last = rates_table(records).splitlines()[-1]
    assert last == "no rate for similar_full: it is lowest at the edge"
