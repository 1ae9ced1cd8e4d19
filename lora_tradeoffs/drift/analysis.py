"""One checkpoint's drift: every matrix of it against the base, its records, and its tables.

Beside the records of a checkpoint lie, for the figures and for other questions: `layers/` (every
row of every matrix, Parquet), `spectra/` (singular values and largest cosines), `similarities/`
(cosines between leading vectors of base and tuned matrix) and, of a run's last checkpoint,
`directions/` (the update's singular vectors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from config import INTRUDER_EPSILON, INTRUDER_K, RANKS, TARGET_MODULES, UserError
from lora_tradeoffs.drift.matrix import (
    Asked,
    BaseSpectra,
    MatrixDrift,
    aggregate,
    measure,
    whole_model,
)
from lora_tradeoffs.files import check_whole, weights_key, written_whole
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.models.weights import Matrix, Weights, model_tensors, read_checkpoint

Squares = dict[str, tuple[float, float]]
Spread = Callable[[Callable[[Any], Any], list[Any]], list[Any]]


@dataclass(frozen=True)
class Drift:
    """A checkpoint's: matrix by matrix, and ||dW||_F^2 and ||W0||_F^2 of every tensor."""

    matrices: dict[Matrix, MatrixDrift]
    squares: Squares


@contextmanager
def threads(count: int) -> Iterator[Spread]:
    """A map over lists on so many threads, each with its own core for the linear algebra."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)

    def spread(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    try:
        yield spread
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class DriftAnalysis:
    """Measures checkpoints against one base."""

    def __init__(self, base: Base, asked: Asked, place: str | None, cache: Path, spread: Spread):
        """`place`: only these of TARGET_MODULES; else an adapter's own, of a dense update qv."""
        self.base, self.asked, self.place, self.spread = base, asked, place, spread
        self.weights = Weights(base.folder)
        self.spectra = BaseSpectra(self.weights, cache)
        self._base_squares: dict[str, float] = {}

    def request(self, subject: Subject) -> dict[str, Any]:
        """What makes a measurement the same one."""
        return {
            "base": self.base.digest,
            "weights": weights_key(subject.checkpoint.folder),
            "top_k": self.asked.ks,
            "epsilon": self.asked.epsilons,
            "target_modules": self.place,
            "dense": self.asked.dense,
        }

    def measure(self, subject: Subject) -> Drift:
        """Raises UserError for a checkpoint that is broken or cannot be analysed."""
        check_whole(subject.checkpoint, ".safetensors")
        checkpoint = read_checkpoint(subject.checkpoint.folder, self.weights)
        place = self.place or (None if checkpoint.is_low_rank else "qv")
        found = checkpoint.matrices
        matrices = [m for m in found if place is None or m.module in TARGET_MODULES[place]]
        if not matrices:
            raise UserError(f"{checkpoint.folder} has none of {', '.join(TARGET_MODULES[place])}")
        keep = max(RANKS) if subject.is_last else 0
        asked = Asked(self.asked.ks, self.asked.epsilons, self.asked.dense, keep)
        drifts = self._each(
            matrices, lambda m: m.label, lambda m: measure(checkpoint, m, self.spectra, asked)
        )
        if not checkpoint.is_low_rank:
            return Drift(drifts, self._each(checkpoint.tensors, str, checkpoint.squares))
        if len(matrices) < len(found):
            return Drift(drifts, {})  # the others would count as unmoved
        if not self._base_squares:
            stored = model_tensors(self.weights)
            self._base_squares = self._each(
                list(stored), str, lambda name: self.weights.square(stored[name])
            )
        moved = {matrix.tensor: drift.squares[0] for matrix, drift in drifts.items()}
        return Drift(drifts, {n: (moved.get(n, 0.0), s) for n, s in self._base_squares.items()})

    def _each(
        self, items: list, label: Callable[[Any], str], compute: Callable[[Any], Any]
    ) -> dict:
        """What `compute` gives for each item, on the threads; a ValueError names its item."""

        def named(item: Any) -> Any:
            try:
                return compute(item)
            except ValueError as error:
                raise UserError(f"{label(item)}: {error}") from None

        return dict(zip(items, self.spread(named, items)))


# ------------------------------------------------------------------------------ what is kept


def unit_of(subject: Subject) -> str:
    return f"{subject.run}-{subject.step}"


def is_done(results: Results, subject: Subject, request: dict[str, Any]) -> bool:
    """Whether records and tables are there, just as they are asked for now."""
    files = _tables(results.folder, subject)
    return all(p.is_file() for p in files) and results.is_done(unit_of(subject), request)


def write(results: Results, subject: Subject, request: dict[str, Any], drift: Drift) -> None:
    """Write the tables, then the records, so that a record without tables cannot be."""
    layers, spectra, similarities, *directions = _tables(results.folder, subject)
    _write_table(layers, _layer_table(drift))
    _write_table(spectra, _spectrum_table(drift))
    shown = {m.name: d.similarity.half() for m, d in drift.matrices.items()}
    _save_tensors(similarities, shown, {})
    for path in directions:
        vectors = {
            f"{matrix.name}.{side}": basis.float()
            for matrix, d in drift.matrices.items()
            for side, basis in zip(("left", "right"), d.directions)
            if basis.shape[1]
        }
        _save_tensors(path, vectors, {"fields": json.dumps(common_fields(subject))})
    results.write(unit_of(subject), request, records_of(subject, drift))


def _tables(folder: Path, subject: Subject) -> list[Path]:
    unit = unit_of(subject)
    tables = [folder / "layers" / f"{unit}.parquet", folder / "spectra" / f"{unit}.parquet"]
    tables.append(folder / "similarities" / f"{unit}.safetensors")
    if subject.is_last:
        tables.append(folder / "directions" / f"{unit}.safetensors")
    return tables


def _layer_table(drift: Drift) -> pd.DataFrame:
    """Every row of every matrix: layer, module, decomposition (see Triplets.method), metric, k,
    eps, side, value."""
    rows = [
        {"layer": matrix.layer, "module": matrix.module, "decomposition": found.method, **row}
        for matrix, found in drift.matrices.items()
        for row in found.rows
    ]
    table = pd.DataFrame(rows)
    table["k"] = table["k"].astype("Int32")
    return table.astype({"eps": float, "value": float})


def _spectrum_table(drift: Drift) -> pd.DataFrame:
    """Singular values by matrix and index, from 1: base, tuned, update; max_cosine of u_j."""
    parts = []
    for matrix, d in drift.matrices.items():
        columns = {
            "base": d.base_values,
            "tuned": d.tuned_values,
            "update": d.update_values,
            "max_cosine": d.max_cosines,
        }
        columns = {name: pd.Series(c.float().numpy()) for name, c in columns.items()}
        part = pd.DataFrame(columns).assign(layer=matrix.layer, module=matrix.module)
        parts.append(part.assign(index=part.index + 1))
    return pd.concat(parts, ignore_index=True)


def _save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with written_whole(path) as temporary:
        table.to_parquet(temporary)


# ---------------------------------------------------------------------------------- records


def records_of(subject: Subject, drift: Drift) -> list[dict[str, Any]]:
    """Flat records: over the layers (layer -1) at every k and, of the published k, every epsilon;
    of each layer at the published ones alone. The whole grid is in `layers/`."""
    common = common_fields(subject)
    rows = [
        row
        for row in aggregate(drift.matrices)
        if row["k"] in (None, INTRUDER_K) or row["eps"] in (None, INTRUDER_EPSILON)
    ]
    rows += whole_model(drift.squares) if drift.squares else []
    records = [{**common, "layer": -1, **row} for row in rows]
    for matrix, found in drift.matrices.items():
        own = {**common, "layer": matrix.layer, "module": matrix.module, "n": 1}
        own["decomposition"] = found.method
        records += [
            {**own, **row}
            for row in found.rows
            if row["k"] in (None, INTRUDER_K) and row["eps"] in (None, INTRUDER_EPSILON)
        ]
    return records


def common_fields(subject: Subject) -> dict[str, Any]:
    """What all records of a checkpoint say; drift is of no task and no split."""
    own = {"run": subject.run, "family": subject.family or "", "step": subject.step}
    return {**subject.fields, **own, "split": "", "task": ""}


def join_layers(folder: Path) -> Path:
    """Write all checkpoints' rows into one table, `<folder>/drift_layers.parquet`; its path."""
    parts = []
    for path in sorted((folder / "layers").glob("*.parquet")):
        run, _, step = path.stem.rpartition("-")
        parts.append(pd.read_parquet(path).assign(run=run, step=int(step)))
    path = folder / "drift_layers.parquet"
    if parts:
        table = pd.concat(parts, ignore_index=True)
        for name in ("run", "module", "decomposition", "metric", "side"):
            table[name] = table[name].astype("category")
        _write_table(path, table)
    return path
