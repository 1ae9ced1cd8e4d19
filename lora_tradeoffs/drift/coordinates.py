"""The tuned matrix W = W0 + dW in the coordinates of W0 = U0 diag(S0) V0^T: M = U0^T W V0.

`LowRank` holds a LoRA update, `Dense` any tuned weight. On both sides a vector is a head and a
tail. The head is its first `width` coordinates in the base's singular vectors, where W0 is
diag(S0); the tail is what is orthogonal to those. `LowRank` keeps the tail as the base's other
coordinates, followed by those of what is outside the span of U0 (m > n) or V0 (n > m). `Dense`
keeps it as a vector of the weight's space, since a change of coordinates would cost as much as a
product with the weight. p = min(m, n).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from lora_tradeoffs.drift.svd import SVD, thin_svd

PROBES = 16  # random vectors with which a dense update is probed
NOISE = 1e-13  # relative to the norm: the residual that a dense fp64 decomposition leaves


class LowRank:
    """diag(S0) + P Q^T, P (rows, r), Q (columns, r).

    Where m > n, U0 does not span all of B: the part outside gets an orthonormal basis, whose
    coordinates follow the first p; likewise on the right.
    """

    def __init__(self, base: SVD, A: torch.Tensor, B: torch.Tensor, scale: float):
        self.S = base.S
        self.P, self.left_basis = _coordinates(base.U, scale * B)
        self.Q, self.right_basis = _coordinates(base.Vh.T, A.T)
        self.rows, self.columns = len(self.P), len(self.Q)

    def unchanged(self) -> bool:
        """Whether the update is zero."""
        return float(self.P.norm() * self.Q.norm()) == 0

    def growth(self, k: int, width: int) -> float:
        """How many directions the search will add to its space; a fit to measurements."""
        r = self.P.shape[1]
        return r + min(2 * k, 10 + 9 * r)

    def heads(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What tails must stay orthogonal to: nothing, they have no coordinates in the head."""
        return self.P.new_zeros((self.rows - width, 0)), self.P.new_zeros((self.columns - width, 0))

    def times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M x for x (columns - width, b), a tail."""
        return _plus_diagonal(self.S, tail, width, self.P @ (self.Q[width:].T @ tail))

    def transposed_times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M^T x for x (rows - width, b), a tail."""
        return _plus_diagonal(self.S, tail, width, self.Q @ (self.P[width:].T @ tail))

    def unit_images(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """M and M^T times e_1 ... e_width."""
        images, coimages = self.P @ self.Q[:width].T, self.Q @ self.P[:width].T
        for product in (images, coimages):
            product.diagonal().add_(self.S[:width])
        return images, coimages

    def count_above(self, value: float) -> int:
        """How many singular values of M are above `value`, exactly, by Sylvester's inertia.

        M M^T = D D^T + Z C Z^T with Z = [P, D Q] and C = [[Q^T Q, 1], [1, 0]]; the inertia of
        M M^T - value^2 is that of its diagonal part plus that of a 2r x 2r Schur complement.
        """
        r, p = self.P.shape[1], len(self.S)
        balance = (self.Q.norm() / self.P.norm()).sqrt()
        P, Q = self.P * (balance / value**0.5), self.Q / (balance * value**0.5)
        D = self.S / value
        lifted = torch.zeros_like(P)
        lifted[:p] = D[:, None] * Q[:p]
        Z = torch.cat([P, lifted], 1)
        poles = 1 - D.square()
        poles[poles.abs() < 1e-12] = 1e-12  # a level at a value of S is taken as just above it
        weights = torch.ones(self.rows, dtype=Z.dtype, device=Z.device)
        weights[:p] = 1 / poles
        schur = Z.T @ (weights[:, None] * Z)
        schur[r:, r:] += Q.T @ Q
        schur[:r, r:].diagonal().sub_(1)
        schur[r:, :r].diagonal().sub_(1)
        positive = int((torch.linalg.eigvalsh(schur) > 0).sum())
        return int((poles < 0).sum()) + positive - r

    def decompose(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A dense SVD of M: the k leading columns of U and V in coordinates, and p values."""
        matrix = self.P @ self.Q.T
        matrix.diagonal()[: len(self.S)].add_(self.S)
        left, values, right = thin_svd(matrix)
        return left[:, :k], values[: len(self.S)], right[:k].T

    def corrections(
        self, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, width: int
    ) -> list[torch.Tensor]:
        """What triplets with these values and residuals miss in the tail, if M were S0 there."""
        t = len(self.S) - width
        inside = _solve(self.S[width:], values, left[:t], right[:t])
        return [torch.cat([a, r[t:] / values]) for a, r in zip(inside, (left, right))]

    def in_base(self, left: torch.Tensor, right: torch.Tensor, width: int) -> list[torch.Tensor]:
        """U0^T and V0^T times the vectors, and the parts outside the spans of U0 and V0."""
        p = len(self.S)
        outside = [self.left_basis @ left[p:], self.right_basis @ right[p:]]
        return [left[:p], right[:p], *outside]


def _coordinates(basis: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`factor` (d, r) in coordinates; the basis (d, extra) of the coordinates after the first p."""
    d, p = basis.shape
    inside = basis.T @ factor
    if d == p:
        return inside, factor.new_zeros((0, 0))
    extra, core = torch.linalg.qr(factor - basis @ inside)
    return torch.cat([inside, core]), extra


def _plus_diagonal(S: torch.Tensor, tail: torch.Tensor, width: int, product: torch.Tensor):
    """product + diag(S0) x, for a tail x."""
    product[width : len(S)] += S[width:, None] * tail[: len(S) - width]
    return product


def _solve(
    S: torch.Tensor, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> list[torch.Tensor]:
    """a, b with sigma a - S b = left and sigma b - S a = right, column by column; S (t,)."""
    squares = values.square()
    inverse = 1 / (squares - S.square()[:, None]).clamp(min=1e-6 * squares)
    pairs = ((left, right), (right, left))
    return [(values * first + S[:, None] * second) * inverse for first, second in pairs]


class Dense:
    """A tuned weight W; U0^T W V0 is never formed."""

    def __init__(self, base: SVD, weight: torch.Tensor):
        self.base, self.S, self.weight = base, base.S, weight
        # ||W - W0||_F, estimated with 8 random vectors
        probes = random_block((base.shape[1], 8), weight)
        untuned = product(base.U, base.S[:, None] * product(base.Vh, probes))
        change = product(weight, probes) - untuned
        self.distance = float(change.norm()) / 8**0.5

    @cached_property
    def single(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U0 and V0^T in fp32."""
        return self.base.U.float(), self.base.Vh.float()

    def unchanged(self) -> bool:
        """Whether W is W0 up to rounding."""
        return self.distance <= NOISE * float(self.S.norm())

    def growth(self, k: int, width: int) -> float:
        """How many directions the search will add to its space; a fit to measurements.

        A round divides the errors by about (3 + 4 x) / x, where x is the norm of an update without
        structure over the distance of the wanted singular values from the tail's.
        """
        gap = float(self.S[k - 1] - self.S[width])
        x = 2 * self.distance / len(self.S) ** 0.5 / max(gap, 1e-300)
        return PROBES + 0.8 * k * 7 / math.log10((3 + 4 * x) / x)

    def heads(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What tails must stay orthogonal to, (m, width) and (n, width)."""
        return self.base.U[:, :width], self.base.Vh[:width].T

    def times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M x for x (n, b), a tail: the result's head, then its tail."""
        return _split(self.base.U[:, :width], product(self.weight, tail))

    def transposed_times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M^T x for x (m, b), a tail."""
        return _split(self.base.Vh[:width].T, product(self.weight.T, tail))

    def unit_images(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """M and M^T times e_1 ... e_width."""
        left, right = self.heads(width)
        return self.times(right, width), self.transposed_times(left, width)

    def count_above(self, value: float) -> int | None:
        """None: unknown without a decomposition."""
        return None

    def decompose(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A dense SVD of W: the k leading columns of U and V, tails of width 0, and p values."""
        left, values, right = thin_svd(self.weight)
        return left[:, :k], values, right[:k].T

    def corrections(
        self, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, width: int
    ) -> list[torch.Tensor]:
        """What triplets with these values and residuals miss in the tail, if M were S0 there.

        Computed in fp32, which is enough: the result only extends the search space.
        """
        bases = self.single[0][:, width:], self.single[1][width:].T
        residuals = [left.float(), right.float()]
        coordinates = [product(b.T, r) for b, r in zip(bases, residuals)]
        values = values.float()
        inside = _solve(self.S[width:].float(), values, *coordinates)
        # outside the spans of U0 and V0, S0 is zero
        missing = [
            product(b, a - c / values) + r / values
            for b, a, c, r in zip(bases, inside, coordinates, residuals)
        ]
        return [vectors.to(left.dtype) for vectors in missing]

    def in_base(self, left: torch.Tensor, right: torch.Tensor, width: int) -> list[torch.Tensor]:
        """U0^T and V0^T times the vectors, and the parts outside the spans of U0 and V0."""
        cosines, outside = [], []
        for basis, vectors in ((self.base.U, left), (self.base.Vh.T, right)):
            tail, basis = vectors[width:], basis[:, width:]
            inside = product(basis.T, tail)
            cosines.append(torch.cat([vectors[:width], inside]))
            square = len(basis) == len(self.S)
            outside.append(tail[:0] if square else tail - product(basis, inside))
        return cosines + outside


def _split(head: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of the weight's space as coordinates in `head`, then their part orthogonal to it."""
    inside = product(head.T, vectors)
    return torch.cat([inside, vectors - product(head, inside)])


def product(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix @ columns; in this order up to five times as fast on CPUs for a few columns."""
    return (columns.T @ matrix.T).T


def random_block(shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers, the same in every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
