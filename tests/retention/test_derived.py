"""Records that compare units: forgetting at equal validation loss, against curves by hand."""

import numpy as np
import pytest

from config import FAMILIES
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.retention.derived import derived_records
from lora_tradeoffs.statistics.scores import Scores, mean, mean_scores

TASKS = FAMILIES["similar"]
ITEMS = 40


def write(results, run, t, task, about=(), **scores):
    """A unit of a run at a scale: its metrics, each a figure that its items spread around.

    `about` are other fields of its records.
    """
    noise = np.random.default_rng(len(task)).normal(0, 0.05, ITEMS)
    noise -= noise.mean()
    scored = [mean_scores(name, value + noise) for name, value in scores.items()]
    if task.startswith("text_"):
        sums = np.stack([scored[0].items * 100, np.full(ITEMS, 100.0)], 1)
        scored = [Scores("log_likelihood", sums, mean)]
    common = {"run": run, "step": 5 * (run != "base"), "update_scale": t, "shots": 0, "task": task}
    common |= {"family": "similar", "tasks": "similar", "seed": 42, "split": "x", "stderr": 0.01}
    common |= dict(about)
    records = [common | {"metric": s.name, "value": s.value, "n": ITEMS} for s in scored]
    unit = f"{run}-{t}-{task}-{common.get('shrunk', '')}"
    results.write(unit, {"limit": 0}, records, scored)


def write_curve(results, run, losses, texts, **others):
    """Validation loss and log-likelihood of text by scale; at 0 they are the base's."""
    for t, loss in losses.items():
        for task in TASKS:
            own = {name: value[t] for name, value in others.items()}
            write(results, run if t else "base", t or 1.0, task, **own, loss=loss)
        write(results, run if t else "base", t or 1.0, "text_prose", log_likelihood=texts[t])


def matched(results, metric="loss_matched_forgetting"):
    return [r for r in derived_records(results)[0] if r["metric"] == metric]


def test_text_lost_at_equal_loss_is_read_between_scales(tmp_path):
    """LoRA ends at .6; full fine-tuning has .6 at four fifths of the way from 0 to .5."""
    results = Results(tmp_path)
    write_curve(results, "lora", {0.0: 1.0, 0.5: 0.8, 1.0: 0.6}, {0.0: -3.0, 0.5: -3.1, 1.0: -3.2})
    write_curve(results, "full", {0.0: 1.0, 0.5: 0.5, 1.0: 0.3}, {0.0: -3.0, 0.5: -3.5, 1.0: -4.0})
    (found,) = matched(results)
    assert (found["run"], found["other_run"], found["task"]) == ("full", "lora", "text")
    assert found["loss"] == pytest.approx(0.6)
    assert (found["scale"], found["other_scale"]) == pytest.approx((0.4, 1.0))
    assert found["value"] == pytest.approx(0.4 - 0.2)
    assert found["low"] <= found["value"] <= found["high"] and found["reason"] == ""
    assert matched(results, "matched_forgetting") == []  # no score was measured
    assert not [r for r in derived_records(results)[0] if r["metric"] == "adaptation"]


def test_benchmarks_with_other_numbers_of_examples_double_nothing(tmp_path):
    """Matched forgetting is that of the benchmarks with the fewest, text lost is said once."""
    results, text = Results(tmp_path), {0.0: -3.0, 0.5: -3.1, 1.0: -3.2}
    for run, loss in (("lora", {0.0: 1.0, 0.5: 0.8, 1.0: 0.6}), ("full", {0.0: 1.0, 1.0: 0.6})):
        loss = {t: loss.get(t, 0.8) for t in text}
        write_curve(results, run, loss, text)
        for t in loss:
            for task, shots, share in (("hellaswag", 0, 1), ("gsm8k", 5, 10)):
                lost = 0.01 * share * t * (2 if run == "lora" else 1)
                about = {"shots": shots, "chance": 0.0}
                write(results, run if t else "base", t or 1.0, task, about, acc=0.6 - lost)
    for shrunk in ("intruders", "control"):
        about = {"shrunk": shrunk, "shrink": 0.0}
        write(results, "lora", 1.0, "text_prose", about, log_likelihood=-3.1)
        write(results, "lora", 1.0, "gsm8k", about | {"shots": 5, "chance": 0.0}, acc=0.5)
    derived = derived_records(results)[0]
    found = {r["task"]: r["value"] for r in derived if r["metric"] == "loss_matched_forgetting"}
    assert found == pytest.approx({"mean": -0.01, "text": 0.0}, abs=1e-9)
    few = [path for path in results.folder.glob("records/*hellaswag*")]
    for path in few:
        path.unlink()
    shots = {r["task"]: r["shots"] for r in matched(results)}
    assert shots == {"mean": 5, "text": 0}  # as those of what is forgotten
    effects = [r for r in derived if r["metric"] == "shrink_effect" and r["against"] == "control"]
    assert sorted(r["task"] for r in effects) == ["mean", "text"]


def test_curves_without_a_common_loss_say_so_and_scores_match_by_themselves(tmp_path):
    results, rises = Results(tmp_path), {0.0: 0.5, 0.5: 0.6, 1.0: 0.7}
    text = {0.0: -3.0, 0.5: -3.1, 1.0: -3.2}
    write_curve(results, "lora", {0.0: 1.0, 0.5: 1.1, 1.0: 1.2}, text, accuracy=rises)
    write_curve(results, "full", {0.0: 1.0, 0.5: 0.5, 1.0: 0.3}, text, accuracy=rises)
    (found,) = matched(results)
    assert np.isnan(found["value"])
    assert "lora has 1 before any update: the base has 1" in found["reason"]
    (by_score,) = matched(results, "matched_forgetting")
    assert by_score["value"] == pytest.approx(0) and by_score["score"] == pytest.approx(0.7)
