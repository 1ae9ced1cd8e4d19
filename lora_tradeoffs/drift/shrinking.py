"""Intruder dimensions made smaller: the causal test of Shuttleworth et al. (arXiv 2410.21228).

W + (lambda - 1) sum sigma u v^T, over the intruders among W's singular triplets, has the singular
vectors of W, and lambda sigma for the intruders' sigma. Its control shrinks as many directions that
are no intruders, of singular values as near to theirs as there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from config import INTRUDER_EPSILON, INTRUDER_K
from lora_tradeoffs.drift.measures import max_cosines
from lora_tradeoffs.drift.solver import Triplets, top_triplets_dense, top_triplets_lora
from lora_tradeoffs.records import CONTROL, INTRUDERS

if TYPE_CHECKING:
    from lora_tradeoffs.drift.matrix import BaseSpectra
    from lora_tradeoffs.drift.svd import SVD
    from lora_tradeoffs.models.adapters import Adapter, MergedAdapter
    from lora_tradeoffs.models.weights import FullCheckpoint, Matrix

LEADING = 4 * INTRUDER_K  # triplets in which the control is looked for at first


@dataclass(frozen=True)
class Directions:
    """The directions of one tuned matrix, m x n, that are shrunk: intruders, and their control.

    `values` (k,) are the leading singular values, `is_unlike` (k,) says whose left vector has a
    cosine below epsilon with each of the base's. `chosen` are indices of these, `left` (m, c) and
    `right` (n, c) their singular vectors, by what is shrunk.
    """

    values: torch.Tensor
    is_unlike: torch.Tensor
    chosen: Mapping[str, torch.Tensor]
    left: Mapping[str, torch.Tensor]
    right: Mapping[str, torch.Tensor]

    def change(self, shrunk: str, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
        """L (m, c) and R (n, c): L R^T is what shrinking by the factor adds to W."""
        sizes = (factor - 1) * self.values[self.chosen[shrunk]]
        return self.left[shrunk] * sizes, self.right[shrunk]

    def intruders(self, shrunk: str, factor: float) -> int:
        """How many of the leading INTRUDER_K directions are intruders after the shrinking."""
        values = self.values.clone()
        values[self.chosen[shrunk]] *= factor
        leading = values.argsort(descending=True, stable=True)[:INTRUDER_K]
        return int(self.is_unlike[leading].sum())


def directions(
    checkpoint: Adapter | MergedAdapter | FullCheckpoint, matrix: Matrix, spectra: BaseSpectra
) -> Directions:
    """The intruders of a checkpoint's matrix, by INTRUDER_K and INTRUDER_EPSILON, and the control.

    Raises ValueError for values that are not finite.
    """
    from scipy.optimize import linear_sum_assignment

    base, count, tuned = spectra.svd(matrix), LEADING, None
    if not checkpoint.is_low_rank:
        tuned = checkpoint.weight(matrix).to(base.S)  # in fp64, on the device
    while True:
        count = min(count, len(base.S))
        if tuned is None:
            A, B, scale = checkpoint.factors(matrix)
            triplets = top_triplets_lora(base, A.to(base.S), B.to(base.S), scale, count)
        else:
            triplets = top_triplets_dense(base, tuned, count)
        is_unlike = max_cosines(triplets.cosines) < INTRUDER_EPSILON
        intruders, others = is_unlike[:INTRUDER_K].nonzero()[:, 0], (~is_unlike).nonzero()[:, 0]
        if len(others) >= len(intruders) or count == len(base.S):
            break
        count *= 2
    distances = (triplets.values[intruders][:, None] - triplets.values[others]).abs()
    nearest = torch.as_tensor(linear_sum_assignment(distances.cpu())[1])
    chosen = {INTRUDERS: intruders, CONTROL: others[nearest]}
    vectors = {name: _vectors(base, triplets, indices) for name, indices in chosen.items()}
    left, right = ({name: pair[side] for name, pair in vectors.items()} for side in (0, 1))
    return Directions(triplets.values, is_unlike, chosen, left, right)


def _vectors(
    base: SVD, triplets: Triplets, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The left and the right singular vectors of W, out of the base's coordinates."""
    left = base.U @ triplets.cosines[:, indices]
    right = base.Vh.T @ triplets.right_cosines[:, indices]
    if len(triplets.left_outside):
        left += triplets.left_outside[:, indices]
    if len(triplets.right_outside):
        right += triplets.right_outside[:, indices]
    return left, right
