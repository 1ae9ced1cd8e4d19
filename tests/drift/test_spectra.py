"""The linear algebra of drift agrees with dense decompositions, and with values known by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lora_tradeoffs.drift import solver as spectral_solver
from lora_tradeoffs.drift import svd as spectral
from lora_tradeoffs.drift.coordinates import LowRank
from lora_tradeoffs.drift.solver import top_triplets_dense, top_triplets_lora
from lora_tradeoffs.drift.svd import (
    SVD,
    cached_svd,
    intruder_counts,
    lora_update_svd,
    max_cosines,
    svd,
)

EPSILONS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99]
SHAPES = {"square": (320, 320), "wide": (300, 640), "tall": (640, 300)}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.double)


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


def matrix_of(base):
    return base.U * base.S @ base.Vh


def lora(shape, rank, size, seed=5):
    """A and B of an update with the Frobenius norm `size`."""
    m, n = shape
    A, B = normal(rank, n, seed=seed), normal(m, rank, seed=seed + 1)
    return A, B * (size / torch.linalg.norm(B @ A))


def assert_like_dense(found, base, weight, k):
    """The bars: values to 1e-9 relative, largest cosines to 1e-6, equal intruder sets."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    assert ((found.values - S[:k]).abs() <= 1e-9 * S[:k]).all()
    for cosines, dense in ((found.cosines, base.U.T @ U), (found.right_cosines, base.Vh @ Vh.T)):
        error = max_cosines(cosines) - max_cosines(dense[:, :k])
        assert error.abs().max() <= 1e-6
    dense = max_cosines(base.U.T @ U[:, :k])
    for epsilon in EPSILONS:
        assert ((max_cosines(found.cosines) < epsilon) == (dense < epsilon)).all()
    left, right = found.left_vectors(base), found.right_vectors(base)
    assert (left.T @ left - torch.eye(k)).abs().max() < 1e-10
    residual = (weight @ right - left * found.values).square().sum(0)
    residual += (weight.T @ left - right * found.values).square().sum(0)
    assert residual.sqrt().max() / S[0] <= found.residual * 1.001 + 1e-13
    assert found.error <= spectral_solver.TOLERANCE


# ------------------------------------------------------------------- against a dense SVD


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_lora_triplets_are_those_of_the_merged_matrix(shape, rank, size):
    base = with_values(power_law(min(shape)), shape)
    A, B = lora(shape, rank, size * float(base.S.norm()))
    merged = matrix_of(base) + 2 * B @ A / 2
    for k in (10, 64):
        assert_like_dense(top_triplets_lora(base, 2 * A, B, 0.5, k), base, merged, k)


@pytest.mark.parametrize("size", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_dense_triplets_are_those_of_the_tuned_matrix(shape, size):
    base = with_values(power_law(min(shape)), shape)
    update = normal(*shape, seed=9)
    weight = matrix_of(base) + update * (size * base.S.norm() / update.norm())
    for k in (4, 64):
        assert_like_dense(top_triplets_dense(base, weight, k), base, weight, k)


@pytest.fixture(scope="module")
def real_weights(smollm2):
    with safe_open(smollm2.folder / "model.safetensors", "pt") as file:
        return {
            (layer, module): file.get_tensor(f"model.layers.{layer}.self_attn.{module}.weight")
            for layer in (0, 5, 29)
            for module in ("q_proj", "v_proj")
        }


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_real_weights_agree_with_a_dense_decomposition(real_weights, rank):
    for (layer, _), weight in real_weights.items():
        base, W0 = svd(weight), weight.double()
        for size in (0.01, 0.3):
            A, B = lora(weight.shape, rank, size * float(base.S.norm()), seed=layer)
            found = top_triplets_lora(base, A.float(), B.float(), 2.0, 64)
            merged = W0 + 2 * B.float().double() @ A.float().double()
            assert_like_dense(found, base, merged, 64)


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
    merged = matrix_of(base) + B @ A
    found = top_triplets_lora(base, A, B, 1.0, 128)
    assert found.method == "iterative"
    assert_like_dense(found, base, merged, 128)
    found = top_triplets_dense(base, merged, 40)
    assert found.method == "iterative"
    assert_like_dense(found, base, merged, 40)
    assert_like_dense(found.leading(10), base, merged, 10)


@pytest.mark.parametrize("shape", [(40, 40), (24, 60), (60, 24), (1, 9), (9, 1)])
def test_all_triplets_of_a_small_matrix(shape):
    p = min(shape)
    base = with_values(power_law(p), shape)
    A, B = lora(shape, 3, 0.2)
    merged = matrix_of(base) + B @ A
    for found in (top_triplets_lora(base, A, B, 1.0, p), top_triplets_dense(base, merged, p)):
        assert found.method == "dense"
        assert_like_dense(found, base, merged, p)
        rebuilt = found.left_vectors(base) * found.values @ found.right_vectors(base).T
        assert (rebuilt - merged).abs().max() < 1e-13


def test_a_rank_above_the_matrix_is_handled():
    base = with_values(power_law(20), (20, 30))
    A, B = lora((20, 30), 50, 0.5)
    merged = matrix_of(base) + B @ A
    assert_like_dense(top_triplets_lora(base, A, B, 1.0, 20), base, merged, 20)
    dense = torch.linalg.svdvals(B @ A)
    assert (lora_update_svd(A, B, 1.0).S - dense).abs().max() < 1e-14


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
        merged = matrix_of(base) + B @ A
        expected = torch.linalg.svdvals(merged)[:20]
        for k, found in (
            (20, top_triplets_lora(base, A, B, 1.0, 20)),
            (10, top_triplets_dense(base, merged, 10)),
        ):
            assert (found.values - expected[:k]).abs().max() <= 1e-9 * expected[0]
            left, right = found.left_vectors(base), found.right_vectors(base)
            assert (merged @ right - left * found.values).norm(dim=0).max() < 1e-7 * expected[0]


# ------------------------------------------------------------------- nothing is overlooked


def test_a_direction_outside_the_search_space_is_found():
    """e_350 is orthogonal to all that the search starts from, on both sides."""
    base = with_values(power_law(400), (400, 400))
    for strength in (0.5, 10.0):
        A, B = base.Vh[350:351], strength * base.U[:, 350:351]
        for found in (
            top_triplets_lora(base, A, B, 1.0, 10),
            top_triplets_dense(base, matrix_of(base) + B @ A, 10),
        ):
            assert_like_dense(found, base, matrix_of(base) + B @ A, 10)
            assert (found.cosines[350].abs() > 0.999).sum() == 1


def test_a_triplet_that_converges_late_is_not_overlooked():
    """The update's directions meet only outside e_1 ... e_K: a Ritz value starts below the k-th."""
    base = with_values(power_law(250).round(decimals=2), (250, 250))
    A = base.Vh[[178, 180]]
    B = base.U[:, [32, 184]] * torch.tensor([0.395148, 0.526275])
    merged = matrix_of(base) + B @ A
    expected = torch.linalg.svdvals(merged)[:7]
    for found in (
        top_triplets_lora(base, A, B, 1.0, 7),
        top_triplets_dense(base, merged, 7),
    ):
        assert (found.values - expected).abs().max() < 1e-12


def test_a_value_just_above_a_plateau_is_not_overlooked():
    """e_200 overtakes the plateau by .2 %, and what the search starts from has no residual."""
    plateau = 0.3 + 3e-4 * torch.linspace(1, 0, 398, dtype=torch.double)
    base = with_values(torch.cat([torch.ones(2).double(), plateau]), (400, 400))
    A, B = base.Vh[200:201], 1e-3 * base.U[:, 200:201]
    merged = matrix_of(base) + B @ A
    expected = torch.linalg.svdvals(merged)[:4]
    assert expected[2] > plateau[0] + 5e-4
    for found in (top_triplets_lora(base, A, B, 1.0, 4), top_triplets_dense(base, merged, 4)):
        assert (found.values - expected).abs().max() < 1e-12


def test_many_strong_directions_of_a_dense_update_are_found():
    base = with_values(power_law(600), (600, 600))
    update = orthonormal(600, 40, 3) * torch.linspace(3, 0.1, 40) @ orthonormal(600, 40, 4).T
    weight = matrix_of(base) + update + 1e-4 * normal(600, 600)
    assert_like_dense(top_triplets_dense(base, weight, 16), base, weight, 16)


@pytest.mark.parametrize("shape", [(60, 60), (40, 70), (70, 40)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_inertia_counts_the_singular_values_above_a_level(shape, rank):
    base = with_values(torch.linspace(1, 0, min(shape)), shape)
    A, B = lora(shape, rank, 1.0)
    matrix = LowRank(base, A, B, 0.7)
    values = torch.linalg.svdvals(matrix_of(base) + 0.7 * B @ A)
    for level in (0.01, 0.2, 0.5, 0.9, float(base.S[5])):
        assert matrix.count_above(level) == int((values > level).sum())


def test_a_search_that_fails_its_checks_falls_back_and_says_so(monkeypatch):
    base = with_values(power_law(400), (400, 400))
    A, B = lora((400, 400), 4, 0.5)
    merged = matrix_of(base) + B @ A
    assert top_triplets_lora(base, A, B, 1.0, 10).method == "iterative"
    with monkeypatch.context() as patch:
        patch.setattr(spectral_solver, "TOLERANCE", 0.0)  # never reached
        lora_found = top_triplets_lora(base, A, B, 1.0, 10)
        dense_found = top_triplets_dense(base, merged, 10)
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "count_above", lambda *_: 99)
        missed = top_triplets_lora(base, A, B, 1.0, 10)
    for found in (lora_found, dense_found, missed):
        assert found.method == "dense after iterative"
        assert found.residual < 1e-13
        assert_like_dense(found, base, merged, 10)


def test_where_divide_and_conquer_fails_another_method_answers(monkeypatch):
    def failing(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    weight = normal(30, 20)
    expected = svd(weight)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    found = svd(weight)
    assert (found.S - expected.S).abs().max() < 1e-13
    assert (matrix_of(found) - weight).abs().max() < 1e-13


# ----------------------------------------------------------------------- an unchanged model


def assert_no_drift(found, base, update_values, k):
    first = torch.eye(len(base.S), k, dtype=torch.double)
    assert spectral.relative_frobenius(update_values, base.S) == 0
    assert spectral.relative_spectral(update_values, base.S) == 0
    assert spectral.stable_rank(update_values) == 0
    assert spectral.effective_rank(update_values) == 0
    assert spectral.rank90(update_values) == 0
    assert spectral.threshold_ratio(update_values, base.S, k) == 0
    assert spectral.value_shift(found.values, base.S) <= 1e-12
    assert spectral.intruders(max_cosines(found.cosines), k, 1 - 1e-12) == 0
    for cosines in (found.cosines, found.right_cosines):
        assert 1 - spectral.subspace_similarity(cosines, first) <= 1e-12
        assert spectral.principal_angles(cosines, first).max() <= 1e-12
        assert spectral.legacy_drift(cosines, first) <= 1e-12


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
        found = top_triplets_dense(base, weight, 64)
        assert found.method == "unchanged"
        assert_no_drift(found, base, none, 64)


def test_one_changed_weight_is_not_unchanged(real_weights):
    weight = real_weights[0, "q_proj"]
    tuned = weight.clone()
    tuned[3, 4] *= 1.001
    assert top_triplets_dense(svd(weight), tuned, 10).method != "unchanged"


# ------------------------------------------------------------------------------ intruders


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
        said = []
        reduce_intruder_dimension(
            model, top_k=k, threshold_epsilon=epsilon, logging_sink=said.append
        )
        model.delete_adapter("intruder_reduced")
        for name, layer in layers.items():
            line = next(line for line in said if name in line)
            expected = 0 if "No intruders" in line else int(line.rsplit(" ", 1)[1])
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            base = svd(layer.get_base_layer().weight)
            found = top_triplets_lora(base, A, B, layer.scaling["default"], k)
            assert spectral.intruders(max_cosines(found.cosines), k, epsilon) == expected
            total += expected
    assert total > 0


def test_a_planted_intruder_is_found_with_its_strength():
    """u and v spread evenly over 400 directions, so their cosines are 1/20; u^T W0 v = .097."""
    base = with_values(power_law(400), (400, 400))
    u, v = base.U.sum(1) / 20, base.Vh.sum(0) / 20
    k = 10  # sigma_10 = .316
    for strength, expected in ((3.0, 1), (0.1, 0)):
        A, B = v[None], strength * u[:, None]
        found = top_triplets_lora(base, A, B, 1.0, k)
        update = lora_update_svd(A, B, 1.0)
        assert abs(float(update.S[0]) - strength) < 1e-12
        assert spectral.intruders(max_cosines(found.cosines), k) == expected
        rho = spectral.threshold_ratio(update.S, base.S, k)
        assert abs(rho - strength * 10**0.5) < 1e-12
    A, B = v[None], 3 * u[:, None]
    strongest = top_triplets_lora(base, A, B, 1.0, k).leading(1)
    assert abs(float(strongest.values[0]) - 3.1) < 0.05
    assert max_cosines(strongest.cosines)[0] < 0.2


def test_counts_over_a_grid():
    counts = intruder_counts(torch.tensor([0.9, 0.2, 0.5, 0.4]), [1, 2, 4], [0.3, 0.5, 0.95])
    assert counts.tolist() == [[0, 0, 1], [1, 1, 2], [1, 2, 4]]
    with pytest.raises(ValueError, match="4 singular vectors"):
        intruder_counts(torch.ones(4), [5], [0.5])


# ------------------------------------------------------------------------- hand-computed values


def test_a_planted_rotation_has_the_similarity_computed_by_hand():
    base = with_values([5.0, 4.0, *torch.linspace(1, 0, 38).tolist()], (40, 40))
    angle = 0.3
    turned = base.U.clone()
    turned[:, 1] = math.cos(angle) * base.U[:, 1] + math.sin(angle) * base.U[:, 20]
    turned[:, 20] = math.cos(angle) * base.U[:, 20] - math.sin(angle) * base.U[:, 1]
    found = top_triplets_dense(base, turned * base.S @ base.Vh, 2)
    first = torch.eye(40, 2, dtype=torch.double)
    phi = spectral.subspace_similarities(found.cosines, first)
    expected = torch.tensor([[1, 1], [1, (1 + math.cos(angle) ** 2) / 2]], dtype=torch.double)
    assert (phi - expected).abs().max() < 1e-12
    assert abs(spectral.subspace_similarity(found.right_cosines, first) - 1) < 1e-12
    angles = spectral.principal_angles(found.cosines, first)
    assert (angles - torch.tensor([0, angle], dtype=torch.double)).abs().max() < 1e-12
    distance = 2 * math.sin(angle / 2)
    drift = spectral.legacy_drift(found.cosines, first)
    assert abs(drift - distance / (2 * 2**0.5)) < 1e-12


def test_random_subspaces_have_the_random_similarity():
    i, j, d = 8, 20, 400
    phi = [
        spectral.subspace_similarity(orthonormal(d, i, seed), orthonormal(d, j, seed + 100))
        for seed in range(50)
    ]
    assert abs(sum(phi) / 50 - spectral.random_similarity(i, j, d)) < 0.005


def test_principal_angles_of_subspaces_of_different_sizes():
    e = torch.eye(6, dtype=torch.double)
    plane = e[:, :2]
    line = (e[:, :1] + e[:, 4:5]) / 2**0.5
    assert torch.allclose(
        spectral.principal_angles(plane, line), torch.tensor([math.pi / 4]).double()
    )
    tiny = torch.stack([e[:, 0] + 1e-11 * e[:, 5], e[:, 3]], 1)
    found = spectral.principal_angles(tiny, plane)
    assert (found - torch.tensor([1e-11, math.pi / 2], dtype=torch.double)).abs().max() < 1e-15


def test_size_and_spread_by_hand():
    values = torch.tensor([3.0, 4.0, 0.0]).double().sort(descending=True)[0]
    assert spectral.stable_rank(values) == pytest.approx(25 / 16)
    entropy = -(3 / 7 * math.log(3 / 7) + 4 / 7 * math.log(4 / 7))
    assert spectral.effective_rank(values) == pytest.approx(math.exp(entropy))
    assert spectral.rank90(values) == 2
    assert spectral.rank90(torch.ones(10)) == 9
    assert spectral.effective_rank(torch.ones(10)) == pytest.approx(10)
    base = torch.tensor([10.0, 0.0]).double()
    assert spectral.relative_frobenius(values, base) == pytest.approx(0.5)
    assert spectral.relative_spectral(values, base) == pytest.approx(0.4)
    assert spectral.threshold_ratio(values, base, 1) == pytest.approx(0.4)
    assert spectral.threshold_ratio(values, base, 2) == math.inf
    assert spectral.value_shift(torch.tensor([13.0, 4.0]), base) == pytest.approx(0.5)


def test_the_spectrum_of_an_update_is_exact():
    for shape in SHAPES.values():
        A, B = lora(shape, 16, 3.0)
        update = lora_update_svd(A, B, -2.0)
        U, S, Vh = torch.linalg.svd(-2 * B @ A)
        assert (spectral.singular_values(-2 * B @ A) - S).abs().max() < 1e-12
        assert ((update.S - S[:16]) / S[:16]).abs().max() < 1e-12
        assert ((update.U * update.S @ update.Vh) + 2 * B @ A).abs().max() < 1e-13
        assert abs(spectral.subspace_similarity(update.U, U[:, :16]) - 1) < 1e-12
        assert abs(spectral.subspace_similarity(update.Vh.T, Vh[:16].T) - 1) < 1e-12


# ------------------------------------------------------------------------------- invariances

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
    base, A, B, found = problem(drawn)
    signs = torch.where(normal(len(base.S)) > 0, 1.0, -1.0).double()
    flipped = SVD(base.U * signs, base.S, signs[:, None] * base.Vh)
    again = top_triplets_lora(flipped, A, B, 1.0, 12)
    assert_same_drift(found, again)
    first = torch.eye(len(base.S), 12, dtype=torch.double)
    drifts = [spectral.legacy_drift(t.cosines, first) for t in (found, again)]
    assert abs(drifts[0] - drifts[1]) <= 1e-6
    opposite = top_triplets_lora(base, -A, -B, 1.0, 12)
    assert_same_drift(found, opposite)


@few
@given(PROBLEMS)
def test_an_orthogonal_change_of_basis_changes_nothing(drawn):
    base, A, B, found = problem(drawn)
    m, n = base.shape
    left, right = orthonormal(m, m, 21), orthonormal(n, n, 22)
    turned = SVD(left @ base.U, base.S, base.Vh @ right)
    assert_same_drift(found, top_triplets_lora(turned, A @ right, left @ B, 1.0, 12))


@few
@given(PROBLEMS)
def test_transposition_swaps_the_sides(drawn):
    base, A, B, found = problem(drawn)
    flipped = SVD(base.Vh.T, base.S, base.U.T)
    assert_same_drift(found, top_triplets_lora(flipped, B.T, A.T, 1.0, 12), swapped=True)
    first, second = lora_update_svd(A, B, 1.0), lora_update_svd(B.T, A.T, 1.0)
    assert (first.S - second.S).abs().max() <= 1e-12 * first.S[0]


@few
@given(PROBLEMS, st.floats(-6, 6))
def test_scaling_the_model_scales_the_values_alone(drawn, exponent):
    base, A, B, found = problem(drawn)
    factor = 10**exponent
    scaled = SVD(base.U, factor * base.S, base.Vh)
    again = top_triplets_lora(scaled, A, B, factor, 12)
    assert ((again.values - factor * found.values) / again.values).abs().max() <= 1e-9
    assert (max_cosines(again.cosines) - max_cosines(found.cosines)).abs().max() <= 1e-6
    for measure in (spectral.stable_rank, spectral.effective_rank, spectral.rank90):
        ours = measure(lora_update_svd(A, B, factor).S)
        assert ours == pytest.approx(measure(lora_update_svd(A, B, 1.0).S))


# -------------------------------------------------------------------------------- the cache


def test_a_cached_decomposition_is_read_back(tmp_path, monkeypatch):
    weight = normal(20, 30).bfloat16()
    first = cached_svd(weight, tmp_path / "base")
    assert torch.allclose(matrix_of(first), weight.double())
    monkeypatch.setattr(spectral, "svd", None)
    again = cached_svd(weight, tmp_path / "base")
    assert all((getattr(first, x) == getattr(again, x)).all() for x in ("U", "S", "Vh"))
    assert len(list((tmp_path / "base").iterdir())) == 1


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-100])


def half(path, other):
    path.write_bytes(path.read_bytes()[:40])


def empty(path, other):
    path.write_bytes(b"")


def flipped_bit(path, other):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def foreign(path, other):
    other.rename(path)


def without_metadata(path, other):
    save_file({"U": torch.eye(3), "S": torch.ones(3), "Vh": torch.eye(3)}, path)


@pytest.mark.parametrize("damage", [cut, half, empty, flipped_bit, foreign, without_metadata])
def test_a_damaged_or_foreign_cache_is_computed_again(tmp_path, damage, monkeypatch):
    weight = normal(20, 30)
    first = cached_svd(weight, tmp_path)
    (path,) = tmp_path.iterdir()
    cached_svd(weight + 1, tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    damage(path, other)
    again = cached_svd(weight, tmp_path)
    assert (again.S == first.S).all() and torch.allclose(matrix_of(again), weight)
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(spectral, "svd", None)  # the file is whole again
    assert (cached_svd(weight, tmp_path).U == again.U).all()


def test_weights_of_equal_bytes_but_another_shape_have_caches_of_their_own(tmp_path):
    weight = normal(20, 30)
    cached_svd(weight, tmp_path)
    assert cached_svd(weight.reshape(30, 20), tmp_path).shape == (30, 20)
    assert cached_svd(weight, tmp_path).shape == (20, 30)


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad, tmp_path):
    base = with_values(power_law(20), (20, 30))
    A, B, weight = normal(2, 30), normal(20, 2), matrix_of(base)
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
    with pytest.raises(ValueError, match="not finite"):
        cached_svd(spoilt, tmp_path)
    with pytest.raises(ValueError, match="scaling"):
        top_triplets_lora(base, A, B, bad, 4)


def test_a_k_that_is_not_in_the_matrix_is_refused():
    base = with_values(power_law(20), (20, 30))
    for k in (0, 21):
        with pytest.raises(ValueError, match="20 x 30 has 20 singular values"):
            top_triplets_lora(base, normal(2, 30), normal(20, 2), 1.0, k)
        with pytest.raises(ValueError, match="20 x 30 has 20 singular values"):
            top_triplets_dense(base, matrix_of(base), k)
        with pytest.raises(ValueError, match="has 20 singular values"):
            spectral.threshold_ratio(base.S, base.S, k)
    found = top_triplets_dense(base, matrix_of(base), 5)
    with pytest.raises(ValueError, match="5 triplets are known"):
        found.leading(6)


def test_shapes_that_do_not_fit_are_refused():
    base = with_values(power_law(20), (20, 30))
    with pytest.raises(ValueError, match="no pair of LoRA factors"):
        top_triplets_lora(base, normal(2, 30), normal(20, 3), 1.0, 4)
    with pytest.raises(ValueError, match="30 x 20 on a base of 20 x 30"):
        top_triplets_lora(base, normal(2, 20), normal(30, 2), 1.0, 4)
    with pytest.raises(ValueError, match="on a base of 20 x 30"):
        top_triplets_dense(base, normal(30, 20), 4)
    with pytest.raises(ValueError, match="without a direction"):
        spectral.subspace_similarity(torch.zeros(5, 0), torch.eye(5))
