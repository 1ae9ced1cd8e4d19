"""What is measured of one tuned matrix against its base, and of a checkpoint's matrices together.

A measurement is a flat row: metric, k, eps, side, value. k is the number of leading triplets that
it is about, eps the threshold of intruder dimensions, side which singular vectors it compares.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_tradeoffs.drift.solver import Triplets, top_triplets_dense, top_triplets_lora
from lora_tradeoffs.drift.svd import (
    SVD,
    cached_svd,
    effective_rank,
    intruder_counts,
    legacy_drift,
    lora_update_svd,
    max_cosines,
    rank90,
    relative_frobenius,
    relative_spectral,
    singular_values,
    stable_rank,
    svd,
    threshold_ratio,
    value_shift,
)

if TYPE_CHECKING:
    from lora_tradeoffs.models.weights import Adapter, FullCheckpoint, Matrix, Weights

SHOWN = 64  # leading vectors of base and tuned matrix whose cosines are kept for the figure
NEGLIGIBLE = 1e-10  # a singular value of an update below this share of the first is rounding
PAIR = ("q_proj", "v_proj")
SIZES: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
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
class Asked:
    """What is asked of every matrix; `dense` is the reference path."""

    ks: tuple[int, ...]
    epsilons: tuple[float, ...]
    dense: bool = False
    directions: int = 0  # of a dense update's singular vectors, how many are kept


@dataclass(frozen=True)
class MatrixDrift:
    """One matrix: its rows, and what the figures need beside them."""

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
    """The decompositions of the base's matrices: kept on disk, and in memory as far as `room`."""

    def __init__(self, weights: Weights, folder: Path, room: int = 1 << 29) -> None:
        self.weights, self.folder = weights, folder
        self._kept: dict[str, SVD] = {}
        self._room, self._lock = room, threading.Lock()

    def of(self, matrix: Matrix) -> SVD:
        """W0 = U0 S0 V0^T. Raises ValueError if W0 is not finite."""
        if matrix.tensor in self._kept:
            return self._kept[matrix.tensor]
        try:
            found = cached_svd(self.weights.tensor(matrix.tensor), self.folder)
        except ValueError as error:
            raise ValueError(f"of the base, {error}") from None
        size = 8 * sum(part.numel() for part in (found.U, found.S, found.Vh))
        with self._lock:
            if size <= self._room:
                self._room -= size
                self._kept[matrix.tensor] = found
        return found


def measure(
    checkpoint: Adapter | FullCheckpoint, matrix: Matrix, spectra: BaseSpectra, asked: Asked
) -> MatrixDrift:
    """One matrix of a checkpoint. Raises ValueError for values that are not finite."""
    base = spectra.of(matrix)
    k = max((k for k in asked.ks if k <= len(base.S)), default=len(base.S))
    if checkpoint.is_low_rank and not asked.dense:
        A, B, scale = checkpoint.factors(matrix)
        update = lora_update_svd(A, B, scale)
        return _drift(base, update, top_triplets_lora(base, A, B, scale, k), asked, update.S)
    start = spectra.weights.tensor(matrix.tensor).double()
    if checkpoint.is_low_rank:
        A, B, scale = checkpoint.factors(matrix)
        change, rank = scale * B.double() @ A.double(), len(A)
        weight, kept = start + change, min(rank, *change.shape)
    else:
        weight, kept = checkpoint.weight(matrix).double(), asked.directions
        change = weight - start
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds values that are not finite")
    triplets = dense_triplets(base, weight, k) if asked.dense else None
    triplets = triplets or top_triplets_dense(base, weight, k)
    update, values = _update(change, kept)
    return _drift(base, update, triplets, asked, values)


def _update(change: torch.Tensor, kept: int) -> tuple[SVD, torch.Tensor]:
    """The leading `kept` triplets of a dense update, and all of its singular values."""
    if kept:
        whole = svd(change)
        return SVD(whole.U[:, :kept], whole.S[:kept], whole.Vh[:kept]), whole.S
    values = singular_values(change)
    m, n = change.shape
    return SVD(change.new_zeros(m, 0), values[:0], change.new_zeros(0, n)), values


def dense_triplets(base: SVD, weight: torch.Tensor, k: int) -> Triplets:
    """The k leading triplets of W by a dense decomposition: the reference of `--dense`.

    Their residual is measured; the vectors' distance from the true ones is not bounded.
    """
    tuned = svd(weight)
    left, right = tuned.U[:, :k], tuned.Vh[:k].T
    cosines, right_cosines = base.U.T @ left, base.Vh @ right
    outside = [
        vectors - basis @ inside if len(vectors) > len(inside) else inside[:0]
        for vectors, basis, inside in ((left, base.U, cosines), (right, base.Vh.T, right_cosines))
    ]
    values = tuned.S[:k]
    parts = weight @ right - left * values, weight.T @ left - right * values
    largest = float(torch.cat(parts).norm(dim=0).max())
    residual = largest / float(values[0]) if largest else 0.0
    return Triplets(values, cosines, right_cosines, *outside, residual, math.inf, "dense")


def _drift(
    base: SVD, update: SVD, tuned: Triplets, asked: Asked, update_values: torch.Tensor
) -> MatrixDrift:
    rows = [_row(name, size(update_values, base.S)) for name, size in SIZES.items()]
    rows.append(_row("residual", tuned.residual))
    maxima = max_cosines(tuned.cosines)
    for k in (k for k in asked.ks if k <= len(tuned.values)):
        rows += _leading_rows(base, tuned, update_values, k)
        counts = intruder_counts(maxima, [k], asked.epsilons)[0].tolist()
        rows += [_row("intruders", n, k, eps) for n, eps in zip(counts, asked.epsilons)]
    strong = int((NEGLIGIBLE * update.S.max() < update.S).sum()) if len(update.S) else 0
    # copies, since a part would keep the whole alive, be it in memory or a mapped file
    return MatrixDrift(
        rows,
        (float(update_values.square().sum()), float(base.S.square().sum())),
        base.S.clone(),
        tuned.values.clone(),
        update_values,
        maxima,
        tuned.cosines[:SHOWN, :SHOWN].abs(),
        (update.U[:, :strong].clone(), update.Vh[:strong].T.clone()),
        tuned.method,
    )


def _leading_rows(
    base: SVD, tuned: Triplets, update_values: torch.Tensor, k: int
) -> list[dict[str, Any]]:
    """What is said of the k leading triplets; in the base's coordinates U0 and V0 are e_1 ..."""
    left = tuned.left[:, :k]
    unit = torch.eye(len(left), k, dtype=left.dtype)
    return [
        _row("rho", threshold_ratio(update_values, base.S, k), k),
        _row("phi", _kept_share(tuned.cosines, k), k, side="left"),
        _row("phi", _kept_share(tuned.right_cosines, k), k, side="right"),
        _row("value_shift", value_shift(tuned.values[:k], base.S), k),
        _row("legacy_drift", legacy_drift(left, unit), k, side="left"),
    ]


def _kept_share(cosines: torch.Tensor, k: int) -> float:
    """phi(k, k) of the leading vectors with the base's: 1 where the subspace stayed."""
    return float(cosines[:k, :k].square().sum() / k)


def _row(
    metric: str, value: float, k: int | None = None, eps: float | None = None, side: str = ""
) -> dict[str, Any]:
    return {"metric": metric, "k": k, "eps": eps, "side": side, "value": value}


# ----------------------------------------------------------------------------- all matrices


def aggregate(drifts: dict[Matrix, MatrixDrift]) -> list[dict[str, Any]]:
    """Rows over the layers, with `module` and the number n of matrices; see AGGREGATION.

    "both" stands for q_proj and v_proj, where the checkpoint has them, whatever else it has.
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
        for key, found in values.items():
            if len(found) == len(matrices):  # k may be larger than some of them
                value = _joined(key[0], found, squares)
                rows.append({**_row(key[0], value, *key[1:]), "module": module, "n": len(found)})
    return rows


def _joined(metric: str, values: list[float], squares: list[tuple[float, float]]) -> float:
    if metric == "relative_frobenius":
        return relative_norm(squares)
    return max(values) if metric == "residual" else sum(values) / len(values)


def relative_norm(squares: Iterable[tuple[float, float]]) -> float:
    """||dW||_F / ||W0||_F of tensors that are taken as one, from the squares of each."""
    update, base = (sum(part) for part in zip(*squares))
    if update == 0:
        return 0.0
    return math.sqrt(update / base) if base else math.inf


def whole_model(squares: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Of the norms of all tensors: that of the model, and the share of ||dW||_F^2 by module.

    Measured only where LoRA may move, drift would flatter full fine-tuning.
    """
    groups: dict[str, list[float]] = {"both": []}
    for name, (update, _) in squares.items():
        module = _kind(name)
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


def _kind(tensor: str) -> str:
    """q_proj ... down_proj, embed_tokens, lm_head, norms, or biases."""
    name, _, part = tensor.rpartition(".")
    module = name.rpartition(".")[2]
    if part == "bias":
        return "biases"
    return "norms" if "norm" in module else module
