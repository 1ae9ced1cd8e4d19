"""How the updates of two runs lie to one another: phi between their singular vectors.

Read from `directions/`, what checkpoint_drift.py keeps of every run's last checkpoint, so all runs
of a study are compared, whichever were measured last.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import RANKS
from lora_tradeoffs.drift.matrix import PAIR
from lora_tradeoffs.drift.svd import random_similarity, subspace_similarities
from lora_tradeoffs.models.weights import Matrix, Weights, matrix_of, opened

if TYPE_CHECKING:
    from torch import Tensor

LEADING = min(RANKS)  # every arm of the grid has so many directions: a size that all share
SIDES = ("left", "right")


class Directions:
    """The singular vectors of a checkpoint's update, (d, r) a side of each matrix."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is corrupt; deleted, it is made again."""
        self.run, _, step = path.stem.rpartition("-")
        self.step = int(step)
        with opened(path) as file:
            self.fields = json.loads((file.metadata() or {})["fields"])
            self.is_empty = not file.keys()  # an update of zero has no direction
        if not self.is_empty:
            self.weights = Weights(path.parent, path.name)

    def of(self, matrix: Matrix, side: str) -> Tensor | None:
        name = f"{matrix.name}.{side}"
        return self.weights.tensor(name) if name in self.weights.shapes else None

    @property
    def is_dense(self) -> bool:
        return self.fields["method"] != "lora"

    def matrices(self) -> set[Matrix]:
        return {matrix_of(name.rpartition(".")[0]) for name in self.weights.shapes}


def last_directions(folder: Path) -> list[Directions]:
    """Of every run in `directions/` its last step; runs without a direction are left out."""
    newest: dict[str, Directions] = {}
    for path in sorted((folder / "directions").glob("*.safetensors")):
        found = Directions(path)
        if found.run not in newest or found.step > newest[found.run].step:
            newest[found.run] = found
    return [found for found in newest.values() if not found.is_empty]


def records_between(runs: list[Directions]) -> list[dict[str, Any]]:
    """phi of every pair of runs over the matrices that both have, a module and a side a record.

    Of LoRA all directions are compared, of a dense update as many as the LoRA run has (of two dense
    ones all that are kept): `directions` is "all"; and the leading ones alone, equally many of
    both. `random` is what random subspaces of these sizes have on average.
    """
    values: dict[tuple, list[tuple[float, float]]] = {}
    for matrix in sorted(set().union(*(run.matrices() for run in runs))):
        for side in SIDES:
            bases = [(run, run.of(matrix, side)) for run in runs]
            bases = [(run, basis.double()) for run, basis in bases if basis is not None]
            for (run, basis), (other, theirs) in combinations(bases, 2):
                grid = subspace_similarities(basis, theirs)
                for kind, (i, j) in _sizes(run, other, *grid.shape).items():
                    found = float(grid[i - 1, j - 1]), random_similarity(i, j, len(basis)), i, j
                    modules = (matrix.module, "both") if matrix.module in PAIR else (matrix.module,)
                    for module in modules:
                        key = run.run, other.run, module, side, kind
                        values.setdefault(key, []).append(found)
    by_name = {run.run: run for run in runs}
    return [
        _record(by_name[run], by_name[other], module, side, kind, found)
        for (run, other, module, side, kind), found in values.items()
        if module != "both" or set(PAIR) <= _modules(by_name[run]) & _modules(by_name[other])
    ]


def _sizes(run: Directions, other: Directions, i: int, j: int) -> dict[str, tuple[int, int]]:
    """How many directions of each are compared, of i and j."""
    whole = (i, j)
    if run.is_dense != other.is_dense:
        whole = (min(i, j), j) if run.is_dense else (i, min(i, j))
    leading = min(i, j, LEADING)
    return {"all": whole, "leading": (leading, leading)}


def _modules(run: Directions) -> set[str]:
    return {matrix.module for matrix in run.matrices()}


def _record(
    run: Directions, other: Directions, module: str, side: str, kind: str, found: list[tuple]
) -> dict[str, Any]:
    value, random, i, j = (list(column) for column in zip(*found))
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
