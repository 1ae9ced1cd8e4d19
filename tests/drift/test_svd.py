"""Decompositions agree with dense ones, and the cache on disk returns what was computed."""

import math

import pytest
import torch
from reference import subspace_similarities
from safetensors.torch import save_file
from synthetic_spectra import SHAPES, lora, normal, weight_of

from lora_tradeoffs.drift import svd as svd_module
from lora_tradeoffs.drift.svd import cached_svd, lora_update_svd, singular_values, svd


def test_the_spectrum_of_an_update_is_exact():
    for shape in SHAPES.values():
        A, B = lora(shape, 16, 3.0)
        update = lora_update_svd(A, B, -2.0)
        U, S, Vh = torch.linalg.svd(-2 * B @ A)
        assert (singular_values(-2 * B @ A) - S).abs().max() < 1e-12
        assert ((update.S - S[:16]) / S[:16]).abs().max() < 1e-12
        assert ((update.U * update.S @ update.Vh) + 2 * B @ A).abs().max() < 1e-13
        assert abs(subspace_similarities(update.U, U[:, :16])[-1, -1] - 1) < 1e-12
        assert abs(subspace_similarities(update.Vh.T, Vh[:16].T)[-1, -1] - 1) < 1e-12


def test_the_spectrum_of_an_update_whose_rank_is_above_the_matrix():
    A, B = lora((20, 30), 50, 0.5)
    dense = torch.linalg.svdvals(B @ A)
    assert (lora_update_svd(A, B, 1.0).S - dense).abs().max() < 1e-14


def test_where_divide_and_conquer_fails_another_method_answers(monkeypatch):
    def failing(*_, **__):
        raise torch.linalg.LinAlgError("failed to converge")

    weight = normal(30, 20)
    expected = svd(weight)
    monkeypatch.setattr(torch.linalg, "svd", failing)
    result = svd(weight)
    assert (result.S - expected.S).abs().max() < 1e-13
    assert (weight_of(result) - weight).abs().max() < 1e-13


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad, tmp_path):
    weight = normal(20, 30)
    weight[1, 1] = bad
    with pytest.raises(ValueError, match="not finite"):
        cached_svd(weight, tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- the cache


def test_a_cached_decomposition_is_read_back(tmp_path, monkeypatch):
    weight = normal(20, 30).bfloat16()
    first = cached_svd(weight, tmp_path / "base")
    assert torch.allclose(weight_of(first), weight.double())
    monkeypatch.setattr(svd_module, "svd", None)
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
    assert (again.S == first.S).all() and torch.allclose(weight_of(again), weight)
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(svd_module, "svd", None)  # the file is whole again
    assert (cached_svd(weight, tmp_path).U == again.U).all()


def test_weights_of_equal_bytes_but_another_shape_have_caches_of_their_own(tmp_path):
    weight = normal(20, 30)
    cached_svd(weight, tmp_path)
    assert cached_svd(weight.reshape(30, 20), tmp_path).shape == (30, 20)
    assert cached_svd(weight, tmp_path).shape == (20, 30)
