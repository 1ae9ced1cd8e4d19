"""Made-up studies with known effects: per-item outcomes of runs, and finished runs."""

from __future__ import annotations

import json

import numpy as np
from synthetic_records import record

from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.statistics.scores import mean_scores

ARMS = {f"lora_r{rank}": ("lora", rank) for rank in (4, 8, 16, 32, 64)} | {"full": ("full", 0)}
META = {"study": "demo", "base_model": "made-up", "preset": "study"}


class Bench:
    """Items of a task that are as hard for every run, and runs that answer them."""

    def __init__(self, items=400, seed=0, spread=1.0, rest=0.4):
        self.rng = np.random.default_rng(seed)
        self.hard = self.rng.normal(0, spread, items)
        self.rest = rest

    def answers(self, ability):
        """0 or 1 an item, shape (items,)."""
        return (ability + self.rng.normal(0, self.rest, len(self.hard)) > self.hard) * 1.0


def write_scored(folder, runs, name="adaptation"):
    """Units with items, and the joined document, of (fields of synthetic_records.record, items)."""
    results = Results(folder)
    for fields, items in runs:
        r = record(value=float(np.mean(items)), **fields)
        r |= {"n": len(items), "stderr": float(np.std(items) / len(items) ** 0.5)}
        unit = f"{r['run']}-{r['step']}-{r['task']}-{r['split']}"
        scores = mean_scores(DESCRIPTIONS[r["task"]].metrics[0], items)
        results.write(unit, {}, [r], [scores])
    return results.join(name, META), results


def arm_fields(arm, seed, tasks="similar"):
    """The fields of an arm's last checkpoint on test."""
    method, rank = ARMS[arm]
    fields = {"run": f"{tasks}_{arm}_seed{seed}", "method": method, "rank": rank, "seed": seed}
    return fields | {"split": "test"}


CONFIG = {"family": "similar", "tasks": ["sst2", "mnli", "qqp"], "method": "lora", "rank": 8}
CONFIG |= {"alpha": 16, "scaling": "2r", "target_modules": "qv", "learning_rate": 1e-3, "seed": 42}


def write_run(runs_dir, run, config, seconds=100.0, steps=100, checkpoints=(50, 100), size=4000):
    """A finished run's run.json, training.json and manifests."""
    folder = runs_dir / run
    folder.mkdir(parents=True)
    environment = {"device_name": "an abacus"}
    record = {"config": CONFIG | config, "steps": steps, "environment": environment}
    (folder / "run.json").write_text(json.dumps(record))
    done = {"steps": steps, "seconds": seconds, "examples_per_second": 16 * steps / seconds}
    done |= {"tokens": 40_000, "peak_memory_bytes": 3_000_000_000}
    done |= {"trainable_parameters": 500, "base_parameters": 100_000}
    (folder / "training.json").write_text(json.dumps(done))
    for step in checkpoints:
        sizes = {"model.safetensors": size, "optimizer.pt": 9 * size}
        files = {name: {"size": size, "sha256": ""} for name, size in sizes.items()}
        manifest = {"step": step, "seconds": 0.9 * seconds * step / steps, "files": files}
        (folder / f"checkpoint-{step}").mkdir()
        (folder / f"checkpoint-{step}" / "manifest.json").write_text(json.dumps(manifest))
