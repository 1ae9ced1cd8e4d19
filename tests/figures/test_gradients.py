"""The captions of the figures of gradient conflict."""

import math

import numpy as np
import pytest
from figure_checks import drawn, notes
from synthetic_records import record, write_study

from lora_tradeoffs.figures.draw import FIGURES
from lora_tradeoffs.gradients.conflict import Products, conflict_records
from lora_tradeoffs.tables.frames import load_records


@pytest.mark.parametrize(
    "seeds, means, of_maps",
    [
        (
            (42,),
            "One seed, bars: 95 % interval over batches, not over seeds.",
            "One seed per arm.",
        ),
        ((42, 43), "Mean of 2 seeds: too few for an interval.", "Mean over 2 seeds."),
        (
            (42, 43, 44),
            "Mean of 3 seeds, bars: 95 % interval over seeds and batches.",
            "Mean over 3 seeds.",
        ),
    ],
)
def test_figures_say_what_is_averaged_and_what_bars_are_over(tmp_path, seeds, means, of_maps):
    random = np.random.default_rng(0)
    records = []
    for seed in seeds:
        fields = record(f"similar_lora_r8_seed{seed}", "sst2", 0.0, seed=seed) | {"split": "train"}
        parts = random.normal(0.3, 1, (2, 8, 2, 40))  # by half, batch and task
        gradients = parts.sum(axis=0)
        between = np.einsum("bip,bjp->bij", gradients, gradients)[..., None]
        pairs = [(parts[a] * parts[b]).sum(axis=-1) for a, b in ((0, 0), (0, 1), (1, 1))]
        halves = np.stack(pairs, axis=-1)[..., None]
        products = Products(("sst2", "mnli"), ((0, "q_proj"),), between, halves)
        records += [fields | conflict for conflict in conflict_records(products)]
    for r in records:
        r |= {k: None for k, v in r.items() if isinstance(v, float) and math.isnan(v)}
    path = write_study(tmp_path, records, "study", script="gradients")
    for figure in FIGURES["gradients"]:
        text = notes(drawn(figure, gradients=load_records(path)))
        has_bars = figure.__name__ in ("conflict_over_training", "conflict_by_layer")
        assert (means if has_bars else of_maps) in text
        assert has_bars or "bars" not in text
        assert "within a task" in text.lower() or "a task with itself" in text
