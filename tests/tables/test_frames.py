"""Results documents: what is missing, foreign or edited is named in one line."""

import json
import time

import pytest
from synthetic_effects import CONFIG
from synthetic_records import study, write_study

from config import UserError
from lora_tradeoffs.tables.frames import load_records, run_table


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"python eval\.py --study mine") as error:
        load_records(tmp_path / "performance_analysis" / "mine" / "adaptation.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[1, 2]", "{}", '{"meta": {}, "records": [3]}', '{"meta": {}, "records": [{}]}']
)
def test_a_foreign_file_is_one_line(tmp_path, text):
    path = tmp_path / "adaptation.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"adaptation\.json") as error:
        load_records(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda d: d["records"][1].update(value=float("nan")), "records.1.value is NaN"),
        (lambda d: d["records"][1].update(value="0.5"), "records.1.value is '0.5'"),
        (lambda d: d["records"][1].update(stderr="0.1"), "stderr of record 1 is '0.1'"),
        (lambda d: [r.update(n="all") for r in d["records"]], "n of record 0 is 'all'"),
        (lambda d: d["records"][1].update(rank=None), "rank of record 1 is None"),
        (lambda d: d["records"][1].update(seed=True), "seed of record 1 is True"),
        (lambda d: d["records"][1].update(run=7), "run of record 1 is 7"),
        (lambda d: d["records"][1].update(method="Lora"), "method of record 1 is 'Lora'"),
        (lambda d: d["records"][1].pop("value"), "record 1 lacks value"),
        (lambda d: d["records"].append([1]), "is a list"),
        (lambda d: d.update(records=7), "records is 7"),
        (lambda d: d["records"].append(d["records"][3] | {"value": 0.1}), "repeats an earlier one"),
        (
            lambda d: d["records"].append(d["records"][-1] | {"step": 200, "rank": 4}),
            "rank 8 and 4",
        ),
        (lambda d: d["records"][1].update(note=[1]), "a record holds a list"),
        (lambda d: d["meta"].pop("preset"), "preset is None"),
        (lambda d: d["meta"].update(preset="stduy"), "preset is 'stduy'"),
        (lambda d: d["meta"].update(record_version=3), "record version 3, this suite reads 2"),
    ],
)
def test_what_no_script_writes_is_refused_by_name(tmp_path, edit, message):
    path = write_study(tmp_path, study(grid=[("lora", 8)], points=1, families=("similar",)))
    assert len(load_records(path))
    document = json.loads(path.read_text())
    edit(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UserError) as error:
        load_records(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert "eval.py --study demo" in str(error.value) and "\n" not in str(error.value)


def test_a_large_document_is_read_in_seconds(tmp_path):
    records = [r | {"layer": i} for i in range(40) for r in study(seeds=(42, 43, 44), points=10)]
    path = write_study(tmp_path, records[:64_000])
    assert len(records) > 64_000
    start = time.process_time()
    frame = load_records(path)
    assert time.process_time() - start < 4 and len(frame) == 64_000  # about 1 s alone


def test_runs_are_listed_with_their_settings(tmp_path):
    assert run_table(tmp_path).empty
    record = {"base": {"name": "b", "digest": "0"}, "steps": 4, "config": CONFIG}
    record |= {"environment": {"device_name": "an abacus", "versions": {"torch": "2"}}}
    for run, text in (("whole", json.dumps(record)), ("broken", "{")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"broken/run\.json is damaged: .*restore it"):
        run_table(tmp_path)
    (tmp_path / "broken" / "run.json").unlink()
    table = run_table(tmp_path)
    row = table.loc["whole"]
    assert (row["base"], row["steps"], row["rank"], row["torch"]) == ("b", 4, 8, "2")
    assert row["device_name"] == "an abacus"
