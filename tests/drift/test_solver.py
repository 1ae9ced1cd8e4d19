"""The leading triplets agree with dense decompositions, whichever way they are computed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_spectra import SHAPES, lora, normal, orthonormal, power_law, weight_of, with_values

from lora_tradeoffs.drift import solver
from lora_tradeoffs.drift.coordinates import LowRank
from lora_tradeoffs.drift.measures import (
    effective_rank,
    legacy_drift,
    max_cosines,
    rank90,
    stable_rank,
)
from lora_tradeoffs.drift.solver import top_triplets_dense, top_triplets_lora
from lora_tradeoffs.drift.svd import SVD, lora_update_svd, svd

EPSILONS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99]


def left_vectors(triplets, base):
    """U itself, (m, k)."""
    vectors = base.U @ triplets.cosines
    return vectors + triplets.left_outside if len(triplets.left_outside) else vectors


def right_vectors(triplets, base):
    """V itself, (n, k)."""
    vectors = base.Vh.T @ triplets.right_cosines
    return vectors + triplets.right_outside if len(triplets.right_outside) else vectors


def assert_like_dense(triplets, base, weight, k):
    """The bars: values to 1e-9 relative, largest cosines to 1e-6, equal intruder sets."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert ((triplets.values - S[:k]).abs() <= 1e-9 * S[:k]).all()
    for cosines, dense in (
        (triplets.cosines, base.U.T @ U),
        (triplets.right_cosines, base.Vh @ Vh.T),
    ):
        error = max_cosines(cosines) - max_cosines(dense[:, :k])
        assert error.abs().max() <= 1e-6
    dense = max_cosines(base.U.T @ U[:, :k])
    for epsilon in EPSILONS:
        assert ((max_cosines(triplets.cosines) < epsilon) == (dense < epsilon)).all()
    left, right = left_vectors(triplets, base), right_vectors(triplets, base)
    assert (left.T @ left - torch.eye(k)).abs().max() < 1e-10
    residual = (weight @ right - left * triplets.values).square().sum(0)
    residual += (weight.T @ left - right * triplets.values).square().sum(0)
    assert residual.sqrt().max() / S[0] <= triplets.residual * 1.001 + 1e-13
    assert triplets.error <= solver.TOLERANCE


# ------------------------------------------------------------------------------ against a dense SVD


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_triplets_are_those_of_the_merged_matrix(shape, rank, size):
    base = with_values(power_law(min(shape)), shape)
    A, B = lora(shape, rank, size * float(base.S.norm()))
    merged = weight_of(base) + 2 * B @ A / 2
    for k in (10, 64):
        assert_like_dense(top_triplets_lora(base, 2 * A, B, 0.5, k), base, merged, k)


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_triplets_are_those_of_the_tuned_matrix(shape, size):
    base = with_values(power_law(min(shape)), shape)
    update = normal(*shape, seed=9)
    weight = weight_of(base) + update * (size * base.S.norm() / update.norm())
    for k in (4, 64):
        assert_like_dense(top_triplets_dense(base, weight, k), base, weight, k)


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_real_weights_agree_with_a_dense_decomposition(real_weights, rank):
    for (layer, _), weight in real_weights.items():
        base, W0 = svd(weight), weight.double()
        for size in (0.01, 0.3):
            A, B = lora(weight.shape, rank, size * float(base.S.norm()), seed=layer)
            triplets = top_triplets_lora(base, A.float(), B.float(), 2.0, 64)
            merged = W0 + 2 * B.float().double() @ A.float().double()
            assert_like_dense(triplets, base, merged, 64)


def test_real_weights_with_a_dense_update_agree_with_a_dense_decomposition(real_weights):
    for weight in real_weights.values():
        base = svd(weight)
        tuned = weight + 0.01 * weight.std() * normal(*weight.shape, seed=3).float()
        for k in (10, 64):
            assert_like_dense(top_triplets_dense(base, tuned, k), base, tuned.double(), k)


def test_the_iteration_is_what_answers_where_it_pays():
    shape = (1024, 1024)
    base = with_values(power_law(1024), shape)
    A, B = lora(shape, 8, 0.05 * float(base.S.norm()))
    merged = weight_of(base) + B @ A
    triplets = top_triplets_lora(base, A, B, 1.0, 128)
    assert triplets.method == "iterative"
    assert_like_dense(triplets, base, merged, 128)
    triplets = top_triplets_dense(base, merged, 40)
    assert triplets.method == "iterative"
    assert_like_dense(triplets, base, merged, 40)


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24), (1, 9), (9, 1)])
def test_all_triplets_of_a_small_matrix(shape):
    p = min(shape)
    base = with_values(power_law(p), shape)
    A, B = lora(shape, 3, 0.2)
    merged = weight_of(base) + B @ A
    for triplets in (top_triplets_lora(base, A, B, 1.0, p), top_triplets_dense(base, merged, p)):
        assert triplets.method == "dense"
        assert_like_dense(triplets, base, merged, p)
        rebuilt = left_vectors(triplets, base) * triplets.values @ right_vectors(triplets, base).T
        assert (rebuilt - merged).abs().max() < 1e-13


def test_a_rank_above_the_matrix_is_handled():
    base = with_values(power_law(20), (20, 30))
    A, B = lora((20, 30), 50, 0.5)
    merged = weight_of(base) + B @ A
    assert_like_dense(top_triplets_lora(base, A, B, 1.0, 20), base, merged, 20)


REPEATED = {
    "all equal": torch.ones(400),
    "none": torch.zeros(400),
    "a plateau on top": torch.tensor([2.0] * 30 + [1.0] * 370),
    "plateaus": torch.linspace(1, 0, 400).round(decimals=1),
    "outliers": torch.tensor([100.0] + [1.0] * 9 + [1e-3] * 390),
}


@pytest.mark.parametrize("values", REPEATED.values(), ids=REPEATED)
def test_repeated_singular_values(values):
    """Vectors of a repeated value are any basis of their space: values and residuals are tested."""
    base = with_values(values, (400, 400))
    for rank, size in ((1, 1.0), (4, 0.01), (4, 20.0)):
        A, B = lora((400, 400), rank, size)
        merged = weight_of(base) + B @ A
        expected = torch.linalg.svdvals(merged)[:20]
        for k, triplets in (
            (20, top_triplets_lora(base, A, B, 1.0, 20)),
            (10, top_triplets_dense(base, merged, 10)),
        ):
            assert (triplets.values - expected[:k]).abs().max() <= 1e-9 * expected[0]
            left, right = left_vectors(triplets, base), right_vectors(triplets, base)
            assert (merged @ right - left * triplets.values).norm(dim=0).max() < 1e-7 * expected[0]


# ------------------------------------------------------------------------- no triplet is overlooked


def test_a_direction_outside_the_search_space_is_found():
    """e_350 is orthogonal to all that the search starts from, on both sides."""
    base = with_values(power_law(400), (400, 400))
    for strength in (0.5, 10.0):
        A, B = base.Vh[350:351], strength * base.U[:, 350:351]
        for triplets in (
            top_triplets_lora(base, A, B, 1.0, 10),
            top_triplets_dense(base, weight_of(base) + B @ A, 10),
        ):
            assert_like_dense(triplets, base, weight_of(base) + B @ A, 10)
            assert (triplets.cosines[350].abs() > 0.999).sum() == 1


def test_a_triplet_that_converges_late_is_not_overlooked():
    """The update's directions meet only outside e_1 ... e_K: a Ritz value starts below the k-th."""
    base = with_values(power_law(250).round(decimals=2), (250, 250))
    A = base.Vh[[178, 180]]
    B = base.U[:, [32, 184]] * torch.tensor([0.395148, 0.526275])
    merged = weight_of(base) + B @ A
    expected = torch.linalg.svdvals(merged)[:7]
    for triplets in (
        top_triplets_lora(base, A, B, 1.0, 7),
        top_triplets_dense(base, merged, 7),
    ):
        assert (triplets.values - expected).abs().max() < 1e-12


def test_a_value_just_above_a_plateau_is_not_overlooked():
    """e_200 overtakes the plateau by .2 %, and what the search starts from has no residual."""
    plateau = 0.3 + 3e-4 * torch.linspace(1, 0, 398, dtype=torch.double)
    base = with_values(torch.cat([torch.ones(2).double(), plateau]), (400, 400))
    A, B = base.Vh[200:201], 1e-3 * base.U[:, 200:201]
    merged = weight_of(base) + B @ A
    expected = torch.linalg.svdvals(merged)[:4]
    assert expected[2] > plateau[0] + 5e-4
    for triplets in (top_triplets_lora(base, A, B, 1.0, 4), top_triplets_dense(base, merged, 4)):
        assert (triplets.values - expected).abs().max() < 1e-12


def test_many_strong_directions_of_a_dense_update_are_found():
    base = with_values(power_law(600), (600, 600))
    update = orthonormal(600, 40, 3) * torch.linspace(3, 0.1, 40) @ orthonormal(600, 40, 4).T
    weight = weight_of(base) + update + 1e-4 * normal(600, 600)
    assert_like_dense(top_triplets_dense(base, weight, 16), base, weight, 16)


def test_a_search_that_fails_its_checks_falls_back_and_says_so(monkeypatch):
    base = with_values(power_law(400), (400, 400))
    A, B = lora((400, 400), 4, 0.5)
    merged = weight_of(base) + B @ A
    assert top_triplets_lora(base, A, B, 1.0, 10).method == "iterative"
    with monkeypatch.context() as patch:
        patch.setattr(solver, "TOLERANCE", 0.0)  # never reached
        lora_triplets = top_triplets_lora(base, A, B, 1.0, 10)
        dense_triplets = top_triplets_dense(base, merged, 10)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "count_above", lambda *_: 99)
        missed = top_triplets_lora(base, A, B, 1.0, 10)
    for triplets in (lora_triplets, dense_triplets, missed):
        assert triplets.method == "dense after iterative"
        assert triplets.residual < 1e-13
        assert_like_dense(triplets, base, merged, 10)


def test_one_changed_weight_is_not_unchanged(real_weights):
    weight = real_weights[0, "q_proj"]
    tuned = weight.clone()
    tuned[3, 4] *= 1.001
    assert top_triplets_dense(svd(weight), tuned, 10).method != "unchanged"


# -------------------------------------------------------------------------------------- invariances


few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


PROBLEMS = st.tuples(
    st.sampled_from([(260, 260), (240, 330), (330, 240)]),
    st.integers(1, 12),
    st.floats(-3, 1),
    st.integers(0, 10**6),
)


def problem(drawn):
    """A base, an update's A and B, and the triplets."""
    shape, rank, size, seed = drawn
    base = with_values(power_law(min(shape), 0.7), shape, seed)
    A, B = lora(shape, rank, 10**size, seed + 9)
    return base, A, B, top_triplets_lora(base, A, B, 1.0, 12)


def assert_same_drift(first, second, swapped=False):
    cosines = (
        (first.right_cosines, first.cosines) if swapped else (first.cosines, first.right_cosines)
    )
    assert (first.values - second.values).abs().max() <= 1e-9 * first.values[0]
    assert (max_cosines(cosines[0]) - max_cosines(second.cosines)).abs().max() <= 1e-6
    assert (max_cosines(cosines[1]) - max_cosines(second.right_cosines)).abs().max() <= 1e-6


@few
@given(PROBLEMS)
def test_signs_of_the_bases_vectors_change_nothing(drawn):
    base, A, B, triplets = problem(drawn)
    signs = torch.where(normal(len(base.S)) > 0, 1.0, -1.0).double()
    flipped = SVD(base.U * signs, base.S, signs[:, None] * base.Vh)
    again = top_triplets_lora(flipped, A, B, 1.0, 12)
    assert_same_drift(triplets, again)
    first = torch.eye(len(base.S), 12, dtype=torch.double)
    distances = [legacy_drift(t.cosines, first) for t in (triplets, again)]
    assert abs(distances[0] - distances[1]) <= 1e-6
    opposite = top_triplets_lora(base, -A, -B, 1.0, 12)
    assert_same_drift(triplets, opposite)


@few
@given(PROBLEMS)
def test_an_orthogonal_change_of_basis_changes_nothing(drawn):
    base, A, B, triplets = problem(drawn)
    m, n = base.shape
    left, right = orthonormal(m, m, 21), orthonormal(n, n, 22)
    turned = SVD(left @ base.U, base.S, base.Vh @ right)
    assert_same_drift(triplets, top_triplets_lora(turned, A @ right, left @ B, 1.0, 12))


@few
@given(PROBLEMS)
def test_transposition_swaps_the_sides(drawn):
    base, A, B, triplets = problem(drawn)
    flipped = SVD(base.Vh.T, base.S, base.U.T)
    assert_same_drift(triplets, top_triplets_lora(flipped, B.T, A.T, 1.0, 12), swapped=True)
    first, second = lora_update_svd(A, B, 1.0), lora_update_svd(B.T, A.T, 1.0)
    assert (first.S - second.S).abs().max() <= 1e-12 * first.S[0]


@few
@given(PROBLEMS, st.floats(-6, 6))
def test_scaling_the_model_scales_the_values_alone(drawn, exponent):
    base, A, B, triplets = problem(drawn)
    factor = 10**exponent
    scaled = SVD(base.U, factor * base.S, base.Vh)
    again = top_triplets_lora(scaled, A, B, factor, 12)
    assert ((again.values - factor * triplets.values) / again.values).abs().max() <= 1e-9
    assert (max_cosines(again.cosines) - max_cosines(triplets.cosines)).abs().max() <= 1e-6
    for measure in (stable_rank, effective_rank, rank90):
        ours = measure(lora_update_svd(A, B, factor).S)
        assert ours == pytest.approx(measure(lora_update_svd(A, B, 1.0).S))


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    base = with_values(power_law(20), (20, 30))
    A, B, weight = normal(2, 30), normal(20, 2), weight_of(base)
    for tensor in (A, B, weight):
        spoilt = tensor.clone()
        spoilt[1, 1] = bad
        calls = {
            id(A): lambda x=spoilt: top_triplets_lora(base, x, B, 1.0, 4),
            id(B): lambda x=spoilt: lora_update_svd(A, x, 1.0),
            id(weight): lambda x=spoilt: top_triplets_dense(base, x, 4),
        }
        with pytest.raises(ValueError, match="not finite"):
            calls[id(tensor)]()
    with pytest.raises(ValueError, match="scaling"):
        top_triplets_lora(base, A, B, bad, 4)


def test_a_k_that_is_not_in_the_matrix_is_refused():
    base = with_values(power_law(20), (20, 30))
    for k in (0, 21):
        with pytest.raises(ValueError, match="20 x 30 has 20 singular values"):
            top_triplets_lora(base, normal(2, 30), normal(20, 2), 1.0, k)
        with pytest.raises(ValueError, match="20 x 30 has 20 singular values"):
            top_triplets_dense(base, weight_of(base), k)


def test_shapes_that_do_not_fit_are_refused():
    base = with_values(power_law(20), (20, 30))
    with pytest.raises(ValueError, match="LoRA factors A"):
        top_triplets_lora(base, normal(2, 30), normal(20, 3), 1.0, 4)
    with pytest.raises(ValueError, match="30 x 20 for a base of 20 x 30"):
        top_triplets_lora(base, normal(2, 20), normal(30, 2), 1.0, 4)
    with pytest.raises(ValueError, match="for a base of 20 x 30"):
        top_triplets_dense(base, normal(30, 20), 4)
