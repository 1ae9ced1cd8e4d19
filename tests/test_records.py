"""Which results are a run's: by what their records say, not by how their names begin."""

import pytest
from support import settings_for

from config import UserError
from lora_tradeoffs.files import read_json, write_json
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.records import forget, read_run, units_of

# X-2 is a run, too: its unit could be step 2 of X
UNITS = {"X-9-sst2-test": "X", "X-old-9-sst2-test": "X-old", "X-2-9-sst2-test": "X-2"}


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    return settings_for(study="s")


def write_units(folder):
    results = Results(folder)
    for unit, run in UNITS.items():
        results.write(unit, {}, [{"run": run, "step": 9, "metric": "f1", "value": 0.5}])
        for other in ("items", "samples"):
            (folder / other).mkdir(exist_ok=True)
            (folder / other / f"{unit}.txt").write_text("")
    return results


@pytest.mark.parametrize(
    "fields",
    [
        {"own": None},
        {"own": {"families": {"mine": None}}},
        {"config": {"family": "mine"}},
        {"own": {"families": {"mine": []}}, "config": {"family": "mine"}},
    ],
    ids=str,
)
def test_a_run_whose_tasks_are_not_known_is_damaged(tmp_path, fields):
    write_json(tmp_path / "run.json", fields)
    with pytest.raises(UserError, match=r"run\.json is damaged: .*retrain the run with"):
        read_run(tmp_path)


@pytest.mark.parametrize("run", ["X", "X-old", "X-2"])
def test_a_retrained_run_loses_its_own_results_alone(settings, run):
    document = settings.document("adaptation")
    results = write_units(document.parent)
    results.join("adaptation", {})
    assert forget(settings, run) == 1
    left = {unit for unit, name in UNITS.items() if name != run}
    for folder in ("records", "items", "samples"):
        assert {path.stem for path in (document.parent / folder).iterdir()} == left
    assert {record["run"] for record in read_json(document)["records"]} == {*UNITS.values()} - {run}


def test_tables_of_drift_that_a_kill_left_without_records_are_the_runs(settings):
    folder = settings.document("drift").parent / "directions"
    folder.mkdir(parents=True)
    for name in ("X-9", "X-old-9", "X-2-9"):
        (folder / f"{name}.safetensors").write_text("")
    assert forget(settings, "X") == 0
    assert {path.stem for path in folder.iterdir()} == {"X-old-9", "X-2-9"}


def test_a_name_is_no_pattern(settings):
    folder = settings.document("adaptation").parent
    for run in ("X[1]", "X1", "X*", "X?"):
        record = {"run": run, "step": 9, "metric": "f1", "value": 0.5}
        Results(folder).write(f"{run}-9-sst2", {}, [record])
    assert units_of(["X[1]"], folder / "records") == ["X[1]-9-sst2"]
    assert forget(settings, "X*") == forget(settings, "X[1]") == 1
    assert {path.stem for path in (folder / "records").iterdir()} == {"X1-9-sst2", "X?-9-sst2"}


def test_a_damaged_unit_is_of_the_run_that_its_name_says(settings):
    folder = settings.document("adaptation").parent / "records"
    for name in ("X-9-sst2-test", "X-old-9-sst2-test", "X-2-9-sst2-test"):
        write_json(folder / f"{name}.json", {"request": {}, "records": [{"run": "X"}]})
    assert forget(settings, "X") == 1
    assert {path.stem for path in folder.iterdir()} == {"X-old-9-sst2-test", "X-2-9-sst2-test"}
