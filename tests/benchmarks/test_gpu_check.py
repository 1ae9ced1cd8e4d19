"""The check of a GPU, with the CPU on both sides."""

import json
from dataclasses import replace

import pytest
from support import settings_for

from benchmarks import gpu_check
from benchmarks.gpu_check import Checks
from config import UserError
from lora_tradeoffs.files import write_json


@pytest.fixture
def checked(tiny, tmp_path, capsys):
    """Run the check on the two-layer model; its passed checks by name, and its figures."""

    def run(*flags):
        file = tmp_path / "gpu.json"
        where = ["--model", str(tiny), "--data", "sample", "--quick", "--pairs", "1"]
        assert gpu_check.main([*where, "--json", str(file), *flags]) == 0, capsys.readouterr().out
        result = json.loads(file.read_text())
        assert all(row["passed"] for row in result["checks"])
        return {row["check"]: row for row in result["checks"]}, result["figures"]

    return run


@pytest.mark.slow
def test_losses_and_records_are_compared(checked):
    checks, _ = checked("--only", "training", "measuring")
    for words in (
        *("losses of lora, gpu", "losses of full, bf16"),
        *("adaptation: accuracy", "adaptation: f1", "retention: acc,", "retention: log_likelihood"),
        *("drift: intruders", "drift: phi", "drift: value_shift"),
    ):
        assert any(words in name for name in checks), words
    equal = [row["value"] for name, row in checks.items() if "gpu - cpu" in name]
    assert len(equal) > 20 and not any(equal)  # the same device twice


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(checked):
    checks, figures = checked()
    for words in (
        "losses of lora",
        "resumed weights of similar_full",
        "drift: phi",
        "loss of ours",
    ):
        assert any(words in name for name in checks), words
    assert figures["training"]["ratios"] and figures["training"]["rows"][0]["share_of_peak"] > 0
    for name in ("retention_speed", "evaluation_speed"):
        assert all(row["items_per_second"] > 0 for row in figures[name]["rows"])
    assert figures["memory_full"]["expected"] > figures["memory_lora"]["expected"] > 0


def test_a_part_that_fails_is_a_check_that_failed():
    checks = Checks(None, "cpu")

    def broken(checks):
        """Breaks."""
        raise UserError("no such thing")

    def differing(checks):
        """Differs."""
        checks.check("loss", 0.2, limit=0.1)
        checks.check("not a number", float("nan"), limit=0.1)
        checks.check("speed", 1.6, limit=1.5, at_least=True)

    for part in (broken, differing):
        checks.part(part)
    assert [row["passed"] for row in checks.rows] == [False, False, False, True]
    assert checks.rows[0]["error"] == "UserError: no such thing"


def test_records_are_compared_one_by_one_and_none_is_left_out(tmp_path):
    settings = replace(settings_for(), output_dir=tmp_path)
    records = [{"metric": "phi", "step": step, "k": None, "value": step / 7} for step in (1, 2)]

    def pairs(*of_cpu):
        for study, rows in {"on-gpu": records, "on-cpu": of_cpu}.items():
            rows = [{**row, "study": study} for row in rows]
            write_json(replace(settings, study=study).document("drift"), {"records": rows})
        return gpu_check.compared_records(settings, "drift")

    both = pairs(records[1], {**records[0], "value": 0.5})
    assert both["step"].tolist() == ["1", "2"] and both["value_cpu"].tolist() == [0.5, 2 / 7]
    for of_cpu in (records[:1], [records[0], {**records[1], "k": 4}]):
        with pytest.raises(UserError, match="1 of them of the same"):
            pairs(*of_cpu)
