"""Every benchmark in its smallest form: it runs, its sides agree, and its figures are written."""

import json

import pytest

from benchmarks import evaluation_speed, retention_speed, spectral_speed, training_throughput


@pytest.fixture
def figures(tiny, tmp_path):
    """Run a benchmark on the two-layer model, one pair; what it wrote."""

    def run(main, *flags, model=tiny):
        file = tmp_path / "figures.json"
        where = ["--model", str(model), "--data", "sample", "--study", "benchmarks"]
        assert main([*where, "--quick", "--pairs", "1", "--json", str(file), *flags]) == 0
        return json.loads(file.read_text())

    return run


@pytest.mark.slow
def test_training_throughput_trains_every_peer_in_a_process_of_its_own(figures):
    result = figures(training_throughput.main, "--peers", "grouped", "--steps", "1", "1")
    assert [row["peer"] for row in result["rows"]] == ["ours", "grouped"]
    assert list(result["ratios"]) == ["ours/grouped"]
    assert all(row["examples_per_second"] > 0 for row in result["rows"])
    ours, peer = (row["loss"] for row in result["rows"])
    assert ours == pytest.approx(peer, rel=0.02)  # the same rows


@pytest.mark.slow
def test_a_peer_that_fails_is_one_line(figures, capsys, tmp_path):
    flags = ["--model", str(tmp_path), "--data", "sample", "--study", "benchmarks"]
    assert training_throughput.main([*flags, "--quick", "--peers", "grouped"]) == 2
    (line,) = [s for s in capsys.readouterr().err.splitlines() if s.startswith("error:")]
    assert "ours failed" in line


def test_evaluation_speed_compares_with_lm_eval_and_with_generate(figures):
    result = figures(evaluation_speed.main, "--items", "4", "--new-tokens", "4")
    assert set(result["ratios"]) == {"classification", "generation"}
    assert {row["task"] for row in result["rows"]} == {
        *("sst2", "mnli", "qqp", "squad_v2", "codexglue", "cnn_dailymail")
    }
    assert not any(row["different"] for row in result["rows"])


def test_retention_speed_finds_the_scores_of_lm_eval(figures):
    result = figures(retention_speed.main, "--items", "4")
    assert set(result["ratios"]) == {"hellaswag", "arc_challenge", "winogrande"}
    assert all(row["equal"] for row in result["rows"])


@pytest.mark.slow
def test_spectral_speed_finds_the_triplets_of_a_dense_svd_and_pefts_intruders(figures):
    result = figures(spectral_speed.main, "--shrink", "8")
    assert {"k10_r8", "k64_r64", "dense_k64", "peft_k10"} <= set(result["ratios"])
    compared = [row for row in result["rows"] if "dense_seconds" in row]
    assert max(row["value_error"] for row in compared) < 1e-9
    (study,) = [row for row in result["rows"] if "study" in row]
    assert study["projected_seconds"] > study["projected_lora_seconds"] > 0
