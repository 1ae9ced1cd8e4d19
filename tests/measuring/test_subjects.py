"""Which rows a base and a run are measured on."""

from support import settings_for

import multi_task_training
from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions
from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions
from lora_tradeoffs.measuring.subjects import find_subjects
from lora_tradeoffs.models.base import prepare_base
from lora_tradeoffs.retention.analysis import Retention, RetentionOptions

QUICK = ["--max-steps", "1", "--limit", "8", "--dtype", "fp32"]
SET = ["--set", "checkpoints=1", "eval_examples_per_task=2", "report_to=none", "batch_size=2"]


def test_prompts_are_as_long_as_the_run_was_trained_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    settings = settings_for(model=str(tiny), study="lengths")
    base = prepare_base(settings)

    def train(max_length):
        argv = ["--tasks", "cnn_dailymail", "--lora", "4", *QUICK, *SET, f"max_length={max_length}"]
        where = ["--model", str(tiny), "--study", "lengths"]
        assert multi_task_training.main([*argv, *where]) == 0

    def longest():
        """By run, the longest prompt of evaluation and gradients, and retention's longest row."""
        adaptation = Adaptation(settings, base, AdaptationOptions(dtype="fp32"))
        gradients = GradientAnalysis(settings, base, GradientOptions(2, 2, "fp32"))
        retention = Retention(settings, base, RetentionOptions(dtype="fp32"))
        lengths = {}
        for subject in find_subjects(settings, base):
            units = [u for u in adaptation.units([subject]) if u.task == "cnn_dailymail"]
            rows = [adaptation.rows(unit) for unit in units]
            batches = gradients.batches(subject, "cnn_dailymail")
            lengths[subject.run] = [
                max(n for part in rows for n in part["prompt_length"]),
                max(row["prompt_length"] for batch in batches for row in batch),
            ]
            if subject.family:
                passages = retention.passages(subject)["cnn_dailymail"]
                lengths[subject.run].append(max(len(p.tokens) for p in passages))
        return lengths

    train(200)
    of_base, of_run = longest().values()
    assert 28 < max(of_base) <= 40 and of_run[:2] == of_base  # 160 are left for the answer
    assert of_run[2] <= 200
    train(240)
    of_base, first, second = longest().values()
    assert first == of_run and 68 < max(second[:2]) <= 80
    assert max(of_base) > 180  # the preset's, since the runs differ
