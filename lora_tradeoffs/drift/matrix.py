"""The drift of one tuned matrix from its base, and the aggregates over a checkpoint's matrices.

A measurement is a flat row: metric, k, eps, side, value. k is the number of leading triplets, eps
the threshold of intruder dimensions, side the singular vectors that are compared, left or right.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from config import TARGET_MODULES
from lora_tradeoffs.drift.measures import (
    effective_rank,
    intruders,
    legacy_drift,
    max_cosines,
    rank90,
    relative_frobenius,
    relative_spectral,
    stable_rank,
    threshold_ratio,
    value_shift,
)
from lora_tradeoffs.drift.solver import Triplets, top_triplets_dense, top_triplets_lora
from lora_tradeoffs.drift.svd import SVD, cached_svd, lora_update_svd, singular_values, svd

if TYPE_CHECKING:
    from lora_tradeoffs.models.adapters import Adapter, MergedAdapter
    from lora_tradeoffs.models.weights import FullCheckpoint, Matrix, Weights

SHOWN = 64  # leading vectors of base and tuned matrix whose cosines are stored for the figure
NEGLIGIBLE = 1e-10  # singular values of an update below this share of the first are rounding
SVD_MEMORY = 1 << 29  # bytes of the base's decompositions that stay in memory
PAIR = TARGET_MODULES["qv"]
SIZE_MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "relative_frobenius": relative_frobenius,
    "relative_spectral": relative_spectral,
    "stable_rank": lambda update, base: stable_rank(update),
    "effective_rank": lambda update, base: effective_rank(update),
    "rank90": lambda update, base: rank90(update),
}
AGGREGATION = {
    "relative_frobenius": "sqrt(sum ||dW||_F^2 / sum ||W0||_F^2) over the matrices",
    "residual": "the largest of the matrices",
    "all others": "the mean over the matrices",
    "module both": "q_proj and v_proj of all layers",
    "module all": "every tensor of the model: matrices, embeddings, norms",
}


@dataclass(frozen=True)
class DriftSettings:
    """What is measured of every matrix."""

    ks: tuple[int, ...]
    epsilons: tuple[float, ...]
    dense: bool = False  # the reference path: a dense SVD of every tuned matrix
    directions: int = 0  # how many of a dense update's singular vectors to return


@dataclass(frozen=True)
class MatrixDrift:
    """One matrix: its rows, and what else the figures need."""

    rows: list[dict[str, Any]]
    squares: tuple[float, float]  # ||dW||_F^2 and ||W0||_F^2
    base_values: torch.Tensor
    tuned_values: torch.Tensor  # (k,)
    update_values: torch.Tensor
    max_cosines: torch.Tensor  # (k,)
    similarity: torch.Tensor  # |<u0_i, u_j>|, at most SHOWN x SHOWN
    directions: tuple[torch.Tensor, torch.Tensor]  # U (m, r) and V (n, r) of the update
    method: str


class BaseSpectra:
    """The decompositions of the base's matrices, on the device that all matrices are measured on.

    They are cached on disk and, up to a limit, in memory.
    """

    def __init__(self, weights: Weights, folder: Path, device: str = "cpu") -> None:
        self.weights, self.folder, self.device = weights, folder, device
        self._in_memory: dict[str, SVD] = {}
        self._bytes_left, self._lock = SVD_MEMORY, threading.Lock()

    def svd(self, matrix: Matrix) -> SVD:
        """W0 = U0 S0 V0^T. Raises ValueError if W0 is not finite."""
        if matrix.tensor in self._in_memory:
            return self._in_memory[matrix.tensor]
        try:
            weight = self.weights.tensor(matrix.tensor).to(self.device)
            base = cached_svd(weight, self.folder)
        except ValueError as error:
            raise ValueError(f"in the base, {error}") from None
        size = 8 * sum(factor.numel() for factor in (base.U, base.S, base.Vh))
        with self._lock:
            if size <= self._bytes_left:
                self._bytes_left -= size
                self._in_memory[matrix.tensor] = base
        return base


def measure(
    checkpoint: Adapter | MergedAdapter | FullCheckpoint,
    matrix: Matrix,
    spectra: BaseSpectra,
    settings: DriftSettings,
) -> MatrixDrift:
    """One matrix of a checkpoint; the result is on the CPU.

    Raises ValueError for values that are not finite.
    """
    base = spectra.svd(matrix)
    k = max((k for k in settings.ks if k <= len(base.S)), default=len(base.S))
    if checkpoint.is_low_rank and not settings.dense:
        A, B, scale = checkpoint.factors(matrix)
        A, B = A.to(base.S), B.to(base.S)  # in fp64, on the device
        update = lora_update_svd(A, B, scale)
        return _drift(base, update, top_triplets_lora(base, A, B, scale, k), settings, update.S)
    start = spectra.weights.tensor(matrix.tensor).to(base.S)
    if checkpoint.is_low_rank:
        A, B, scale = checkpoint.factors(matrix)
        change, rank = scale * B.to(base.S) @ A.to(base.S), len(A)
        weight, directions = start + change, min(rank, *change.shape)
    else:
        weight, directions = checkpoint.weight(matrix).to(base.S), settings.directions
        change = weight - start
    triplets = top_triplets_dense(base, weight, k, iterate=not settings.dense)
    update, values = _update(change, directions)
    return _drift(base, update, triplets, settings, values)


def _update(change: torch.Tensor, directions: int) -> tuple[SVD, torch.Tensor]:
    """The leading triplets of a dense update, so many as `directions`; all singular values."""
    if directions:
        full = svd(change)
        leading = SVD(full.U[:, :directions], full.S[:directions], full.Vh[:directions])
        return leading, full.S
    values = singular_values(change)
    m, n = change.shape
    return SVD(change.new_zeros(m, 0), values[:0], change.new_zeros(0, n)), values


def _drift(
    base: SVD, update: SVD, tuned: Triplets, settings: DriftSettings, update_values: torch.Tensor
) -> MatrixDrift:
    rows = [_row(name, size(update_values, base.S)) for name, size in SIZE_MEASURES.items()]
    rows.append(_row("residual", tuned.residual))
    maxima = max_cosines(tuned.cosines)
    for k in (k for k in settings.ks if k <= len(tuned.values)):
        rows += _leading_rows(base, tuned, update_values, k)
        rows += [_row("intruders", intruders(maxima, k, e), k, e) for e in settings.epsilons]
    strong = int((NEGLIGIBLE * update.S.max() < update.S).sum()) if len(update.S) else 0
    # copies: a slice would keep the whole tensor, or its mapped file, alive
    copy = partial(torch.Tensor.to, device="cpu", copy=True)
    return MatrixDrift(
        rows,
        (float(update_values.square().sum()), float(base.S.square().sum())),
        copy(base.S),
        copy(tuned.values),
        update_values.cpu(),
        maxima.cpu(),
        tuned.cosines[:SHOWN, :SHOWN].abs().cpu(),
        (copy(update.U[:, :strong]), copy(update.Vh[:strong].T)),
        tuned.method,
    )


def _leading_rows(
    base: SVD, tuned: Triplets, update_values: torch.Tensor, k: int
) -> list[dict[str, Any]]:
    """The rows about the k leading triplets, in coordinates in which U0 and V0 are identities."""
    left = tuned.left[:, :k]
    unit = torch.eye(len(left), k, dtype=left.dtype, device=left.device)
    return [
        _row("rho", threshold_ratio(update_values, base.S, k), k),
        _row("phi", _overlap(tuned.cosines, k), k, side="left"),
        _row("phi", _overlap(tuned.right_cosines, k), k, side="right"),
        _row("value_shift", value_shift(tuned.values[:k], base.S), k),
        _row("legacy_drift", legacy_drift(left, unit), k, side="left"),
    ]


def _overlap(cosines: torch.Tensor, k: int) -> float:
    """phi(k, k) of the leading vectors with the base's: 1 if the subspace did not move."""
    return float(cosines[:k, :k].square().sum() / k)


def _row(
    metric: str, value: float, k: int | None = None, eps: float | None = None, side: str = ""
) -> dict[str, Any]:
    return {"metric": metric, "k": k, "eps": eps, "side": side, "value": value}


# ----------------------------------------------------------------------------- all matrices


def aggregate(drifts: dict[Matrix, MatrixDrift]) -> list[dict[str, Any]]:
    """Rows over the layers, with `module` and the number n of matrices; see AGGREGATION.

    Module "both" is q_proj and v_proj, if the checkpoint has both of them.
    """
    modules = sorted({matrix.module for matrix in drifts})
    groups = {name: [m for m in drifts if m.module == name] for name in modules}
    if set(PAIR) <= set(modules):
        groups["both"] = [m for m in drifts if m.module in PAIR]
    rows = []
    for module, matrices in groups.items():
        values: dict[tuple, list[float]] = {}
        for matrix in matrices:
            for row in drifts[matrix].rows:
                key = row["metric"], row["k"], row["eps"], row["side"]
                values.setdefault(key, []).append(row["value"])
        squares = [drifts[matrix].squares for matrix in matrices]
        for key, by_matrix in values.items():
            if len(by_matrix) == len(matrices):  # some matrices may be smaller than k
                row = _row(key[0], _aggregate(key[0], by_matrix, squares), *key[1:])
                rows.append({**row, "module": module, "n": len(by_matrix)})
    return rows


def _aggregate(metric: str, values: list[float], squares: list[tuple[float, float]]) -> float:
    if metric == "relative_frobenius":
        return relative_norm(squares)
    return max(values) if metric == "residual" else sum(values) / len(values)


def relative_norm(squares: Iterable[tuple[float, float]]) -> float:
    """||dW||_F / ||W0||_F over several tensors, from ||dW||_F^2 and ||W0||_F^2 of each."""
    update, base = (sum(part) for part in zip(*squares))
    if update == 0:
        return 0.0
    return math.sqrt(update / base) if base else math.inf


def whole_model(squares: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows over all tensors: the model's relative norm and each module's share of ||dW||_F^2.

    Comparing only q_proj and v_proj would understate how far full fine-tuning moves.
    """
    groups: dict[str, list[float]] = {"both": []}
    for name, (update, _) in squares.items():
        module = _tensor_group(name)
        groups.setdefault(module, []).append(update)
        if module in PAIR:
            groups["both"].append(update)
    total = sum(update for update, _ in squares.values())
    whole = _row("relative_frobenius", relative_norm(squares.values()))
    rows = [{**whole, "module": "all", "n": len(squares)}]
    moved = {module: u for module, u in groups.items() if any(u) or module == "both"}
    for module, updates in moved.items():
        share = _row("update_share", sum(updates) / total if total else 0.0)
        rows.append({**share, "module": module, "n": len(updates)})
    return rows


def _tensor_group(tensor: str) -> str:
    """q_proj ... down_proj, embed_tokens, lm_head, norms, or biases."""
    name, _, parameter = tensor.rpartition(".")
    module = name.rpartition(".")[2]
    if parameter == "bias":
        return "biases"
    return "norms" if "norm" in module else module
