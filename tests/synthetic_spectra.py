"""Made-up bases, updates and weights with known spectra, for the tests of drift."""

import torch

from lora_tradeoffs.drift.svd import SVD

SHAPES = {"square": (320, 320), "wide": (300, 640), "tall": (640, 300)}


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def orthonormal(rows, columns, seed=0):
    return torch.linalg.qr(normal(rows, columns, seed=seed))[0]


def with_values(values, shape, seed=0):
    """A base with these singular values and random vectors."""
    m, n = shape
    values = torch.as_tensor(values, dtype=torch.double)
    p = len(values)
    return SVD(orthonormal(m, p, seed), values, orthonormal(n, p, seed + 1).T.contiguous())


def power_law(p, exponent=0.5):
    return torch.arange(1, p + 1, dtype=torch.double) ** -exponent


def weight_of(base):
    return base.U * base.S @ base.Vh


def lora(shape, rank, size, seed=5):
    """A and B of an update with the Frobenius norm `size`."""
    m, n = shape
    A, B = normal(rank, n, seed=seed), normal(m, rank, seed=seed + 1)
    return A, B * (size / torch.linalg.norm(B @ A))
