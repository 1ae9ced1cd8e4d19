"""The measures have the values computed by hand, and intruders are those that PEFT counts."""

import math

import pytest
import torch
from reference import random_similarity, subspace_similarities
from synthetic_spectra import normal, orthonormal, power_law, with_values

from lora_tradeoffs.drift.measures import (
    effective_rank,
    intruders,
    legacy_drift,
    max_cosines,
    rank90,
    relative_frobenius,
    relative_spectral,
    stable_rank,
    threshold_ratio,
    value_shift,
)
from lora_tradeoffs.drift.solver import top_triplets_dense, top_triplets_lora
from lora_tradeoffs.drift.svd import lora_update_svd, svd

# ----------------------------------------------------------------------------- hand-computed values


def test_size_and_spread_by_hand():
    values = torch.tensor([3.0, 4.0, 0.0]).double().sort(descending=True)[0]
    assert stable_rank(values) == pytest.approx(25 / 16)
    entropy = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert effective_rank(values) == pytest.approx(math.exp(entropy))
    assert rank90(values) == 2
    assert rank90(torch.ones(10)) == 9
    assert effective_rank(torch.ones(10)) == pytest.approx(10)
    base = torch.tensor([10.0, 0.0]).double()
    assert relative_frobenius(values, base) == pytest.approx(0.5)
    assert relative_spectral(values, base) == pytest.approx(0.4)
    assert threshold_ratio(values, base, 1) == pytest.approx(0.4)
    assert threshold_ratio(values, base, 2) == math.inf
    assert value_shift(torch.tensor([13.0, 4.0]), base) == pytest.approx(0.5)


def test_a_planted_rotation_has_the_similarity_computed_by_hand():
    base = with_values([5.0, 4.0, *torch.linspace(1, 0, 38).tolist()], (40, 40))
    angle = 0.3
    turned = base.U.clone()
    turned[:, 1] = math.cos(angle) * base.U[:, 1] + math.sin(angle) * base.U[:, 20]
    turned[:, 20] = math.cos(angle) * base.U[:, 20] - math.sin(angle) * base.U[:, 1]
    triplets = top_triplets_dense(base, turned * base.S @ base.Vh, 2)
    first = torch.eye(40, 2, dtype=torch.double)
    phi = subspace_similarities(triplets.cosines, first)
    expected = torch.tensor([[1, 1], [1, (1 + math.cos(angle) ** 2) / 2]], dtype=torch.double)
    assert (phi - expected).abs().max() < 1e-12
    assert abs(float(subspace_similarities(triplets.right_cosines, first)[-1, -1]) - 1) < 1e-12
    distance = 2 * math.sin(angle / 2)
    drift = legacy_drift(triplets.cosines, first)
    assert abs(drift - distance / (2 * 2**0.5)) < 1e-12


def test_random_subspaces_have_the_random_similarity():
    i, j, d = 8, 20, 400
    phi = [
        float(subspace_similarities(orthonormal(d, i, seed), orthonormal(d, j, seed + 100))[-1, -1])
        for seed in range(50)
    ]
    assert abs(sum(phi) / 50 - random_similarity(i, j, d)) < 0.005


def test_a_k_that_is_not_in_the_spectrum_is_refused():
    for k in (0, 21):
        with pytest.raises(ValueError, match="has 20 singular values"):
            threshold_ratio(power_law(20), power_law(20), k)


# ------------------------------------------------------------------------------- an unchanged model


def assert_no_drift(triplets, base, update_values, k):
    first = torch.eye(len(base.S), k, dtype=torch.double)
    assert relative_frobenius(update_values, base.S) == 0
    assert relative_spectral(update_values, base.S) == 0
    assert stable_rank(update_values) == 0
    assert effective_rank(update_values) == 0
    assert rank90(update_values) == 0
    assert threshold_ratio(update_values, base.S, k) == 0
    assert value_shift(triplets.values, base.S) <= 1e-12
    assert intruders(max_cosines(triplets.cosines), k, 1 - 1e-12) == 0
    for cosines in (triplets.cosines, triplets.right_cosines):
        assert 1 - subspace_similarities(cosines, first)[-1, -1] <= 1e-12
        assert legacy_drift(cosines, first) <= 1e-12


def test_an_unchanged_model_has_drifted_by_nothing(real_weights):
    for weight in real_weights.values():
        m, n = weight.shape
        base, none = svd(weight), torch.zeros(0, dtype=torch.double)
        cases = [
            (torch.zeros(0, n), torch.zeros(m, 0), 1.0),
            (normal(8, n).float(), torch.zeros(m, 8), 2.0),
            (normal(8, n), normal(m, 8), 0.0),
        ]
        for A, B, scale in cases:
            update = lora_update_svd(A, B, scale).S
            assert len(update) == A.shape[0]
            assert_no_drift(top_triplets_lora(base, A, B, scale, 64), base, update, 64)
        triplets = top_triplets_dense(base, weight, 64)
        assert triplets.method == "unchanged"
        assert_no_drift(triplets, base, none, 64)


# ---------------------------------------------------------------------------------------- intruders


class TwoProjections(torch.nn.Module):
    def __init__(self, weights):
        super().__init__()
        for name, weight in weights.items():
            layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
            layer.weight.data = weight.clone()
            setattr(self, name, layer)

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore:Adapter intruder_reduced")
@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_intruders_are_those_that_peft_counts(real_weights, size):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    weights = {f"{name}_{layer}": weight for (layer, name), weight in real_weights.items()}
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(weights), init_lora_weights=False)
    model = get_peft_model(TwoProjections(weights), config).double()
    layers = {name: getattr(model.base_model.model, name) for name in weights}
    for layer in layers.values():
        norm = layer.get_base_layer().weight.norm() / layer.get_delta_weight("default").norm()
        layer.lora_B["default"].weight.data *= size * norm
    total = 0
    for k, epsilon in ((10, 0.5), (40, 0.8)):
        messages = []
        reduce_intruder_dimension(
            model, top_k=k, threshold_epsilon=epsilon, logging_sink=messages.append
        )
        model.delete_adapter("intruder_reduced")
        for name, layer in layers.items():
            line = next(line for line in messages if name in line)
            expected = 0 if "No intruders" in line else int(line.rsplit(" ", 1)[1])
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = svd(layer.get_base_layer().weight)
            triplets = top_triplets_lora(base, A, B, layer.scaling["default"], k)
            assert intruders(max_cosines(triplets.cosines), k, epsilon) == expected
            total += expected
    assert total > 0


def test_a_planted_intruder_is_found_with_its_strength():
    """u and v spread evenly over 400 directions, so their cosines are 1/20; u^T W0 v = .097."""
    base = with_values(power_law(400), (400, 400))
    u, v = base.U.sum(1) / 20, base.Vh.sum(0) / 20
    k = 10  # sigma_10 = .316
    for strength, expected in ((3.0, 1), (0.1, 0)):
        A, B = v[None], strength * u[:, None]
        triplets = top_triplets_lora(base, A, B, 1.0, k)
        update = lora_update_svd(A, B, 1.0)
        assert abs(float(update.S[0]) - strength) < 1e-12
        assert intruders(max_cosines(triplets.cosines), k) == expected
        rho = threshold_ratio(update.S, base.S, k)
        assert abs(rho - strength * 10**0.5) < 1e-12
    A, B = v[None], 3 * u[:, None]
    strongest = top_triplets_lora(base, A, B, 1.0, k)
    assert abs(float(strongest.values[0]) - 3.1) < 0.05
    assert max_cosines(strongest.cosines)[0] < 0.2


def test_counts_over_a_grid():
    cosines = torch.tensor([0.9, 0.2, 0.5, 0.4])
    counts = [[intruders(cosines, k, epsilon) for epsilon in (0.3, 0.5, 0.95)] for k in (1, 2, 4)]
    assert counts == [[0, 0, 1], [1, 1, 2], [1, 2, 4]]
    with pytest.raises(ValueError, match="4 singular vectors"):
        intruders(torch.ones(4), 5, 0.5)
