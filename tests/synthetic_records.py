"""A made-up adaptation.json, for the tests of figures and notebook. Its numbers mean nothing."""

from __future__ import annotations

import json
import math
import random

from config import FAMILIES
from dataset_descriptions import DESCRIPTIONS

BASELINES = {
    **dict.fromkeys(("sst2", "mnli", "qqp"), ("majority class", 0.5)),
    "squad_v2": ("always abstain", 0.5),
    "codexglue": ("nearest code", 12.0),
    "cnn_dailymail": ("lead-3", 0.24),
}
LEVELS = {
    "sst2": (0.62, 0.92),
    "mnli": (0.36, 0.78),
    "qqp": (0.55, 0.84),
    "squad_v2": (0.31, 0.68),
    "codexglue": (6.0, 21.0),
    "cnn_dailymail": (0.14, 0.23),
}
GRID = (*(("lora", rank) for rank in (4, 8, 16, 32, 64)), ("full_qv", 0), ("full", 0))


def record(run, task, value, method="lora", rank=8, seed=42, step=100, fraction=1.0, **others):
    """One flat record; the interval is value ± 0.02 and more, uneven on purpose."""
    family = next(name for name, tasks in FAMILIES.items() if task in tasks)
    scale = 100 if DESCRIPTIONS[task].metrics[0] == "codexglue_bleu" else 1
    return {
        "study": "demo",
        "base_model": "made-up",
        "run": run,
        "family": family,
        "method": method,
        "rank": rank if method == "lora" else 0,
        "alpha": 2 * rank if method == "lora" else 0,
        "scaling": "2r",
        "target_modules": "qv",
        "learning_rate": 1e-4,
        "seed": seed,
        "step": step,
        "fraction": fraction,
        "split": "validation",
        "task": task,
        "metric": DESCRIPTIONS[task].metrics[0],
        "value": value,
        "stderr": 0.012 * scale,
        "low": value - 0.02 * scale,
        "high": value + 0.025 * scale,
        "n": 200,
        "shots": 0,
        "prompt": 0,
    } | others


def study(seeds=(42,), grid=GRID, points=5, families=tuple(FAMILIES)):
    """Base, baselines and a whole grid; the secondary metrics too."""
    noise = random.Random(0)
    records = []
    for family in families:
        for task in FAMILIES[family]:
            start, end = LEVELS[task]
            name, level = BASELINES[task]
            for split in ("validation", "test"):
                base = dict(method="base", step=0, fraction=0, split=split)
                records.append(record("base", task, start, **base))
                records.append(record("base", task, start * 1.1, **base, shots=4))
                records.append(record(name, task, level, **base | {"method": "baseline"}))
            for method, rank in grid:
                for seed in seeds:
                    arm = f"lora_r{rank}" if method == "lora" else method
                    best = end - (end - start) * (0.25 / math.sqrt(rank) if rank else 0.02)
                    shift = noise.gauss(0, 0.02) * end
                    for i in range(1, points + 1):
                        value = best - (best - start) * math.exp(-4 * i / points) + shift
                        value += noise.gauss(0, 0.008) * end
                        common = dict(method=method, rank=rank, seed=seed, step=20 * i)
                        common |= dict(fraction=i / points)
                        run = f"{family}_{arm}_seed{seed}"
                        records.append(record(run, task, value, **common))
                        other = DESCRIPTIONS[task].metrics[1]
                        records.append(record(run, task, value * 0.9, **common, metric=other))
                        if i == points:
                            lower = value - abs(noise.gauss(0, 0.02)) * end
                            records.append(record(run, task, lower, **common, split="test"))
    return records


def write_study(folder, records, preset="demo", study="demo"):
    """performance_analysis/<study>/adaptation.json below the folder."""
    path = folder / "performance_analysis" / study / "adaptation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"study": study, "base_model": "made-up", "preset": preset, "created": "2026-01-01"}
    path.write_text(json.dumps({"meta": meta, "records": records}), encoding="utf-8")
    return path
