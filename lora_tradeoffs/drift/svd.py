"""Singular value decompositions of a base weight W0 and of an update dW, exact and in fp64.

Pure functions of tensors, on the tensors' device; only `cached_svd` touches the disk. m x n is a
weight's shape, p = min(m, n). solver.py computes the leading singular triplets of W0 + dW,
measures.py compares the two decompositions.
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
    """U diag(S) Vh in fp64: U (m, p) and Vh (p, n) orthonormal, S (p,) descending."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.U.shape[0], self.Vh.shape[1]


def finite(tensor: torch.Tensor, name: str = "the matrix") -> torch.Tensor:
    """The tensor in fp64. Raises ValueError if it holds a NaN or an infinity."""
    tensor = tensor.detach().double()
    # the sum needs one pass and no temporary; it may overflow, and then the entries are checked
    if not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds values that are not finite")
    return tensor


def svd(weight: torch.Tensor) -> SVD:
    """The thin singular value decomposition in fp64. Raises ValueError for NaN or infinity."""
    return SVD(*thin_svd(finite(weight)))


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values in fp64, shape (p,), descending. Raises ValueError as `svd` does."""
    return torch.linalg.svdvals(finite(matrix))


def thin_svd(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and Vh of a finite matrix.

    LAPACK's divide and conquer occasionally fails to converge where many values are equal. Then
    the QR iteration is used, which is several times slower.
    """
    try:
        return torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError:
        from scipy.linalg import svd as scipy_svd

        factors = scipy_svd(matrix.cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
        U, S, Vh = (torch.from_numpy(factor).to(matrix.device) for factor in factors)
        return U, S, Vh


def lora_update_svd(A: torch.Tensor, B: torch.Tensor, scale: float) -> SVD:
    """The exact decomposition of a LoRA update, scale * B A, with min(m, n, r) triplets.

    A is (r, n), B (m, r). With B = Q_B R_B and A^T = Q_A R_A, the singular values are those of the
    r x r matrix scale * R_B R_A^T. This costs O((m + n) r^2), and B A is never formed. Raises
    ValueError for NaN or infinity and for shapes that do not fit.
    """
    A, B = lora_factors(A, B, scale)
    left, left_core = torch.linalg.qr(B)
    right, right_core = torch.linalg.qr(A.T)
    core = thin_svd(scale * left_core @ right_core.T)
    return SVD(left @ core[0], core[1], core[2] @ right.T)


def lora_factors(
    A: torch.Tensor, B: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B in fp64. Raises ValueError if they are not finite or their shapes do not fit."""
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(f"the LoRA factors A {tuple(A.shape)} and B {tuple(B.shape)} do not fit")
    if not math.isfinite(scale):
        raise ValueError(f"the scaling of the update is {scale}")
    return finite(A, "A"), finite(B, "B")


# ------------------------------------------------------------------------------ cache on disk


def cached_svd(weight: torch.Tensor, folder: Path) -> SVD:
    """`svd(weight)`, cached in `folder` under the hash of the weight's bytes, shape and dtype.

    A cached file that is truncated, altered or another weight's is computed again and replaced.
    """
    from safetensors.torch import save_file

    key = digest([weight])
    path = Path(folder) / f"{key[:32]}.safetensors"
    cached = _read_cache(path, key)
    if cached is not None:
        return SVD(*(tensor.to(weight.device) for tensor in cached))
    result = svd(weight)
    # the memory layout of a tensor read from the cache: products round differently in another one
    result = SVD(result.U.contiguous(), result.S, result.Vh.contiguous())
    tensors = {"U": result.U.cpu(), "S": result.S.cpu(), "Vh": result.Vh.cpu()}
    content = digest(list(tensors.values()))
    metadata = {"format": CACHE_FORMAT, "weight": key, "content": content}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
    return result


def _read_cache(path: Path, key: str) -> list[torch.Tensor] | None:
    """U, S and Vh, or None if the file is missing, damaged or another weight's."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("weight")) != (CACHE_FORMAT, key):
                return None
            tensors = [file.get_tensor(name) for name in ("U", "S", "Vh")]
    except (OSError, SafetensorError):
        return None
    return tensors if digest(tensors) == metadata.get("content") else None


def digest(tensors: Sequence[torch.Tensor]) -> str:
    """The sha256 of the tensors' types, shapes and values."""
    sha256 = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        sha256.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha256.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return sha256.hexdigest()
