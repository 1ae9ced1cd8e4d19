"""Drift as an analysis: which checkpoints and matrices are measured, how, and what is written."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from config import INTRUDER_EPSILON, INTRUDER_K, RANKS, TARGET_MODULES, UserError
from lora_tradeoffs.drift.tables import (
    CheckpointDrift,
    join_layers,
    layers_file,
    records_of,
    table_files,
    write_tables,
)
from lora_tradeoffs.hardware import usable_cores
from lora_tradeoffs.measuring.loop import Analysis
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.weights import (
    EMBEDDING,
    HEAD,
    FullCheckpoint,
    Matrix,
    Weights,
    stored_names,
)
from lora_tradeoffs.records import unit_name
from lora_tradeoffs.tables.scores import drift_table

if TYPE_CHECKING:
    from lora_tradeoffs.drift.matrix import BaseSpectra, MatrixDrift
    from lora_tradeoffs.drift.shrinking import Directions
    from lora_tradeoffs.models.adapters import Adapter, MergedAdapter

TOP_K = (4, 8, 16, 32, 64, 128, 256)
EPSILONS = tuple(i / 10 for i in range(1, 10))
MOST_WORKERS = 8  # each holds a decomposition of the base and some copies of a matrix


@dataclass(frozen=True)
class DriftOptions:
    """What svd_analysis.py measures. Its flags have these names and defaults."""

    top_k: tuple[int, ...] | None = None  # None: TOP_K, as far as the base's matrices allow
    epsilon: tuple[float, ...] = EPSILONS
    target_modules: str | None = None  # None: those of an adapter, else qv
    dense: bool = False
    workers: int | None = None  # None: the number of cores, at most MOST_WORKERS
    all_pairs: bool = False  # compare the updates of runs of different families, too

    def __post_init__(self) -> None:
        if self.top_k is not None and min(self.top_k) < 1:
            raise UserError("--top-k must be 1 or more")
        if not all(0 < epsilon <= 1 for epsilon in self.epsilon):
            raise UserError("--epsilon must be above 0 and at most 1")
        if self.workers is not None and self.workers < 1:
            raise UserError("--workers must be 1 or more")


@dataclass(frozen=True)
class DriftUnit:
    """One measurement: a checkpoint against the base."""

    subject: Subject

    @property
    def name(self) -> str:
        return unit_name(self.subject.run, self.subject.step)


class DriftAnalysis(Analysis):
    """Measures the drift of checkpoints from the base."""

    name, progress_unit = "drift", "checkpoint"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.methods: Counter[str] = Counter()  # how the decompositions were computed
        self._base_squares: dict[str, float] = {}  # ||W0||_F^2 of every tensor

    def units(self, subjects: Sequence[Subject]) -> list[DriftUnit]:
        return [DriftUnit(subject) for subject in subjects if subject.checkpoint]

    def request(self, unit: DriftUnit) -> dict[str, Any]:
        return {
            "top_k": self.ks,
            "epsilon": self.epsilons,
            "target_modules": self.options.target_modules,
            "dense": self.options.dense,
        }

    def before_models(self, units: list[DriftUnit]) -> None:
        _ = self.ks  # refuses a --top-k that is too large before anything is measured

    @functools.cached_property
    def ks(self) -> tuple[int, ...]:
        """The numbers of leading triplets, the published one included.

        Raises UserError for a number from the user that is larger than every matrix of the base.
        """
        sizes = [min(self.weights.shapes[m.tensor]) for m in self.weights.matrices()]
        largest = max(sizes, default=0)
        top_k = self.options.top_k
        if top_k and max(top_k) > largest:
            raise UserError(f"--top-k {max(top_k)}: the base's matrices have {largest} at most")
        return tuple(sorted(k for k in {INTRUDER_K, *(top_k or TOP_K)} if k <= largest))

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The thresholds of intruder dimensions, the published one included."""
        return tuple(sorted({INTRUDER_EPSILON, *self.options.epsilon}))

    def measure(self, model: Any, unit: DriftUnit, batch_tokens: int = 0) -> CheckpointDrift:
        """The drift of an opened checkpoint (see models.adapters); no model is built.

        Raises UserError for values that are not finite, and if no matrix is to be measured.
        """
        from lora_tradeoffs.drift.matrix import DriftSettings, measure

        directions = max(RANKS) if unit.subject.is_last else 0
        settings = DriftSettings(self.ks, self.epsilons, self.options.dense, directions)
        matrices = self._matrices(model)

        def measured(matrix: Matrix) -> MatrixDrift:
            return measure(model, matrix, self.spectra, settings)

        with self._threads(self.device) as pool:
            drifts = _by_item(pool, measured, matrices)
        with self._threads() as pool:
            squares = self._squares(model, drifts, pool)
        self.methods.update(drift.method for drift in drifts.values())
        return CheckpointDrift(drifts, squares, model.is_low_rank)

    def directions(self, checkpoint: Any) -> dict[str, Directions]:
        """The intruders of every matrix that is measured, and their control, by its module's name.

        Raises UserError as `measure` does.
        """
        from lora_tradeoffs.drift.shrinking import directions

        def of_matrix(matrix: Matrix) -> Directions:
            return directions(checkpoint, matrix, self.spectra)

        with self._threads(self.device) as pool:
            by_matrix = _by_item(pool, of_matrix, self._matrices(checkpoint))
        return {matrix.name: of for matrix, of in by_matrix.items()}

    def _squares(
        self,
        checkpoint: Adapter | MergedAdapter | FullCheckpoint,
        drifts: dict[Matrix, MatrixDrift],
        pool: ThreadPoolExecutor,
    ) -> dict[str, tuple[float, float]]:
        """||dW||_F^2 and ||W0||_F^2 of every tensor; empty if not all of an update is measured."""
        if not checkpoint.is_low_rank:
            return _by_item(pool, checkpoint.squares, checkpoint.tensors)
        if len(drifts) < len(checkpoint.matrices):
            return {}
        if not self._base_squares:
            names = stored_names(self.weights)
            self._base_squares = _by_item(
                pool, lambda tensor: self.weights.square(names[tensor]), list(names)
            )
        moved = {matrix.tensor: drift.squares[0] for matrix, drift in drifts.items()}
        moved |= checkpoint.squares_outside()
        bases = dict(self._base_squares)
        if HEAD in moved:
            bases.setdefault(HEAD, bases[EMBEDDING])  # a tied head that LoRA makes another
        return {name: (moved.get(name, 0.0), base) for name, base in bases.items()}

    def _matrices(self, checkpoint: Adapter | MergedAdapter | FullCheckpoint) -> list[Matrix]:
        """The matrices to measure. Raises UserError if the checkpoint has none of them."""
        is_full = isinstance(checkpoint, FullCheckpoint)
        target_modules = self.options.target_modules or (is_full and "qv")
        modules = TARGET_MODULES[target_modules] if target_modules else ()
        matrices = [m for m in checkpoint.matrices if not modules or m.module in modules]
        if not matrices:
            what = ", ".join(modules) or "the layers' matrices: there is no spectrum to measure"
            raise UserError(f"{checkpoint.folder} has none of {what}")
        return matrices

    @functools.cached_property
    def weights(self) -> Weights:
        return Weights(self.base.folder)

    @functools.cached_property
    def spectra(self) -> BaseSpectra:
        from lora_tradeoffs.drift.matrix import BaseSpectra

        folder = self.results.folder.parent / "base" / self.base.name
        return BaseSpectra(self.weights, folder, self.device)

    @functools.cached_property
    def device(self) -> str:
        from lora_tradeoffs.hardware import pick_device

        return pick_device(fp64=True)

    def _threads(self, device: str = "cpu") -> AbstractContextManager[ThreadPoolExecutor]:
        """A pool for work on a device: a GPU gets one thread, which keeps it busy, since threads
        that call torch.linalg there for the first time together can fail."""
        workers = self.options.workers or min(MOST_WORKERS, usable_cores())
        return worker_threads(1 if device == "cuda" else workers)

    # ------------------------------------------------------------------------------ on disk

    def is_done(self, unit: DriftUnit) -> bool:
        tables = table_files(self.results.folder, unit.subject)
        return all(path.is_file() for path in tables) and super().is_done(unit)

    def write(self, unit: DriftUnit, result: CheckpointDrift, batch_tokens: int = 0) -> None:
        """Write the tables, then the records, so that no record lacks its tables."""
        write_tables(self.results.folder, unit.subject, result)
        self.results.write(unit.name, self.full_request(unit), records_of(unit.subject, result))

    def derived_records(self) -> Iterable[dict[str, Any]]:
        """How similar the runs' updates are; the layers of all checkpoints are joined, too."""
        from lora_tradeoffs.drift.subspaces import records_between

        join_layers(self.results.folder)
        return records_between(self.results.folder, self.options.all_pairs)

    def meta(self) -> dict[str, Any]:
        from lora_tradeoffs.drift.matrix import AGGREGATION

        return {**super().meta(), "aggregation": AGGREGATION}

    def table(self, records: Iterable[dict[str, Any]]) -> str:
        return drift_table(records)

    def outputs(self) -> dict[str, Any]:
        counts = ", ".join(f"{count} {method}" for method, count in sorted(self.methods.items()))
        methods = {f"{self.methods.total()} decompositions": counts} if counts else {}
        return {**methods, "all layers, k and epsilons": layers_file(self.results.folder)}


# --------------------------------------------------------------------------------- threads


@contextmanager
def worker_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads, each of which uses one core for linear algebra."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _by_item(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: list[Any]
) -> dict[Any, Any]:
    """The function's value for each item; a ValueError becomes a UserError that names the item."""

    def labelled(item: Any) -> Any:
        try:
            return function(item)
        except ValueError as error:
            raise UserError(f"{item}: {error}") from None

    return dict(zip(items, pool.map(labelled, items)))
