"""The linear algebra of drift: singular values and vectors of W0, of an update dW and of W0 + dW.

Pure functions, tensors in, numbers or tensors out, in fp64 whatever comes in, on the tensors'
device; only `cached_svd` touches the disk. m x n is a weight's shape, p = min(m, n). The leading
singular triplets of W0 + dW are found in spectral_solver.py; measures that compare singular vectors
take them in any orthonormal coordinates that both sides share.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_tradeoffs.files import written_whole

CACHE_FORMAT = "1"


@dataclass(frozen=True)
class SVD:
    """U diag(S) Vh in fp64: U (m, p) and Vh (p, n) orthonormal, S (p,) falling."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.U.shape[0], self.Vh.shape[1]


def finite(tensor: torch.Tensor, what: str = "the matrix") -> torch.Tensor:
    """The tensor in fp64. Raises ValueError if it holds a NaN or an infinity."""
    tensor = tensor.detach().double()
    # a sum is one pass without a temporary; only where it overflows is each entry looked at
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"{what} holds values that are not finite")
    return tensor


def svd(weight: torch.Tensor) -> SVD:
    """The thin singular value decomposition, in fp64. Raises ValueError for NaN or infinity."""
    return SVD(*thin_svd(finite(weight)))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values, (p,), falling, in fp64; what a dense update's measures need."""
    return torch.linalg.svdvals(finite(matrix))


def thin_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and Vh of a finite matrix.

    Divide and conquer, as LAPACK does it, now and then fails where many values are equal; the QR
    iteration, several times slower, then does not.
    """
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd as scipy_svd

        found = scipy_svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        U, S, Vh = (torch.from_numpy(part).to(matrix.device) for part in found)
        return U, S, Vh


def lora_update_svd(A: torch.Tensor, B: torch.Tensor, scale: float) -> SVD:
    """The exact decomposition of a LoRA update, scale * B A, with min(m, n, r) triplets.

    A is (r, n), B (m, r). With B = Q_B R_B and A^T = Q_A R_A, the singular values are those of the
    r x r matrix scale * R_B R_A^T; O((m + n) r^2), and B A is never formed. Raises ValueError for
    NaN or infinity and for shapes that do not fit.
    """
    A, B = lora_factors(A, B, scale)
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.T)
    core = thin_svd(scale * left_core @ right_core.T)
    return SVD(left @ core[0], core[1], core[2] @ right.T)


def lora_factors(
    A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in fp64. Raises ValueError where they are not finite or do not fit together."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"A {tuple(A.shape)} and B {tuple(B.shape)} are no pair of LoRA factors")
    if not math.isfinite(scale):
        raise ValueError(f"the scaling of the update is {scale}")
    return finite(A, "A"), finite(B, "B")


# ------------------------------------------------------------------------------ cache on disk


def cached_svd(weight: torch.Tensor, folder: Path) -> SVD:
    """`svd(weight)`, kept in `folder` under the hash of the weight's bytes, shape and type.

    A file that is cut off, altered, or another weight's is computed again and replaced. Written
    under another name first, so that a reader, or a second process, never sees half of it.
    """
    from safetensors.torch import save_file

    key = _digest([weight])
    path = Path(folder) / f"{key[:32]}.safetensors"
    cached = _read_cache(path, key)
    if cached is not None:
        return SVD(*(tensor.to(weight.device) for tensor in cached))
    found = svd(weight)
    # laid out as it will be read: in another order products round differently
    found = SVD(found.U.contiguous(), found.S, found.Vh.contiguous())
    tensors = {"U": found.U.cpu(), "S": found.S.cpu(), "Vh": found.Vh.cpu()}
    content = _digest(list(tensors.values()))
    metadata = {"format": CACHE_FORMAT, "weight": key, "content": content}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return found


def _read_cache(path: Path, key: str) -> list[torch.Tensor] | None:
    """U, S and Vh, or None where the file is not there or not whole or not this weight's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("weight")) != (CACHE_FORMAT, key):
                return None
            tensors = [file.get_tensor(name) for name in ("U", "S", "Vh")]
    except (OSError, SafetensorError):
        return None
    return tensors if _digest(tensors) == metadata.get("content") else None


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


# ------------------------------------------------------------------ size and spread of an update


def relative_frobenius(update_values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||dW||_F / ||W0||_F, from all singular values of both."""
    return _ratio(update_values.norm(), base_values.norm())


def relative_spectral(update_values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||dW||_2 / ||W0||_2, from the singular values of both; the largest is enough."""
    return _ratio(_largest(update_values), _largest(base_values))


def stable_rank(values: torch.Tensor) -> float:
    """||dW||_F^2 / ||dW||_2^2, from all singular values; 0 of a matrix of zeros."""
    return _ratio(values.norm(), _largest(values)) ** 2


def effective_rank(values: torch.Tensor) -> float:
    """exp(-sum p ln p), p = sigma / sum sigma (Roy and Vetterli 2007); 0 of a matrix of zeros."""
    if not _largest(values) > 0:
        return 0.0
    shares = values.double() / values.double().sum()
    return float(torch.special.entr(shares).sum().exp())


def rank90(values: torch.Tensor, mass: float = 0.9) -> int:
    """The fewest triplets that hold 90 % of ||dW||_F^2 (Biderman et al., arXiv 2405.09673).

    `values`, shape (p,), fall; 0 of a matrix of zeros.
    """
    if not _largest(values) > 0:
        return 0
    held = values.double().square().cumsum(0)
    # the last bit of a sum decides nothing: a share of exactly 90 % counts as reached
    return int((held < mass * held[-1] * (1 - 1e-12)).sum()) + 1


def value_shift(values: torch.Tensor, base_values: torch.Tensor) -> float:
    """||sigma(W) - sigma(W0)|| / ||sigma(W0)|| over the leading len(values) singular values."""
    base_values = base_values[: len(values)]
    return _ratio((values - base_values).norm(), base_values.norm())


def threshold_ratio(update_values: torch.Tensor, base_values: torch.Tensor, k: int) -> float:
    """rho = sigma_1(dW) / sigma_k(W0), k from 1; from about 1 on an intruder appears among the k.

    arXiv 2607.23711; `update_values` are those of the scaled update. Infinite if sigma_k(W0) = 0.
    """
    if not 1 <= k <= len(base_values):
        raise ValueError(f"k = {k}, but the matrix has {len(base_values)} singular values")
    return _ratio(_largest(update_values), base_values[k - 1])


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.max() if len(values) else values.new_zeros(())


def _ratio(above: torch.Tensor, below: torch.Tensor) -> float:
    """0 where nothing is above, whatever is below."""
    above, below = float(above), float(below)
    if above == 0:
        return 0.0
    return above / below if below > 0 else math.inf


# -------------------------------------------------------------------------- intruder dimensions


def max_cosines(cosines: torch.Tensor) -> torch.Tensor:
    """max over all i of |<u_j, u0_i>|, shape (k,), from `cosines` = U0^T U, shape (p, k)."""
    return cosines.abs().amax(0)


def intruders(max_cosines: torch.Tensor, k: int = 10, epsilon: float = 0.5) -> int:
    """Intruder dimensions among the k leading left singular vectors of the tuned matrix.

    u_j is one iff max_i |<u_j, u0_i>| < epsilon over **all** i (Shuttleworth et al., arXiv
    2410.21228). `max_cosines`, shape (k or more,), come from the function of that name. Raises
    ValueError if k is larger.
    """
    return int(intruder_counts(max_cosines, [k], [epsilon])[0, 0])


def intruder_counts(
    max_cosines: torch.Tensor, ks: Sequence[int], epsilons: Sequence[float]
) -> torch.Tensor:
    """`intruders` for every k and epsilon, shape (len(ks), len(epsilons))."""
    if not all(1 <= k <= len(max_cosines) for k in ks):
        raise ValueError(f"k in {list(ks)}, but {len(max_cosines)} singular vectors are known")
    limits = torch.as_tensor(list(epsilons), dtype=torch.double, device=max_cosines.device)
    counts = (max_cosines.double()[:, None] < limits).long().cumsum(0)
    return counts[[k - 1 for k in ks]]


# ------------------------------------------------------------------------------------ subspaces


def subspace_similarity(first: torch.Tensor, second: torch.Tensor) -> float:
    """phi(i, j) = ||U^T V||_F^2 / min(i, j), in [0, 1] (Hu et al., arXiv 2106.09685, section 7).

    `first` (d, i) and `second` (d, j) have orthonormal columns; left vectors for the left side,
    right ones for the right. Two random subspaces have `random_similarity(i, j, d)`.
    """
    return float(subspace_similarities(first, second)[-1, -1])


def subspace_similarities(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """phi of the leading a columns of `first` and b of `second`, at [a - 1, b - 1]."""
    if not first.shape[1] or not second.shape[1]:
        raise ValueError("a subspace without a direction has no similarity")
    squares = (first.double().T @ second.double()).square().cumsum(0).cumsum(1)
    sizes = [torch.arange(1, n + 1, device=squares.device) for n in squares.shape]
    return squares / torch.minimum(sizes[0][:, None], sizes[1])


def random_similarity(i: int, j: int, d: int) -> float:
    """What phi(i, j) is on average for random subspaces of a d-dimensional space: max(i, j) / d."""
    return max(i, j) / d


def principal_angles(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Principal angles between two subspaces in radians, rising, shape (min(i, j),).

    `first` (d, i) and `second` (d, j) have orthonormal columns. Small angles come from their sines,
    where a cosine has no digits left (Bjorck and Golub 1973).
    """
    first, second = first.double(), second.double()
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    overlap = first.T @ second
    cosines = torch.linalg.svdvals(overlap)
    sines = torch.linalg.svdvals(second - first @ overlap).flip(0)
    angles = torch.where(
        cosines.square() >= 0.5, sines.clamp(max=1).asin(), cosines.clamp(max=1).acos()
    )
    return angles


def legacy_drift(vectors: torch.Tensor, base_vectors: torch.Tensor) -> float:
    """||U - U0||_F / (||U||_F + ||U0||_F), each column's sign made that of its partner.

    A published measure, kept for comparison. Without the signs an unchanged matrix could score
    0.56; with them it still calls two vectors that swapped ranks far apart. Both (d, k).
    """
    signs = torch.where((vectors * base_vectors).sum(0) < 0, -1.0, 1.0).to(vectors.dtype)
    return _ratio((vectors * signs - base_vectors).norm(), vectors.norm() + base_vectors.norm())
