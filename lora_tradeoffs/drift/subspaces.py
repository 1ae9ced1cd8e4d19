"""Subspace similarity between the updates of two runs: phi of their singular vectors.

The vectors come from `directions/`, where analysis.py stores those of every run's last checkpoint,
so that all runs of a study are compared, whenever they were measured.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import RANKS
from lora_tradeoffs.drift.matrix import PAIR
from lora_tradeoffs.drift.measures import random_similarity, subspace_similarities
from lora_tradeoffs.models.weights import Matrix, Weights, matrix_of, opened
from lora_tradeoffs.records import updated

if TYPE_CHECKING:
    from torch import Tensor

LEADING = min(RANKS)  # a number of directions that every run of the grid has
SIDES = ("left", "right")


class Directions:
    """The singular vectors of a checkpoint's update, (d, r) for each matrix and side."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is corrupt."""
        self.run, _, step = path.stem.rpartition("-")
        self.step = int(step)
        with opened(path) as file:
            self.fields = updated(json.loads((file.metadata() or {})["fields"]))
            self.is_empty = not file.keys()  # a zero update has no direction
        if not self.is_empty:
            self.weights = Weights(path.parent, [path])

    def vectors(self, matrix: Matrix, side: str) -> Tensor | None:
        """Those of one matrix and side; None if the update does not touch it."""
        name = f"{matrix.name}.{side}"
        return self.weights.tensor(name) if name in self.weights.shapes else None

    @property
    def is_dense(self) -> bool:
        return self.fields["method"] != "lora"

    def matrices(self) -> set[Matrix]:
        return {matrix_of(name.rpartition(".")[0]) for name in self.weights.shapes}


def last_directions(folder: Path) -> list[Directions]:
    """The directions of every run at its last step; runs whose update is zero are left out."""
    stored = [Directions(path) for path in sorted((folder / "directions").glob("*.safetensors"))]
    last: dict[str, Directions] = {}
    for directions in stored:
        if directions.run not in last or directions.step > last[directions.run].step:
            last[directions.run] = directions
    return [directions for directions in last.values() if not directions.is_empty]


def records_between(runs: list[Directions]) -> list[dict[str, Any]]:
    """phi of every pair of runs, averaged over the matrices that both have, by module and side.

    `directions` is "all": all directions of a LoRA run, as many of a dense run's as the LoRA run
    has, and all stored ones of two dense runs. Or it is "leading": the same small number of both.
    `random` is the mean of random subspaces of these sizes.
    """
    values: dict[tuple, list[tuple[float, float]]] = {}
    for matrix in sorted(set().union(*(run.matrices() for run in runs))):
        for side in SIDES:
            bases = [(run, run.vectors(matrix, side)) for run in runs]
            bases = [(run, basis.double()) for run, basis in bases if basis is not None]
            for (run, basis), (other, other_basis) in combinations(bases, 2):
                phi = subspace_similarities(basis, other_basis)
                for kind, (i, j) in _sizes(run, other, *phi.shape).items():
                    row = float(phi[i - 1, j - 1]), random_similarity(i, j, len(basis)), i, j
                    modules = (matrix.module, "both") if matrix.module in PAIR else (matrix.module,)
                    for module in modules:
                        key = run.run, other.run, module, side, kind
                        values.setdefault(key, []).append(row)
    by_name = {run.run: run for run in runs}
    return [
        _record(by_name[run], by_name[other], module, side, kind, rows)
        for (run, other, module, side, kind), rows in values.items()
        if module != "both" or set(PAIR) <= _modules(by_name[run]) & _modules(by_name[other])
    ]


def _sizes(run: Directions, other: Directions, i: int, j: int) -> dict[str, tuple[int, int]]:
    """How many of the i and j directions of the two are compared."""
    sizes = (i, j)
    if run.is_dense != other.is_dense:
        sizes = (min(i, j), j) if run.is_dense else (i, min(i, j))
    leading = min(i, j, LEADING)
    return {"all": sizes, "leading": (leading, leading)}


def _modules(run: Directions) -> set[str]:
    return {matrix.module for matrix in run.matrices()}


def _record(
    run: Directions, other: Directions, module: str, side: str, kind: str, rows: list[tuple]
) -> dict[str, Any]:
    value, random, i, j = (list(column) for column in zip(*rows))
    return {
        **run.fields,
        "layer": -1,
        "module": module,
        "metric": "update_phi",
        "side": side,
        "k": max(i),
        "eps": None,
        "directions": kind,
        "other": other.run,
        "other_step": other.step,
        "other_k": max(j),
        "value": sum(value) / len(value),
        "random": sum(random) / len(random),
        "n": len(value),
    }
