"""Unbiased linear CKA from minibatches: pure functions on features, (tokens, size), of one layer.

Gram matrices hold a few tokens each, so that one side can be stored and compared with many others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lora_tradeoffs.hardware import widest_float

if TYPE_CHECKING:
    import torch

# Tokens of a Gram matrix; the memory for the base grows with it. A batch's tokens are dealt out to
# its minibatches, so that each spans as many passages as the batch does. Consecutive tokens would
# come from one passage each, whose mean the centring removes: on WikiText, minibatches of 256
# consecutive tokens showed a sixth less drift (CKA .963) than one Gram matrix of all tokens (.956);
# random minibatches showed the same as one matrix.
MINIBATCH = 64
SMALLEST = 4  # tokens of a minibatch


def centred_gram(features: torch.Tensor) -> torch.Tensor:
    """U-centred Gram matrices of n tokens' features, (..., n, size): upper halves, (..., n(n-1)/2).

    Székely and Rizzo (2014, arXiv:1310.2926): without the diagonal, and with rows and columns that
    sum to zero. The inner product of two of them is n(n-3)/2 times the unbiased HSIC of Song et
    al. (2012). Computed in fp64 from features less their mean, which changes no entry but spares
    digits; stored in fp32.
    """
    import torch

    count = features.shape[-2]
    features = features.to(widest_float(features.device), copy=True)
    features -= features.mean(-2, keepdim=True)
    gram = features @ features.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    rows = gram.sum(-1, keepdim=True) / (count - 2)
    gram -= rows + rows.mT
    gram += rows.sum(-2, keepdim=True) / (count - 1)
    first, second = torch.triu_indices(count, count, 1, device=gram.device)
    return gram[..., first, second].float()


def hsic_terms(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Unbiased HSIC of two `centred_gram`s, of the first with itself, and of the second: (..., 3).

    Multiplied by the tokens, so that a short minibatch weighs as much as its tokens.
    """
    import torch

    count = (1 + (1 + 8 * first.shape[-1]) ** 0.5) / 2
    first, second = (gram.to(widest_float(gram.device)) for gram in (first, second))
    # the same sum three times, so that equal representations have a CKA of exactly 1
    products = [(a * b).sum(-1) for a, b in ((first, second), (first, first), (second, second))]
    return torch.stack(products, dim=-1) * (2 / (count - 3))


def cka(terms: np.ndarray) -> np.ndarray:
    """Unbiased linear CKA from minibatches' `hsic_terms`, (..., minibatches, layers, 3).

    Kornblith et al. (2019, arXiv:1905.00414) with the sums over minibatches of Nguyen et al. (2020,
    arXiv:2010.15327). Independent features have 0 on average, where the biased estimate tends to 1
    with more features than tokens; so it can be negative. Shape (..., layers); nan where features
    do not vary, or without minibatches.
    """
    cross, first, second = np.moveaxis(np.asarray(terms, dtype=float).sum(axis=-3), -1, 0)
    scale = np.sqrt(first * second)
    return np.divide(cross, scale, out=np.full_like(cross, np.nan), where=scale > 0)


def dealt(features: torch.Tensor) -> list[torch.Tensor]:
    """A batch's rows, (tokens, size), dealt out to minibatches of at most MINIBATCH.

    Those of one length are stacked, (minibatches, length, size); lengths differ by one at most.
    Fewer than four rows make none: the unbiased estimate divides by n - 3.
    """
    import torch

    if len(features) < SMALLEST:
        return []
    count = -(-len(features) // MINIBATCH)
    parts = [features[at::count] for at in range(count)]
    longer = len(features) % count
    return [torch.stack(group) for group in (parts[:longer], parts[longer:]) if group]
