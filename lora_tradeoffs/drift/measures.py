"""The measures of drift: size and spectrum of an update, intruder dimensions, subspace similarity.

Pure functions of tensors. m x n is a weight's shape, p = min(m, n), k a number of leading singular
triplets. Measures that compare singular vectors take them in any orthonormal coordinates that both
sides share.
"""

from __future__ import annotations

import math

import torch

# ------------------------------------------------------------- size and spectrum of an update


def relative_frobenius(update_values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||dW||_F / ||W0||_F, from all singular values of both."""
    return _ratio(update_values.norm(), base_values.norm())


def relative_spectral(update_values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||dW||_2 / ||W0||_2, from the singular values of both; the largest is enough."""
    return _ratio(_largest(update_values), _largest(base_values))


def stable_rank(values: torch.Tensor) -> float:
    """||dW||_F^2 / ||dW||_2^2, from all singular values; 0 for a zero matrix."""
    return _ratio(values.norm(), _largest(values)) ** 2


def effective_rank(values: torch.Tensor) -> float:
    """exp(-sum p ln p), p = sigma / sum sigma (Roy and Vetterli 2007); 0 for a zero matrix."""
    if not _largest(values) > 0:
        return 0.0
    shares = values.double() / values.double().sum()
    return float(torch.special.entr(shares).sum().exp())


def rank90(values: torch.Tensor, mass: float = 0.9) -> int:
    """The fewest triplets that hold 90 % of ||dW||_F^2 (Biderman et al., arXiv 2405.09673).

    `values`, shape (p,), descend; 0 for a zero matrix.
    """
    if not _largest(values) > 0:
        return 0
    cumulative = values.double().square().cumsum(0)
    # a share of exactly 90 % counts as reached, whatever the last bit of the sum
    return int((cumulative < mass * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def value_shift(values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||sigma(W) - sigma(W0)|| / ||sigma(W0)|| over the leading len(values) singular values."""
    base_values = base_values[: len(values)]
    return _ratio((values - base_values).norm(), base_values.norm())


def threshold_ratio(update_values: torch.Tensor, base_values: torch.Tensor, k: int) -> float:
    """rho = sigma_1(dW) / sigma_k(W0), k from 1. From about 1 on, an intruder is among the k.

    arXiv 2607.23711; `update_values` are those of the scaled update. Infinite if sigma_k(W0) = 0.
    """
    if not 1 <= k <= len(base_values):
        raise ValueError(f"k = {k}, but the matrix has {len(base_values)} singular values")
    return _ratio(_largest(update_values), base_values[k - 1])


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.max() if len(values) else values.new_zeros(())


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> float:
    """0 if the numerator is 0, whatever the denominator; else infinite if that is 0."""
    numerator, denominator = float(numerator), float(denominator)
    if numerator == 0:
        return 0.0
    return numerator / denominator if denominator > 0 else math.inf


# ------------------------------------------------------------------------- intruder dimensions


def max_cosines(cosines: torch.Tensor) -> torch.Tensor:
    """max over all i of |<u_j, u0_i>|, shape (k,), from `cosines` = U0^T U, shape (p, k)."""
    return cosines.abs().amax(0)


def intruders(max_cosines: torch.Tensor, k: int = 10, epsilon: float = 0.5) -> int:
    """Number of intruder dimensions among the k leading left singular vectors of the tuned matrix.

    u_j is one iff max_i |<u_j, u0_i>| < epsilon over **all** i (Shuttleworth et al., arXiv
    2410.21228). `max_cosines`, shape (k or more,), come from the function of that name. Raises
    ValueError if there are fewer than k.
    """
    if not 1 <= k <= len(max_cosines):
        raise ValueError(f"k = {k}, but {len(max_cosines)} singular vectors are known")
    return int((max_cosines[:k].double() < epsilon).sum())


# ---------------------------------------------------------------------------------- subspaces


def subspace_similarities(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """phi(a, b) of the leading a columns of `first` and b of `second`, at [a - 1, b - 1].

    phi(a, b) = ||U_a^T V_b||_F^2 / min(a, b), in [0, 1] (Hu et al., arXiv 2106.09685, section 7).
    `first` (d, i) and `second` (d, j) have orthonormal columns: left singular vectors for the left
    side, right ones for the right. Random subspaces have `random_similarity(a, b, d)`. Raises
    ValueError if a side has no column.
    """
    if not first.shape[1] or not second.shape[1]:
        raise ValueError("a subspace without a direction has no similarity")
    squares = (first.double().T @ second.double()).square().cumsum(0).cumsum(1)
    sizes = [torch.arange(1, n + 1, device=squares.device) for n in squares.shape]
    return squares / torch.minimum(sizes[0][:, None], sizes[1])


def random_similarity(i: int, j: int, d: int) -> float:
    """The mean of phi(i, j) over random subspaces of a d-dimensional space: max(i, j) / d."""
    return max(i, j) / d


def legacy_drift(vectors: torch.Tensor, base_vectors: torch.Tensor) -> float:
    """||U - U0||_F / (||U||_F + ||U0||_F), after aligning each column's sign with its partner's.

    A published measure, reported for comparison only. Without the signs an unchanged matrix could
    score 0.56; with them it still calls two vectors that swapped ranks far apart. Both (d, k).
    """
    signs = torch.where((vectors * base_vectors).sum(0) < 0, -1.0, 1.0).to(vectors.dtype)
    return _ratio((vectors * signs - base_vectors).norm(), vectors.norm() + base_vectors.norm())
