"""A made-up drift.json and its tables, for the tests of figures. Its numbers mean nothing."""

from __future__ import annotations

import json
import random
from itertools import combinations

import numpy as np
import pandas as pd
from safetensors.numpy import save_file
from synthetic_records import write_study

LAYERS = 4
SHARED = {"split": "", "task": "", "alpha": 0, "scaling": "2r", "target_modules": "qv"}


def arm_name(method, rank):
    return f"lora_r{rank}" if method == "lora" else method


def strength(method, rank, module):
    """Some size of an update that grows with the rank."""
    return (0.01 * rank**0.5 if rank else 0.004) * (1.3 if module == "v_proj" else 1.0)


def checkpoint(family, method, rank, seed, step, fraction):
    """The flat records of one checkpoint."""
    noise = random.Random(f"{family}{method}{rank}{seed}{step}")
    common = {
        **SHARED,
        **dict(study="demo", base_model="made-up", learning_rate=1e-4),
        **dict(family=family, method=method, rank=rank, seed=seed, step=step, fraction=fraction),
        "run": f"{family}_{arm_name(method, rank)}_seed{seed}",
    }

    def row(metric, value, module, layer=-1, k=None, eps=None, side=""):
        own = dict(metric=metric, value=value, module=module, layer=layer, k=k, eps=eps, side=side)
        return {**common, **own, "n": 1}

    rows = [row("relative_frobenius", strength(method, rank, "q_proj") * 0.4 * fraction, "all")]
    for module in ("q_proj", "v_proj", "both"):
        size = strength(method, rank, module) * fraction**0.5 * noise.uniform(0.9, 1.1)
        rows.append(row("relative_frobenius", size, module))
        for side in ("left", "right"):
            rows.append(row("phi", 1 - size**2, module, k=10, side=side))
        for eps in (0.3, 0.5, 0.7, 0.9):
            rows.append(row("intruders", 40 * size * eps**2, module, k=10, eps=eps))
        for k in (4, 64):
            rows.append(row("intruders", 10 * size * k**0.5, module, k=k, eps=0.5))
    for layer in range(LAYERS):
        for module in ("q_proj", "v_proj"):
            size = strength(method, rank, module) * fraction**0.5 * (1 + layer / LAYERS)
            rows.append(row("relative_frobenius", size, module, layer))
    return rows


def between(records):
    """phi of every pair of runs."""
    last = {r["run"]: r for r in records if r["fraction"] == 1}
    rows = []
    for (_, first), (other, second) in combinations(sorted(last.items()), 2):
        for module in ("q_proj", "v_proj", "both"):
            for side in ("left", "right"):
                for kind, i, j in (
                    ("all", first["rank"] or 64, second["rank"] or 64),
                    ("leading", 4, 4),
                ):
                    value = 0.6 if first["family"] == second["family"] else 0.1
                    own = dict(metric="update_phi", module=module, side=side, layer=-1, eps=None)
                    own |= dict(
                        directions=kind,
                        k=i,
                        other_k=j,
                        other=other,
                        value=value,
                        random=max(i, j) / 576,
                    )
                    rows.append({**first, **own})
    return rows


def write_tables(folder, run, step, rank):
    """spectra/ and similarities/ of a checkpoint, with an intruder as vector 3 of layer 1."""
    tables, matrices = [], {}
    for layer in range(LAYERS):
        for module, size in (("q_proj", 64), ("v_proj", 24)):
            index = np.arange(1, size + 1)
            cosines = np.full(size, 0.98)
            matrix = np.eye(size)
            if layer == 1 and rank:
                cosines[2], matrix[2, 2] = 0.2, 0.2
            values = {"base": index**-0.5, "tuned": index**-0.5, "max_cosine": cosines}
            update = np.where(index <= (rank or size), 0.1 / index, np.nan)
            table = pd.DataFrame({**values, "update": update, "index": index})
            tables.append(table.assign(layer=layer, module=module))
            matrices[f"model.layers.{layer}.self_attn.{module}"] = matrix.astype(np.float16)
    for name in ("spectra", "similarities"):
        (folder / name).mkdir(exist_ok=True)
    pd.concat(tables, ignore_index=True).to_parquet(folder / "spectra" / f"{run}-{step}.parquet")
    save_file(matrices, folder / "similarities" / f"{run}-{step}.safetensors")


def write_drift(output, grid, seeds=(42,), families=("similar", "dissimilar"), points=4):
    """drift_analysis_plots/demo/ below the folder; the path of its drift.json."""
    folder = output / "drift_analysis_plots" / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for family in families:
        for method, rank in grid:
            for seed in seeds:
                for i in range(1, points + 1):
                    records += checkpoint(family, method, rank, seed, 20 * i, i / points)
                write_tables(folder, records[-1]["run"], 20 * points, rank)
    records += between(records)
    return write_study(output, records, script="drift")


def write_retention(output, drift, forgetting):
    """outputs/demo/retention.json with `forgetting(record)` of each of drift's checkpoints, after
    that of its update scaled, which comes first in real ones, too."""
    records = json.loads(drift.read_text())["records"]
    found = {(r["run"], r["step"]): r for r in records if r["metric"] != "update_phi"}
    rows = [
        {**r, "metric": "forgetting", "task": "mean", "update_scale": t, "value": value}
        for r in found.values()
        for t, value in ((0.25, 9.0), (1.0, forgetting(r)))
    ]
    return write_study(output, rows, script="retention")
