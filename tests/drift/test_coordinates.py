"""The tuned matrix in the coordinates of the base."""

import pytest
import torch
from synthetic_spectra import lora, weight_of, with_values

from lora_tradeoffs.drift.coordinates import LowRank


@pytest.mark.parametrize("shape", [(60, 60), (40, 70), (70, 40)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_inertia_counts_the_singular_values_above_a_level(shape, rank):
    base = with_values(torch.linspace(1, 0, min(shape)), shape)
    A, B = lora(shape, rank, 1.0)
    matrix = LowRank(base, A, B, 0.7)
    values = torch.linalg.svdvals(weight_of(base) + 0.7 * B @ A)
    for level in (0.01, 0.2, 0.5, 0.9, float(base.S[5])):
        assert matrix.count_above(level) == int((values > level).sum())
