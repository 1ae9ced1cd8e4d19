"""Subspace similarity between the updates of two runs: phi of their singular vectors.

The vectors come from `directions/`, where analysis.py stores those of every run's last checkpoint,
so that all runs of a study are compared, whenever they were measured. There are quadratically many
pairs: by default those of one family are compared, and `between/` keeps what was computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import RANKS
from lora_tradeoffs.drift.matrix import PAIR
from lora_tradeoffs.files import DELETE, intact
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.models.weights import Matrix, matrix_of, opened
from lora_tradeoffs.records import BOTH, OVERALL, unit_name

if TYPE_CHECKING:
    from torch import Tensor

LEADING = min(RANKS)  # a number of directions that every run of the grid has
SIDES = ("left", "right")


class Directions:
    """The singular vectors of a checkpoint's update, (d, r) for each matrix and side."""

    def __init__(self, path: Path) -> None:
        """Raises UserError for a file that is corrupt."""
        self.path = path
        self.run, _, step = path.stem.rpartition("-")
        with opened(path, DELETE) as file:
            metadata, names = file.metadata(), list(file.keys())
        with intact(path):
            self.fields = json.loads(metadata["fields"])
            self.step, self.identity = int(step), [int(step), metadata["content"]]
            self.is_dense = metadata["update"] == "dense"
            self.matrices = {matrix_of(name.rpartition(".")[0]) for name in names}

    def vectors(self, matrix: Matrix, side: str) -> Tensor:
        with opened(self.path, DELETE) as file:
            return file.get_tensor(f"{matrix.name}.{side}").double()

    def is_related(self, other: Directions) -> bool:
        """Whether both are of one family, or one of them, from elsewhere, of none."""
        families = {self.fields["family"], other.fields["family"]}
        return "" in families or len(families) == 1


def last_directions(folder: Path) -> list[Directions]:
    """The directions of every run at its last step; runs whose update is zero are left out."""
    stored = [Directions(path) for path in sorted((folder / "directions").glob("*.safetensors"))]
    last: dict[str, Directions] = {}
    for directions in stored:
        if directions.run not in last or directions.step > last[directions.run].step:
            last[directions.run] = directions
    return [directions for directions in last.values() if directions.matrices]


def records_between(folder: Path, all_pairs: bool = False) -> Iterator[dict[str, Any]]:
    """phi of every two runs of a family, with `all_pairs` of every two runs; of one base alone.

    It is averaged over the matrices that both have, by module and side. `directions` is "all": all
    directions of a LoRA run, as many of a dense run's as the LoRA run has, and all stored ones of
    two dense runs. Or it is "leading": the same small number of both. `random` is the mean of
    random subspaces of these sizes.

    `between/` has a unit for each run: its pairs with the runs after it. Of these, pairs that are
    missing, or of which a side has changed, are computed.
    """
    by_base: dict[str, list[Directions]] = {}
    for run in last_directions(folder):
        by_base.setdefault(run.fields.get("base_model", ""), []).append(run)
    for runs in by_base.values():
        yield from _records_between(Results(folder / "between"), runs, all_pairs)


def _records_between(
    results: Results, runs: Sequence[Directions], all_pairs: bool
) -> Iterator[dict[str, Any]]:
    requests: dict[str, dict[str, Any]] = {}
    kept: dict[str, list[dict[str, Any]]] = {}
    missing: dict[str, tuple[Directions, list[Directions]]] = {}
    for i, run in enumerate(runs):
        others = [other for other in runs[i + 1 :] if all_pairs or run.is_related(other)]
        about = {"run": run.identity, "fields": run.fields}
        unit, identities = unit_name(run.run, run.step), {o.run: o.identity for o in others}
        requests[unit] = {**about, "others": identities}
        if results.is_done(unit, requests[unit]):
            continue
        old = results.read(unit) if results.unit_file(unit).is_file() else {"request": {}}
        is_same = about == {name: old["request"].get(name) for name in about}
        known = old["request"]["others"] if is_same else {}
        same = {name for name in known if known[name] == identities.get(name)}
        kept[unit] = [record for record in old.get("records", ()) if record["other"] in same]
        missing[unit] = run, [other for other in others if other.run not in same]
    for unit, records in _compare(missing).items():
        results.write(unit, requests[unit], kept[unit] + records)
    for unit in requests:
        yield from results.read(unit)["records"]


def _compare(
    pairs: Mapping[str, tuple[Directions, Sequence[Directions]]],
) -> dict[str, list[dict[str, Any]]]:
    """The records of each unit: of its run with each of the others.

    The vectors of all runs stand side by side in one array for each matrix, so that those of a run
    are multiplied with those of all others at once.
    """
    runs = list({r.run: r for run, others in pairs.values() for r in (run, *others)}.values())
    sums: dict[tuple, np.ndarray] = {}
    for matrix in sorted(set().union(*(run.matrices for run in runs))):
        modules = (matrix.module, BOTH) if matrix.module in PAIR else (matrix.module,)
        for side in SIDES:
            bases = {r.run: r.vectors(matrix, side).numpy() for r in runs if matrix in r.matrices}
            ends = np.cumsum([basis.shape[1] for basis in bases.values()])
            spans = {name: (end - bases[name].shape[1], end) for name, end in zip(bases, ends)}
            stacked = np.concatenate(list(bases.values()), axis=1)
            for unit, (run, others) in pairs.items():
                has = [i for i, other in enumerate(others) if other.run in spans]
                if run.run not in spans or not has:
                    continue
                by_kind = _similarities(stacked, spans, run, [others[i] for i in has])
                for (kind, rows), module in product(by_kind.items(), modules):
                    key = unit, module, side, kind
                    table = sums.setdefault(key, np.zeros((len(others), rows.shape[1])))
                    sizes = np.maximum(table[has, :2], rows[:, :2])
                    table[has] += rows
                    table[has, :2] = sizes
    records: dict[str, list[dict[str, Any]]] = {unit: [] for unit in pairs}
    for (unit, module, side, kind), table in sums.items():
        run, others = pairs[unit]
        of = {"layer": OVERALL, "module": module, "metric": "update_phi", "side": side}
        for other, (i, j, value, random, n) in zip(others, table.tolist()):
            have_both = all({*PAIR} <= {m.module for m in r.matrices} for r in (run, other))
            if n and (module != BOTH or have_both):
                about = {**run.fields, **of, "k": int(i), "eps": None, "directions": kind}
                about |= {"other": other.run, "other_step": other.step, "other_k": int(j)}
                means = {"value": value / n, "random": random / n, "n": int(n)}
                records[unit].append(about | means)
    return records


def _similarities(
    stacked: np.ndarray,
    spans: Mapping[str, tuple[int, int]],
    run: Directions,
    others: Sequence[Directions],
) -> dict[str, np.ndarray]:
    """A row for each other run: the numbers i and j of directions, phi(i, j), random, 1; by kind.

    phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j), in [0, 1] (Hu et al., arXiv 2106.09685, section 7);
    of random subspaces of a d-dimensional space max(i, j) / d. `stacked` is (d, all columns).
    """
    first, last = spans[run.run]
    starts, ends = np.array([spans[other.run] for other in others]).T
    begin = starts.min()
    products = stacked[:, first:last].T @ stacked[:, begin : ends.max()]
    squares = np.square(products, out=products)
    size, sizes = last - first, ends - starts
    fewer = np.minimum(size, sizes)
    is_dense = np.array([other.is_dense for other in others])
    leading = np.minimum(fewer, LEADING)
    compared = {
        "all": (
            np.where(run.is_dense & ~is_dense, fewer, size),
            np.where(is_dense & (not run.is_dense), fewer, sizes),
        ),
        "leading": (leading, leading),
    }
    rows = {}
    for kind, (i, j) in compared.items():
        edges = np.stack([starts, starts + j], axis=1).ravel() - begin
        lines = {n: np.append(squares[:n].sum(axis=0), 0.0) for n in np.unique(i)}
        sums = {n: np.add.reduceat(line, edges)[::2] for n, line in lines.items()}
        phi = np.array([sums[n][position] for position, n in enumerate(i)]) / np.minimum(i, j)
        rows[kind] = np.stack([i, j, phi, np.maximum(i, j) / len(stacked), np.ones(len(i))], axis=1)
    return rows
