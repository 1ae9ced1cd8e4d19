"""The table of the arms: a family that was not tested shows its validation scores."""

from synthetic_records import record

from lora_tradeoffs.report.arm_table import _scores
from lora_tradeoffs.tables.frames import load_records


def test_a_family_without_test_scores_is_shown_on_validation(tmp_path):
    import json

    base = {"method": "base", "step": 0, "fraction": 0.0}
    records = []
    for task, run, score in (("sst2", "similar_full_seed42", 0.8), ("squad_v2", "d_seed42", 0.3)):
        family = {"family": "similar" if task == "sst2" else "dissimilar"}
        for split in ("validation", "test"):
            shift = 0.1 * (split == "test")
            records.append(record("base", task, 0.2 + shift, split=split, **base, **family))
            if task == "sst2" or split == "validation":
                fields = {"method": "full", "rank": 0, "split": split, **family}
                records.append(record(run, task, score + shift, **fields))
    path = tmp_path / "adaptation.json"
    meta = {"study": "demo", "base_model": "tiny", "preset": "study", "record_version": 2}
    path.write_text(json.dumps({"meta": meta, "records": records}))
    scores = _scores(load_records(path))
    values = {(row.family, str(row.arm)): round(row.value, 3) for row in scores.itertuples()}
    trained = {family: value for (family, arm), value in values.items() if arm != "base"}
    assert trained == {"similar": 0.9, "dissimilar": 0.3}
    bases = {family: value for (family, arm), value in values.items() if arm == "base"}
    assert bases == {"similar": 0.3, "dissimilar": 0.2}
