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


def legacy_drift(vectors: torch.Tensor, base_vectors: torch.Tensor) -> float:
    """||U - U0||_F / (||U||_F + ||U0||_F), after aligning each column's sign with its partner's.

    A published measure, reported for comparison only. Without the signs an unchanged matrix could
    score 0.56; with them it still calls two vectors that swapped ranks far apart. Both (d, k).
    """
    signs = torch.where((vectors * base_vectors).sum(0) < 0, -1.0, 1.0).to(vectors.dtype)
    return _ratio((vectors * signs - base_vectors).norm(), vectors.norm() + base_vectors.norm())
