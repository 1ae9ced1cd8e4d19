"""Units and documents on disk: what another version wrote is left alone; items in groups."""

import json

import numpy as np
import pytest

from config import UserError
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.records import RECORD_VERSION
from lora_tradeoffs.statistics.comparisons import estimate, grouped
from lora_tradeoffs.statistics.scores import mean_scores

RECORD = {"run": "r", "step": 1, "metric": "f1", "value": 0.5}


def assert_left_alone(path, *acts):
    """What is done says what to do, and the file that is of version 0 stays as it is."""
    old = path.read_text().replace(f'"record_version": {RECORD_VERSION}', '"record_version": 0')
    path.write_text(old)
    for act in acts:
        with pytest.raises(UserError, match=r"record version 0.*move .*study away"):
            act()
    assert path.read_text() == old


def test_what_another_version_wrote_is_never_written_over(tmp_path):
    results = Results(tmp_path / "study")
    results.write("r-1", {}, [RECORD])
    document = results.join("adaptation", {})
    results.check("adaptation")

    def join():
        results.join("adaptation", {})

    def check():
        results.check("adaptation")

    assert_left_alone(document, join, check)
    document.unlink()
    unit = results.unit_file("r-1")
    assert_left_alone(unit, join, check, lambda: results.write("r-1", {}, [RECORD]))


def test_records_of_version_1_are_read_with_tasks_and_variant(tmp_path):
    results = Results(tmp_path)
    trained = {"method": "lora", "rank": 8, "target_modules": "qv", "learning_rate": 1e-3}
    run = RECORD | trained | {"run": "sst2_lora_r8_lr1e-3_steps4_seed7", "seed": 7}
    base = RECORD | {"run": "base", "method": "base"}
    results.write("r-1", {}, [run, base])
    unit = results.unit_file("r-1")
    version = f'"record_version": {RECORD_VERSION}'
    unit.write_text(unit.read_text().replace(version, '"record_version": 1'))
    assert results.is_done("r-1", {})
    document = json.loads(results.join("adaptation", {}).read_text())
    assert document["meta"]["record_version"] == RECORD_VERSION
    assert [(r["tasks"], r["variant"]) for r in document["records"]] == [
        ("sst2", "steps4"),
        ("", ""),
    ]


def test_a_copy_of_a_unit_is_not_counted_twice(tmp_path):
    results = Results(tmp_path)
    for task in ("sst2", "qqp"):
        results.write(f"r-1-{task}", {}, [RECORD | {"task": task}])
    copy = results.unit_file("r-1-sst2 (1)")
    copy.write_text(results.unit_file("r-1-sst2").read_text().replace("0.5", "0.25"))
    with pytest.raises(UserError, match=r"sst2.json and .*sst2 \(1\).json hold the same"):
        results.join("adaptation", {})
    copy.unlink()
    assert len(json.loads(results.join("adaptation", {}).read_text())["records"]) == 2


def test_a_broken_document_is_made_anew(tmp_path):
    results = Results(tmp_path)
    results.write("r-1", {}, [RECORD])
    for text in ("", "[]", '{"meta": 1}'):
        (tmp_path / "adaptation.json").write_text(text)
        path = results.join("adaptation", {"study": "s"})
        assert len(json.loads(path.read_text())["records"]) == 1


def test_items_that_hang_together_are_resampled_together(tmp_path):
    rng = np.random.default_rng(0)
    passages = np.repeat(rng.random(40), 5)
    scores = mean_scores("f1", passages + rng.uniform(-0.05, 0.05, 200))
    groups = np.arange(200) // 5
    results = Results(tmp_path)
    results.write("r-1", {}, [RECORD], [scores], groups)
    results.write("r-2", {}, [RECORD], [scores])
    together = results.items("r-1")["f1"]
    assert together.value == pytest.approx(scores.value)
    expected = estimate(grouped(scores, groups))
    assert estimate(together).stderr == pytest.approx(expected.stderr, rel=0.05)
    # passages differ far more than questions about one: nearly sqrt(5) times the error
    assert estimate(together).stderr > 2 * estimate(scores).stderr
    alone = results.items("r-2")["f1"]
    assert np.array_equal(alone.statistics, scores.statistics)
