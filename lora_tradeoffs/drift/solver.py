"""The leading singular triplets of W = W0 + dW without a dense decomposition of W.

The solver works in the coordinates of the base's decomposition W0 = U0 diag(S0) V0^T, computed
once. There M = U0^T W V0 is diag(S0) plus the update: of low rank for LoRA, small for a short full
fine-tuning. The left singular vectors of M *are* the cosines between W's and W0's.

The search space holds the first coordinate vectors e_1 ... e_K and a few directions of the
remaining coordinates, the tail. The Rayleigh-Ritz procedure gives the best triplets in it. As the
space holds e_1 ... e_K, their residuals lie in the tail, where M is close to diag(S0) and S0 is
below the wanted singular values. So (sigma^2 - S0^2)^-1 times the residual is nearly the missing
part (the generalised Davidson method, Morgan and Scott 1986), and it is added to the space. Three
to six rounds are enough.

Every result is checked: `_errors` bounds the distance of every vector from the true one, `_missed`
says whether a triplet may have been overlooked. If a check fails, or if the iteration is not
expected to be faster (`_pays`), a dense decomposition is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lora_tradeoffs.drift.coordinates import NOISE, PROBES, Dense, LowRank, product, random_block
from lora_tradeoffs.drift.svd import SVD, finite, lora_factors, thin_svd

# Bound of a vector's distance from the true one, so of the error of every cosine. The error of the
# singular values is its square.
TOLERANCE = 1e-6
IMPROVED = TOLERANCE / 8  # larger errors are corrected: a few more directions save a last round
GUARD = 16  # triplets after the k-th whose residuals are computed in every round
SAME = 1e-9  # relative: values that differ by less count as equal
DROP = 1e-3  # of the largest error, about what a round gains: weaker directions can wait
ABANDON = 0.6  # of min(m, n): a larger search space costs more than a dense decomposition


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets of W, m x n, in the base's coordinates; p = min(m, n).

    `values` (k,); `cosines` (p, k) = U0^T U and `right_cosines` (p, k) = V0^T V, signed;
    `left_outside` (m, k) and `right_outside` (n, k) are the parts of U and V outside the spans of
    U0 and V0, without rows where these span the whole space (m <= n, n <= m). `residual` is the
    largest (||W v - sigma u||^2 + ||W^T u - sigma v||^2)^1/2 / sigma_1; `error` bounds the distance
    of any returned vector from the true one. `method` is `unchanged`, `iterative`, `dense`, or
    `dense after iterative` if the iteration failed its checks.
    """

    values: torch.Tensor
    cosines: torch.Tensor
    right_cosines: torch.Tensor
    left_outside: torch.Tensor
    right_outside: torch.Tensor
    residual: float
    error: float
    method: str

    @property
    def left(self) -> torch.Tensor:
        """U in orthonormal coordinates in which U0 is the identity's first columns."""
        return torch.cat([self.cosines, self.left_outside])


def top_triplets_lora(
    base: SVD, A: torch.Tensor, B: torch.Tensor, scale: float, k: int
) -> Triplets:
    """The k leading singular triplets of W0 + scale * B A; A is (r, n), B (m, r).

    A product with M costs O((m + n) r). Raises ValueError for NaN or infinity, shapes that do not
    fit, and a k that is not in 1 ... min(m, n).
    """
    A, B = lora_factors(A, B, scale)
    if (B.shape[0], A.shape[1]) != base.shape:
        raise ValueError(f"an update of {B.shape[0]} x {A.shape[1]} for {_size(base)}")
    _check_k(base, k)
    return _top_triplets(LowRank(base, A, B, scale), k)


def top_triplets_dense(base: SVD, weight: torch.Tensor, k: int, iterate: bool = True) -> Triplets:
    """The k leading singular triplets of a tuned weight of the base's shape, m x n.

    Without `iterate` they come from a dense decomposition, the reference for the iteration.

    Raises ValueError for NaN or infinity, another shape, and a k that is not in 1 ... min(m, n).
    Random probes check that no triplet was overlooked; this is no proof. A direction of the update
    may be missed if it touches none of the leading ones and its singular value is only a few per
    cent above the others outside the search space.
    """
    if tuple(weight.shape) != base.shape:
        raise ValueError(f"a weight of {tuple(weight.shape)} for {_size(base)}")
    _check_k(base, k)
    matrix = Dense(base, finite(weight))
    return _top_triplets(matrix, k) if iterate else _densely(matrix, k, "dense")


def _size(base: SVD) -> str:
    return "a base of {} x {}".format(*base.shape)


def _check_k(base: SVD, k: int) -> None:
    if not 1 <= k <= len(base.S):
        raise ValueError(f"k = {k}, but {_size(base)} has {len(base.S)} singular values")


# ------------------------------------------------------------------------------- the iteration


class Search:
    """The search space, e_1 ... e_width and `left`, `right` in the tail, and its images.

    `images` is M times the right space, `coimages` M^T times the left space.
    """

    def __init__(self, matrix: LowRank | Dense, width: int):
        self.matrix, self.width = matrix, width
        self.images, self.coimages = matrix.unit_images(width)
        self.heads = matrix.heads(width)
        self.left, self.right = (head[:, :0] for head in self.heads)

    def extend(self, left: torch.Tensor, right: torch.Tensor, drop: float) -> None:
        """Add directions of the tail that are stronger than `drop`."""
        left = _orthonormal(left, (self.heads[0], self.left), drop)
        right = _orthonormal(right, (self.heads[1], self.right), drop)
        self.left, self.right = torch.cat([self.left, left], 1), torch.cat([self.right, right], 1)
        self.images = torch.cat([self.images, self.matrix.times(right, self.width)], 1)
        coimages = self.matrix.transposed_times(left, self.width)
        self.coimages = torch.cat([self.coimages, coimages], 1)

    @property
    def size(self) -> int:
        return self.width + max(self.left.shape[1], self.right.shape[1])

    def project(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The singular value decomposition of M restricted to the spaces: X, Ritz values, Y."""
        w = self.width
        below = torch.cat([self.coimages[:w, w:].T, self.left.T @ self.images[w:, w:]], 1)
        X, values, Yh = thin_svd(torch.cat([self.images[:w], below]))
        return X, values, Yh.T

    def ritz(self, X: torch.Tensor, values: torch.Tensor, Y: torch.Tensor) -> _Ritz:
        """Vectors and residuals of the Ritz triplets given by columns of X and Y."""
        w, leading = self.width, values[: X.shape[1]]
        u, v = product(self.left, X[w:]), product(self.right, Y[w:])
        left = product(self.images[w:], Y) - leading * u
        right = product(self.coimages[w:], X) - leading * v
        return _Ritz(values, torch.cat([X[:w], u]), torch.cat([Y[:w], v]), left, right)

    def probe(self, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """The directions outside the space that M stretches most; by how much, from below."""
        w, matrix = self.width, self.matrix
        bases = tuple(zip(self.heads, (self.left, self.right)))
        right = random_block((len(self.right), count), self.right)
        for _ in range(2):
            right = torch.linalg.qr(_outside(right, *bases[1]))[0]
            left = torch.linalg.qr(_outside(matrix.times(right, w)[w:], *bases[0]))[0]
            right = matrix.transposed_times(left, w)[w:]
        right = _outside(right, *bases[1])
        norm = float(torch.linalg.matrix_norm(right, 2))
        return left, right / max(norm, 1e-300), norm


@dataclass(frozen=True)
class _Ritz:
    """Values of all Ritz triplets; vectors, and tails of the residuals, of the first ones."""

    values: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    left_residuals: torch.Tensor
    right_residuals: torch.Tensor

    @property
    def residuals(self) -> torch.Tensor:
        return (self.left_residuals.square().sum(0) + self.right_residuals.square().sum(0)).sqrt()


def _orthonormal(
    block: torch.Tensor, bases: tuple[torch.Tensor, torch.Tensor], drop: float
) -> torch.Tensor:
    """An orthonormal basis of the block's span outside `bases`, down to the strength `drop`."""
    block = _outside(block, *bases)
    # a Gram matrix has half the digits, which is enough to choose directions
    strengths, mixes = torch.linalg.eigh(block.T @ block)
    strong = strengths > (1e-15 * strengths[-1:]).clamp(min=drop**2)
    block = block @ (mixes[:, strong] / strengths[strong].sqrt())
    return torch.linalg.qr(_outside(block, *bases))[0]


def _outside(block: torch.Tensor, *bases: torch.Tensor) -> torch.Tensor:
    """The part of the block orthogonal to the bases, which are orthonormal, also to each other."""
    for basis in bases:
        block = block - product(basis, product(basis.T, block))
    return block


def _errors(ritz: _Ritz, k: int, ceiling: float) -> torch.Tensor:
    """Bounds, shape (k,), of the distance of each Ritz vector from the true singular vector.

    In the symmetric form [[0, M], [M^T, 0]] a Ritz vector with residual r misses, outside the
    search space, at most |r| / delta, where delta is the distance of its value from `ceiling`, the
    norm of M there. Inside, it is mixed with the Ritz vector i, whose residual is r_i, by at most
    |r| |r_i| / (delta gap_i), so close singular values matter only to second order. This is a bound
    if the residuals of all Ritz vectors are known, else nearly one.
    """
    all_residuals = ritz.residuals / 2**0.5
    residuals, values = all_residuals[:k], ritz.values[:k]
    delta = (values - ceiling).clamp(min=0)
    mixing = all_residuals / (values[:, None] - ritz.values[: len(all_residuals)])
    mixing.diagonal().zero_()
    mixing = mixing.nan_to_num(0, posinf=math.inf, neginf=math.inf)  # 0 / 0: nothing mixes
    errors = 2**0.5 * residuals / delta * (1 + mixing.norm(dim=1))
    # residuals at the level of rounding cannot be improved; repeated values have no unique vectors
    return torch.where(residuals <= NOISE * ritz.values[0], NOISE, errors)


def _span_update(search: Search, value: float) -> float:
    """Add a LoRA update's directions to the search space; the norm of M outside it.

    With the tails of P and Q in the space, M outside it is S0's tail alone.
    """
    matrix, width = search.matrix, search.width
    tails = matrix.P[width:], matrix.Q[width:]
    search.extend(*(t / t.norm().clamp(min=1e-300) for t in tails), drop=1e-9)
    return float(matrix.S[width])


def _probe(search: Search, value: float) -> float:
    """Probe outside the search space for directions as strong as `value`; the norm of M there.

    The norm is estimated from below, by subspace iteration on random vectors. Strong directions
    are added to the space, and the rest is probed again.
    """
    tail = float(search.matrix.S[search.width])
    for _ in range(4):
        left, right, norm = search.probe(PROBES)
        ceiling = 1.01 * max(norm, tail)
        if norm < max(0.9 * value, 1.05 * tail):
            break
        search.extend(left, right, drop=1e-9)
    return ceiling


def _iterate(matrix: LowRank | Dense, k: int, width: int) -> tuple[_Ritz, float] | None:
    """The Ritz triplets and their largest error; None if it does not reach the tolerance."""
    search = Search(matrix, width)
    prepare = _span_update if isinstance(matrix, LowRank) else _probe
    ceiling = prepare(search, float(matrix.S[k - 1]))
    previous, slow = math.inf, 0
    while search.size < ABANDON * len(matrix.S) and slow < 3:
        X, values, Y = search.project()
        ritz = search.ritz(X[:, : k + GUARD], values, Y[:, : k + GUARD])
        errors = _errors(ritz, k, ceiling)
        if float(errors.max()) <= TOLERANCE:
            ritz = search.ritz(X[:, : len(values)], values, Y[:, : len(values)])
            errors = _errors(ritz, k, ceiling)
        worst = float(errors.max())
        doubtful = _doubtful(ritz, k, ceiling)
        if worst <= TOLERANCE and not _missed(matrix, ritz, k, doubtful, ceiling):
            return ritz, worst
        slow += worst > previous / 2
        previous = worst
        _expand(search, ritz, errors, doubtful)
    return None


def _doubtful(ritz: _Ritz, k: int, ceiling: float) -> torch.Tensor:
    """Indices of the Ritz triplets after the k-th that could overtake it once converged."""
    values, residuals = ritz.values[k : k + GUARD], ritz.residuals[k : k + GUARD] / 2**0.5
    gain = torch.minimum(residuals, residuals.square() / (values - ceiling).clamp(min=0))
    return k + (values + gain > ritz.values[k - 1] * (1 + SAME)).nonzero()[:, 0]


def _missed(
    matrix: LowRank | Dense, ritz: _Ritz, k: int, doubtful: torch.Tensor, ceiling: float
) -> bool:
    """Whether M may have a singular value above the k-th Ritz value that is not among the k."""
    last, following = float(ritz.values[k - 1]), float(ritz.values[k])
    if last <= 0 or (count := matrix.count_above((last + following) / 2)) is None:
        # even if the vectors have no residual, one outside the space may have a larger value
        return last <= ceiling or len(doubtful) > 0
    # the value after the k-th may be estimated too small, or equal the k-th
    level = last * (1 + SAME)
    return count != k and matrix.count_above(level) > int((ritz.values[:k] > level).sum())


def _expand(search: Search, ritz: _Ritz, errors: torch.Tensor, doubtful: torch.Tensor) -> None:
    """Add what inaccurate and doubtful vectors miss, each direction as strong as the error."""
    inaccurate = torch.cat([(errors > IMPROVED).nonzero()[:, 0], doubtful])
    residuals = ritz.left_residuals[:, inaccurate], ritz.right_residuals[:, inaccurate]
    missing = search.matrix.corrections(ritz.values[inaccurate], *residuals, search.width)
    size = (missing[0].square().sum(0) + missing[1].square().sum(0)).sqrt()
    strengths = errors.clamp(IMPROVED, 1)
    worst = strengths.max()
    weights = torch.cat([strengths, worst.expand(GUARD)])[inaccurate] / size
    # the least strength is above the drop, so every round adds a direction
    search.extend(
        *(block * weights for block in missing), drop=max(DROP * float(worst), TOLERANCE / 30)
    )


# ----------------------------------------------------------------------------- the choice


def _width(S: torch.Tensor, k: int) -> int:
    """Length of the head: where S is a tenth below the k-th value, but at most about 2 k."""
    above = len(S) - int((0.9 * S[k - 1] >= S).sum())
    return max(k + GUARD, min(above, 2 * (k + GUARD)))


def _pays(matrix: LowRank | Dense, k: int, width: int) -> bool:
    """Whether the search space should stay small enough to be faster than a dense decomposition.

    Measured for p = 192 to 2048, ranks 1 to 64, k up to p / 2 and updates of 1 and 10 % of the
    base's norm: both take equally long at a space of p / 2, a little less where p is small.
    """
    return width + matrix.growth(k, width) <= 0.5 * len(matrix.S) - 70


def _top_triplets(matrix: LowRank | Dense, k: int) -> Triplets:
    if matrix.unchanged():
        return _unchanged(matrix, k)
    width = _width(matrix.S, k)
    if width >= len(matrix.S) or not _pays(matrix, k, width):
        return _densely(matrix, k, "dense")
    converged = _iterate(matrix, k, width)
    if converged is None:
        return _densely(matrix, k, "dense after iterative")
    ritz, error = converged
    residual = float(ritz.residuals[:k].max() / ritz.values[0])
    parts = matrix.in_base(ritz.left[:, :k], ritz.right[:, :k], width)
    return Triplets(ritz.values[:k], *parts, residual, error, "iterative")


def _unchanged(matrix: LowRank | Dense, k: int) -> Triplets:
    """The base's triplets, exactly."""
    units = torch.eye(k, dtype=matrix.S.dtype, device=matrix.S.device)
    vectors = [torch.cat([units, units.new_zeros((len(h), k))]) for h in matrix.heads(k)]
    return Triplets(matrix.S[:k], *matrix.in_base(*vectors, k), 0.0, 0.0, "unchanged")


def _densely(matrix: LowRank | Dense, k: int, method: str) -> Triplets:
    """The triplets of a dense decomposition; the residual is that of up to 16 of them."""
    left, values, right = matrix.decompose(k)
    sample = torch.linspace(0, k - 1, min(k, 16)).round().long()
    residuals = torch.cat(
        [
            matrix.times(right[:, sample], 0) - values[sample] * left[:, sample],
            matrix.transposed_times(left[:, sample], 0) - values[sample] * right[:, sample],
        ]
    )
    worst = float(residuals.norm(dim=0).max())
    gaps = -values[: k + 1].diff()
    smallest = float(gaps.min()) if len(gaps) else float(values[0])
    error = worst / smallest if smallest > 0 else math.inf
    residual = worst / float(values[0]) if float(values[0]) else 0.0
    return Triplets(values[:k], *matrix.in_base(left, right, 0), residual, error, method)
