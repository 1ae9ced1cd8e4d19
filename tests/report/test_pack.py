"""A packed study: the same findings, tables and figures from a folder that is small enough to give
away, and nothing of the machine that made it."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from support import assert_one_line_error, ends_or_refuses, settings_for
from synthetic_drift import write_drift
from synthetic_effects import ARMS, META, Bench, arm_fields, write_run, write_scored
from synthetic_records import KNOWN, retention_study

from config import DOCUMENTS, FAMILIES, UserError
from lora_tradeoffs.figures.draw import FIGURES, draw_one
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.files import write_json
from lora_tradeoffs.measuring.results import PACKED_ITEMS, Results
from lora_tradeoffs.report.arm_table import arm_table
from lora_tradeoffs.report.findings import findings
from lora_tradeoffs.report.hypotheses import hypothesis_findings
from lora_tradeoffs.report.pack import pack, packed_settings
from lora_tradeoffs.statistics.scores import mean_scores
from lora_tradeoffs.tables.costs import cost_table
from lora_tradeoffs.tables.frames import load_records, run_table

SEEDS, PAIR = (42, 43, 44), {"lora_r8": 0.5, "full": 1.0}
HYPOTHESES = [
    {"contrast": ["lora:8", "full"], "outcome": outcome, "test": "difference"}
    for outcome in ("score", "forgetting")
]


def write_kept(folder):
    """Retention of both arms with per-item outcomes of the last checkpoints' benchmarks."""
    grid = [ARMS[arm] for arm in PAIR]
    records = retention_study(SEEDS, grid, points=2, families=("similar",), scales=(0.5,))
    results, units, rng = Results(folder), {}, np.random.default_rng(1)
    for r in records:
        units.setdefault((r["run"], r["step"], r["task"], r["update_scale"]), []).append(r)
    for (run, step, task, scale), of_unit in units.items():
        unit = f"{run}-{step}-{task}" if scale == 1 else f"{run}-{step}-x{scale:g}-{task}"
        metrics = {r["metric"] for r in of_unit} & {"acc", "acc_norm"}
        scores = [mean_scores(m, rng.integers(0, 2, 200)) for m in metrics if task in KNOWN]
        results.write(unit, {}, of_unit, scores, np.arange(200) // 2 if scores else None)
    results.join("retention", META)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A study of two arms and three seeds with all that a report shows; its OUTPUT_DIR."""
    folder, scored = tmp_path_factory.mktemp("packed") / "study", []
    for task in FAMILIES["similar"]:
        bench = Bench(items=100, rest=0.1)
        base = {"run": "base", "task": task, "method": "base", "step": 0, "fraction": 0.0}
        scored.append((base, bench.answers(0.0)))
        for arm, ability in PAIR.items():
            for seed in SEEDS:
                for step, split in ((50, "validation"), (100, "validation"), (100, "test")):
                    own = {"task": task, "split": split, "step": step, "fraction": step / 100}
                    scored.append((arm_fields(arm, seed) | own, bench.answers(ability)))
    write_scored(folder / "performance_analysis" / "demo", scored)
    write_kept(folder / "outputs" / "demo")
    write_drift(folder, [ARMS[arm] for arm in PAIR], SEEDS, ("similar",), points=2)
    for arm, (method, rank) in ((arm, ARMS[arm]) for arm in PAIR):
        for seed in SEEDS:
            config = {"method": method, "rank": rank, "seed": seed, "data": str(folder / "rows")}
            write_run(folder / "models" / "demo", f"similar_{arm}_seed{seed}", config)
    plan = {"families": ["similar"], "arms": ["lora:8", "full"], "hypotheses": HYPOTHESES}
    text = yaml.safe_dump(plan | {"data": str(folder / "rows")})
    (folder / "outputs" / "demo" / "study.yaml").write_text(text)
    arms = {"similar": [{"method": m, "rank": r} for m, r in map(ARMS.get, PAIR)]}
    planned = {"preset": "study", "model": "m", "data": str(folder / "rows"), "arms": arms}
    write_json(folder / "outputs" / "demo" / "study.json", planned)
    return folder


def settings_of(folder):
    return settings_for(preset="study", study="demo", output_dir=str(folder))


def shown(settings):
    """What the report says and draws, without drawing it."""
    study = StudyRecords.load(settings)
    frames = {name: f.to_csv() for name, f in study.at_all_rates.items() if f is not None}
    tables = [arm_table(study), study.transfer, study.gains, study.correlations]
    tables += [cost_table(settings.runs_dir), run_table(settings.runs_dir)]
    return frames, repr(findings(study)), [table.to_csv() for table in tables]


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    """The packed study, and what its source shows; the source is gone."""
    folder = tmp_path_factory.mktemp("given") / "away"
    expected = shown(settings_of(source))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_tradeoffs.report.pack.LARGE", 100_000)
        patch.setattr("lora_tradeoffs.report.pack.findings", hypothesis_findings)  # sooner
        pack(settings_of(source), folder)
    return folder, expected


def test_a_packed_study_has_the_same_records_tables_and_findings(packed, source, monkeypatch):
    folder, expected = packed
    monkeypatch.setenv("PRESET", "demo")  # the folder's own counts
    monkeypatch.setenv("DATA_SOURCE", str(folder / "gone"))  # as all that is not of the folder
    source.rename(source.with_name("away"))
    try:
        frames, sentences, tables = shown(packed_settings(folder)[0])
    finally:
        source.with_name("away").rename(source)
    assert (frames.keys(), sentences) == (expected[0].keys(), expected[1])
    assert "over seeds and items" in sentences and "H2" in sentences
    assert frames == expected[0] and tables == expected[2]


def test_the_items_are_what_the_intervals_count(packed, tmp_path):
    shutil.copytree(packed[0], tmp_path / "copy")
    settings = packed_settings(tmp_path / "copy", "demo")[0]
    for name, last in {"adaptation": "100", "retention": "40"}.items():
        path = settings.document(name).parent / PACKED_ITEMS
        table = pd.read_parquet(path)
        assert set(table["unit"].str.split("-").str[1]) == {last}
        if name == "adaptation":
            assert set(table["unit"].str.split("-").str[3]) == {"test", "validation"}
        table.iloc[:0].to_parquet(path)
    sentences = repr(hypothesis_findings(StudyRecords.load(settings)))
    assert "H2" in sentences and "over seeds and items" not in sentences


def test_nothing_packed_names_a_place_of_the_machine(packed, source):
    texts = [p for p in packed[0].rglob("*") if p.suffix in (".json", ".yaml")]
    assert len(texts) > 20
    for path in texts:
        assert str(source.parent) not in (text := path.read_text()) and '"/' not in text, path
    assert not [*packed[0].rglob("records"), *packed[0].rglob("*.partial")]
    names = {path.name for path in packed[0].glob("*/demo/*.json*")}
    assert {"adaptation.json", "retention.json.gz", "drift.json.gz"} <= names


def test_a_compressed_document_that_is_damaged_is_one_line(packed, tmp_path):
    path = settings_of(packed[0]).document("retention")
    broken = tmp_path / path.name
    for content in (path.read_bytes()[:-200], b"no gzip", path.read_bytes()[:900] + b"x" * 90):
        broken.write_bytes(content)
        with ends_or_refuses() as lines:
            load_records(broken)
        assert lines and f"{broken} is damaged" in lines[0]


@pytest.mark.slow
def test_every_figure_is_the_same_picture(packed, source):
    assert StudyRecords.load(settings_of(source)).gradients is None
    for group, figures in FIGURES.items():
        for figure in figures if group != "gradients" else ():
            paths = [
                draw_one(StudyRecords.load(settings), group, figure)
                for settings in (settings_of(source), packed_settings(packed[0])[0])
            ]
            first, second = (path.read_bytes() for path in paths)
            assert first == second, figure.__name__


def test_a_study_that_is_there_is_not_overwritten(packed, source, tmp_path):
    before = sorted(packed[0].rglob("*"))
    with pytest.raises(UserError, match=r"nothing was packed: remove .*demo"):
        pack(settings_of(source), packed[0])
    with pytest.raises(UserError, match="nothing was packed: remove"):
        pack(settings_of(source), source)
    assert sorted(packed[0].rglob("*")) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_tradeoffs.report.pack.findings", hypothesis_findings)
        patch.setattr("lora_tradeoffs.report.pack.last_checkpoints", lambda rows: rows[:0])
        with pytest.raises(UserError, match="the copy gives other findings"):
            pack(settings_of(source), tmp_path / "other")
    assert not [*(tmp_path / "other").iterdir()]
    with pytest.raises(UserError, match="study demo has no results"):
        pack(settings_of(tmp_path), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_may_hold_several_studies_and_none_is_one_line(packed, script, tmp_path):
    command = ("-m", "lora_tradeoffs.report.html", "--from")
    assert_one_line_error(script(*command, str(tmp_path)), str(tmp_path), "no such study", "--pack")
    for study in ("a", "b"):
        path = tmp_path / DOCUMENTS["drift"].format(study=study)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"meta": META, "records": []}))
    assert [settings.study for settings in packed_settings(tmp_path)] == ["a", "b"]
    assert [settings.study for settings in packed_settings(tmp_path, "b")] == ["b"]
