"""A made-up study of many runs in the shape of a real one, for the tests of size.

Every checkpoint has the records of 30 layers, with k up to 256 and nine epsilons; the matrices
behind them are small. Its numbers mean nothing.
"""

from __future__ import annotations

import functools
import json
import os
import random
from dataclasses import replace
from itertools import product

import numpy as np
from safetensors.numpy import load_file, save_file
from synthetic_records import GRID, retention_study, study, write_study
from synthetic_spectra import lora, power_law, with_values

from config import FAMILIES
from lora_tradeoffs.drift.analysis import EPSILONS, TOP_K
from lora_tradeoffs.drift.matrix import DriftSettings, _drift
from lora_tradeoffs.drift.solver import top_triplets_lora
from lora_tradeoffs.drift.svd import lora_update_svd
from lora_tradeoffs.drift.tables import (
    CheckpointDrift,
    common_fields,
    records_of,
    table_files,
    write_tables,
)
from lora_tradeoffs.gradients.conflict import Products, conflict_records
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.weights import Matrix
from lora_tradeoffs.records import unit_name

WIDTH = 288  # of the matrices, above the largest k
TRAINED = {"alpha": 16, "scaling": "2r", "target_modules": "qv", "learning_rate": 1e-4}


def write_large_study(settings, seeds, points=10, layers=30):
    """Records of all four analyses, and the tables of drift; 14 runs for each seed."""
    folder, seeds = settings.output_dir, range(seeds)
    write_study(folder, study(seeds, points=points))
    write_study(folder, retention_study(seeds, points=points), script="retention")
    noise, results = random.Random(0), Results(settings.document("drift").parent)
    gradients = []
    for family, (method, rank), seed in product(FAMILIES, GRID, seeds):
        run = f"{family}_{f'lora_r{rank}' if method == 'lora' else method}_seed{seed}"
        drift, conflicts = checkpoint_drift(rank or 64, layers), conflicts_of(family, layers)
        for i in range(1, points + 1):
            fields = {"study": "demo", "base_model": "made-up", "method": method, **TRAINED}
            fields |= {"rank": rank, "seed": seed, "fraction": i / points}
            fields |= {"tasks": family, "variant": ""}
            subject = Subject(run, 20 * i, None, fields, family, i == points, False)
            write_unit_tables(results.folder, subject, drift)
            unit = [
                r | {"value": r["value"] * noise.uniform(0.9, 1.1)}
                for r in records_of(subject, drift)
            ]
            results.write(unit_name(run, 20 * i), {}, unit)
            about = common_fields(subject) | {"split": "train", "of": "adapter"}
            gradients.append((about, conflicts))
    meta = {"study": "demo", "base_model": "made-up", "preset": "demo"}
    folder = settings.document("gradients").parent
    records = (about | record for about, conflicts in gradients for record in conflicts)
    Results(folder).join("gradients", meta, records)


@functools.cache
def conflicts_of(family, layers):
    """The records of a checkpoint's gradients."""
    return list(conflict_records(products(FAMILIES[family], layers)))


@functools.cache
def checkpoint_drift(rank, layers):
    """The drift of q_proj and v_proj in all layers, each with every k."""
    drift = matrix_drift(rank)
    places = product(range(layers), ("q_proj", "v_proj"))
    drifts = {Matrix(i, m, f"model.layers.{i}.self_attn.{m}"): drift for i, m in places}
    return CheckpointDrift(drifts, {m.tensor: d.squares for m, d in drifts.items()}, rank > 0)


def matrix_drift(rank):
    base = with_values(power_law(WIDTH), (WIDTH, WIDTH))
    A, B = lora((WIDTH, WIDTH), rank, 0.1, seed=rank)
    update = lora_update_svd(A, B, 1.0)
    triplets = top_triplets_lora(base, A, B, 1.0, max(TOP_K))
    settings = DriftSettings(tuple(sorted((*TOP_K, 10))), EPSILONS)
    return _drift(base, update, triplets, settings, update.S)


def write_unit_tables(folder, subject, drift, templates={}):  # noqa: B006
    """The tables of a checkpoint: links to those of the first with this drift, but for its fields
    in `directions/`."""
    key = id(drift)
    if key not in templates:
        last = replace(subject, is_last=True)
        write_tables(folder / "templates", last, drift)
        templates[key] = table_files(folder / "templates", last)
    for template, path in zip(templates[key], table_files(folder, subject)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.name == "directions":
            fields = common_fields(subject)
            update = "low rank" if fields["method"] == "lora" else "dense"
            metadata = {"fields": json.dumps(fields), "content": path.stem, "update": update}
            save_file(load_file(template), path, metadata)
        else:
            os.link(template, path)


def products(tasks, layers, batches=32):
    """Inner products of random gradients."""
    modules = [(layer, m) for layer in range(layers) for m in ("q_proj", "v_proj")]
    gradients = np.random.default_rng(0).normal(0.2, 1, (batches, len(tasks), len(modules), 20))
    between = np.einsum("bild,bjld->bijl", gradients, gradients)
    squares = between.diagonal(axis1=1, axis2=2).transpose(0, 2, 1)
    return Products(tasks, modules, between, np.stack([squares] * 3, axis=2))
