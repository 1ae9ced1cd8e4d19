"""The drift of one checkpoint: every matrix against the base, its records and its tables.

Four tables are written beside a checkpoint's records: `layers/` (every row of every matrix,
Parquet), `spectra/` (singular values and largest cosines), `similarities/` (cosines between leading
vectors of base and tuned matrix) and, for a run's last checkpoint, `directions/` (the update's
singular vectors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from config import INTRUDER_EPSILON, INTRUDER_K, RANKS, TARGET_MODULES, UserError
from lora_tradeoffs.drift.matrix import (
    BaseSpectra,
    DriftSettings,
    MatrixDrift,
    aggregate,
    measure,
    whole_model,
)
from lora_tradeoffs.files import check_whole, weights_key, written_whole
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.models.weights import (
    Adapter,
    FullCheckpoint,
    Matrix,
    Weights,
    model_tensors,
    read_checkpoint,
)
from lora_tradeoffs.records import unit_name

ParallelMap = Callable[[Callable[[Any], Any], list[Any]], list[Any]]


@dataclass(frozen=True)
class CheckpointDrift:
    """The drift of every matrix, and ||dW||_F^2 and ||W0||_F^2 of every tensor."""

    matrices: dict[Matrix, MatrixDrift]
    squares: dict[str, tuple[float, float]]


@contextmanager
def worker_threads(count: int) -> Iterator[ParallelMap]:
    """A map over lists on `count` threads, each of which uses one core for linear algebra."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(count)

    def parallel_map(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    try:
        yield parallel_map
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


class DriftAnalysis:
    """Measures checkpoints against one base."""

    def __init__(
        self,
        base: Base,
        settings: DriftSettings,
        target_modules: str | None,
        cache: Path,
        parallel_map: ParallelMap,
    ):
        """`target_modules`, a key of TARGET_MODULES; None: those of an adapter, else qv."""
        self.base, self.settings, self.target_modules = base, settings, target_modules
        self.parallel_map = parallel_map
        self.weights = Weights(base.folder)
        self.spectra = BaseSpectra(self.weights, cache)
        self._base_squares: dict[str, float] = {}

    def request(self, subject: Subject) -> dict[str, Any]:
        """What a stored measurement must have in common with this one to be reused."""
        return {
            "base": self.base.digest,
            "weights": weights_key(subject.checkpoint.folder),
            "top_k": self.settings.ks,
            "epsilon": self.settings.epsilons,
            "target_modules": self.target_modules,
            "dense": self.settings.dense,
        }

    def measure(self, subject: Subject) -> CheckpointDrift:
        """Raises UserError for a checkpoint that is broken or cannot be analysed."""
        check_whole(subject.checkpoint, ".safetensors")
        checkpoint = read_checkpoint(subject.checkpoint.folder, self.weights)
        matrices = self._matrices(checkpoint)
        settings = replace(self.settings, directions=max(RANKS) if subject.is_last else 0)
        drifts = self._each(
            matrices, lambda m: m.label, lambda m: measure(checkpoint, m, self.spectra, settings)
        )
        if not checkpoint.is_low_rank:
            return CheckpointDrift(drifts, self._each(checkpoint.tensors, str, checkpoint.squares))
        if len(matrices) < len(checkpoint.matrices):
            return CheckpointDrift(drifts, {})  # the other matrices would count as unmoved
        if not self._base_squares:
            stored = model_tensors(self.weights)
            self._base_squares = self._each(
                list(stored), str, lambda name: self.weights.square(stored[name])
            )
        moved = {matrix.tensor: drift.squares[0] for matrix, drift in drifts.items()}
        squares = {n: (moved.get(n, 0.0), s) for n, s in self._base_squares.items()}
        return CheckpointDrift(drifts, squares)

    def _matrices(self, checkpoint: Adapter | FullCheckpoint) -> list[Matrix]:
        """The matrices to measure. Raises UserError if the checkpoint has none of them."""
        target_modules = self.target_modules or (None if checkpoint.is_low_rank else "qv")
        if target_modules is None:
            return checkpoint.matrices
        modules = TARGET_MODULES[target_modules]
        matrices = [matrix for matrix in checkpoint.matrices if matrix.module in modules]
        if not matrices:
            raise UserError(f"{checkpoint.folder} has none of {', '.join(modules)}")
        return matrices

    def _each(
        self, items: list, label: Callable[[Any], str], compute: Callable[[Any], Any]
    ) -> dict:
        """`compute` of each item, on the threads; a ValueError becomes a UserError with a label."""

        def named(item: Any) -> Any:
            try:
                return compute(item)
            except ValueError as error:
                raise UserError(f"{label(item)}: {error}") from None

        return dict(zip(items, self.parallel_map(named, items)))


# ------------------------------------------------------------------------- records and tables


def unit_of(subject: Subject) -> str:
    return unit_name(subject.run, subject.step)


def is_done(results: Results, subject: Subject, request: dict[str, Any]) -> bool:
    """Whether records and tables of this very measurement exist."""
    files = _tables(results.folder, subject)
    return all(p.is_file() for p in files) and results.is_done(unit_of(subject), request)


def write(
    results: Results, subject: Subject, request: dict[str, Any], drift: CheckpointDrift
) -> None:
    """Write the tables, then the records, so that no record lacks its tables."""
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


def _layer_table(drift: CheckpointDrift) -> pd.DataFrame:
    """Every row of every matrix: layer, module, decomposition (see Triplets.method), metric, k,
    eps, side, value."""
    rows = [
        {"layer": matrix.layer, "module": matrix.module, "decomposition": d.method, **row}
        for matrix, d in drift.matrices.items()
        for row in d.rows
    ]
    table = pd.DataFrame(rows)
    table["k"] = table["k"].astype("Int32")
    return table.astype({"eps": float, "value": float})


def _spectrum_table(drift: CheckpointDrift) -> pd.DataFrame:
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


def records_of(subject: Subject, drift: CheckpointDrift) -> list[dict[str, Any]]:
    """Flat records. Over the layers (layer -1): every k, and every epsilon at the published k. Of
    each layer: the published k and epsilon alone. The whole grid is in `layers/`."""
    common = common_fields(subject)
    rows = [
        row
        for row in aggregate(drift.matrices)
        if row["k"] in (None, INTRUDER_K) or row["eps"] in (None, INTRUDER_EPSILON)
    ]
    rows += whole_model(drift.squares) if drift.squares else []
    records = [{**common, "layer": -1, **row} for row in rows]
    for matrix, d in drift.matrices.items():
        about = {"layer": matrix.layer, "module": matrix.module, "n": 1, "decomposition": d.method}
        records += [
            {**common, **about, **row}
            for row in d.rows
            if row["k"] in (None, INTRUDER_K) and row["eps"] in (None, INTRUDER_EPSILON)
        ]
    return records


def common_fields(subject: Subject) -> dict[str, Any]:
    """The columns that all records of a checkpoint share; drift has no task and no split."""
    about = {"run": subject.run, "family": subject.family or "", "step": subject.step}
    return {**subject.fields, **about, "split": "", "task": ""}


def join_layers(folder: Path) -> Path:
    """Join the rows of all checkpoints in `<folder>/drift_layers.parquet`; its path."""
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
