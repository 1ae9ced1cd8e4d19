"""W0 + dW seen from W0 = U0 diag(S0) V0^T: products with M = U0^T W V0, in coordinates.

`LowRank` is a LoRA update, `Dense` any tuned weight. Both sides' coordinates begin with the `width`
leading ones of the base, the head, in which W0 is diag(S0). The tail is what lies orthogonal to
those: of a LoRA update the base's other coordinates, followed by those of what is outside the span
of U0 (m > n) or V0 (n > m); of a tuned weight the vector itself, as it stands in the weight's
space, since each change of coordinates would cost as much as a product with the weight.
p = min(m, n).
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from lora_tradeoffs.drift.svd import SVD, thin_svd

PROBES = 16  # random vectors with which a dense update is probed
NOISE = 1e-13  # a residual, relative to the norm, that a dense fp64 decomposition leaves, too


class LowRank:
    """diag(S0) + P Q^T, P (rows, r), Q (columns, r).

    Where m > n, U0 does not span all of B: the part outside has an orthonormal basis of its own,
    whose coordinates follow the first p; likewise on the right.
    """

    def __init__(self, base: SVD, A: torch.Tensor, B: torch.Tensor, scale: float):
        self.S = base.S
        self.P, self.left_basis = _coordinates(base.U, scale * B)
        self.Q, self.right_basis = _coordinates(base.Vh.T, A.T)
        self.rows, self.columns = len(self.P), len(self.Q)

    def unchanged(self) -> bool:
        return float(self.P.norm() * self.Q.norm()) == 0

    def growth(self, k: int, width: int) -> float:
        """Directions that the search space will need beyond its first, as measured."""
        r = self.P.shape[1]
        return r + min(2 * k, 10 + 9 * r)

    def heads(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tails have to be kept orthogonal to: nothing, they have no coordinates there."""
        return self.P.new_zeros((self.rows - width, 0)), self.P.new_zeros((self.columns - width, 0))

    def times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M x for x (columns - width, b), which begins after the first `width` coordinates."""
        return _plus_diagonal(self.S, tail, width, self.P @ (self.Q[width:].T @ tail))

    def transposed_times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
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
        poles[poles.abs() < 1e-12] = 1e-12  # exactly at a value of S: just above it
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
        """What vectors with these values and residuals miss in the tail, if M were S0 there."""
        t = len(self.S) - width
        inside = _solve(self.S[width:], values, left[:t], right[:t])
        return [torch.cat([a, r[t:] / values]) for a, r in zip(inside, (left, right))]

    def in_base(self, left: torch.Tensor, right: torch.Tensor, width: int) -> list[torch.Tensor]:
        """U0^T and V0^T times the vectors, and the parts outside the spans of U0 and V0."""
        p = len(self.S)
        outside = [self.left_basis @ left[p:], self.right_basis @ right[p:]]
        return [left[:p], right[:p], *outside]


def _coordinates(basis: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`factor` (d, r) in coordinates, and the basis (d, extra) of those beyond `basis` (d, p)."""
    d, p = basis.shape
    inside = basis.T @ factor
    if d == p:
        return inside, factor.new_zeros((0, 0))
    extra, core = torch.linalg.qr(factor - basis @ inside)
    return torch.cat([inside, core]), extra


def _plus_diagonal(S: torch.Tensor, tail: torch.Tensor, width: int, product: torch.Tensor):
    """product + diag(S0) x, for x whose first row is the coordinate `width`."""
    product[width : len(S)] += S[width:, None] * tail[: len(S) - width]
    return product


def _solve(
    S: torch.Tensor, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> list[torch.Tensor]:
    """a, b with sigma a - S b = left and sigma b - S a = right, column by column; S (t,)."""
    squares = values.square()
    inverse = 1 / (squares - S.square()[:, None]).clamp(min=1e-6 * squares)
    pairs = ((left, right), (right, left))
    return [(values * own + S[:, None] * other) * inverse for own, other in pairs]


class Dense:
    """A tuned weight W and the base's coordinates of it; U0^T W V0 is never formed."""

    def __init__(self, base: SVD, weight: torch.Tensor):
        self.base, self.S, self.weight = base, base.S, weight
        # ||W - W0||_F, as 8 random vectors show it
        probes = random_block((base.shape[1], 8), weight)
        untuned = product(base.U, base.S[:, None] * product(base.Vh, probes))
        found = product(weight, probes) - untuned
        self.distance = float(found.norm()) / 8**0.5

    @cached_property
    def single(self) -> tuple[torch.Tensor, torch.Tensor]:
        """U0 and V0^T in fp32."""
        return self.base.U.float(), self.base.Vh.float()

    def unchanged(self) -> bool:
        """Whether W is W0 up to rounding."""
        return self.distance <= NOISE * float(self.S.norm())

    def growth(self, k: int, width: int) -> float:
        """Directions that the search space will need beyond its first, as measured.

        A round divides the errors by about (3 + 4 x) / x, with x the norm of an update without
        structure over the distance of the wanted values from the tail's.
        """
        gap = float(self.S[k - 1] - self.S[width])
        x = 2 * self.distance / len(self.S) ** 0.5 / max(gap, 1e-300)
        return PROBES + 0.8 * k * 7 / math.log10((3 + 4 * x) / x)

    def heads(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the tails are orthogonal to, (m, width) and (n, width)."""
        return self.base.U[:, :width], self.base.Vh[:width].T

    def times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        """M x for x (n, b), a tail: the head's coordinates, then the tail."""
        return _split(self.base.U[:, :width], product(self.weight, tail))

    def transposed_times(self, tail: torch.Tensor, width: int) -> torch.Tensor:
        return _split(self.base.Vh[:width].T, product(self.weight.T, tail))

    def unit_images(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """M and M^T times e_1 ... e_width."""
        left, right = self.heads(width)
        return self.times(right, width), self.transposed_times(left, width)

    def count_above(self, value: float) -> int | None:
        """Not known without a decomposition."""
        return None

    def decompose(self, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A dense SVD of W: the k leading columns of U and V, tails of width 0, and p values."""
        left, values, right = thin_svd(self.weight)
        return left[:, :k], values, right[:k].T

    def corrections(
        self, values: torch.Tensor, left: torch.Tensor, right: torch.Tensor, width: int
    ) -> list[torch.Tensor]:
        """What vectors with these values and residuals miss in the tail, if M were S0 there.

        The way to the base's coordinates and back is gone in fp32: what is found only widens the
        search space.
        """
        bases = self.single[0][:, width:], self.single[1][width:].T
        residuals = [left.float(), right.float()]
        coordinates = [product(b.T, r) for b, r in zip(bases, residuals)]
        values = values.float()
        found = _solve(self.S[width:].float(), values, *coordinates)
        # outside of the spans S0 is zero
        moved = [
            product(b, a - c / values) + r / values
            for b, a, c, r in zip(bases, found, coordinates, residuals)
        ]
        return [vectors.to(left.dtype) for vectors in moved]

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
    """Vectors of the weight's space as coordinates in `head`, then what is orthogonal to it."""
    inside = product(head.T, vectors)
    return torch.cat([inside, vectors - product(head, inside)])


def product(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix @ columns, in the order in which a few columns go up to five times as fast on CPUs."""
    return (columns.T @ matrix.T).T


def random_block(shape: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Normal numbers, the same in every call and on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
