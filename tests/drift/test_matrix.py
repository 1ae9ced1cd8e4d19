"""The rows of one matrix: what leaves them unchanged, and the method that they record."""

import json
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from simulated_gpu import SimulatedGPU
from support import settings_for

from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.drift import solver
from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions, DriftUnit
from lora_tradeoffs.drift.matrix import BaseSpectra, DriftSettings, measure
from lora_tradeoffs.drift.svd import SVD
from lora_tradeoffs.measuring.subjects import Subject, no_arm
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.models.weights import Weights

SHAPES = {"q_proj": (320, 320), "v_proj": (120, 320)}
SETTINGS = DriftSettings((4, 10), (0.3, 0.5, 0.9))
UNCHANGED = {"phi": 1}  # the values of an unchanged matrix; all others are 0


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def name_of(module):
    return f"model.layers.0.self_attn.{module}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of one layer, and checkpoints of it: unchanged and changed, LoRA and full."""
    folder = tmp_path_factory.mktemp("made-up")
    weights = {}
    for seed, (module, (m, n)) in enumerate(SHAPES.items()):
        p = min(m, n)
        values = torch.arange(1, p + 1).double() ** -0.5
        left = torch.linalg.qr(normal(m, p, seed=seed))[0]
        right = torch.linalg.qr(normal(n, p, seed=seed + 10))[0]
        weights[f"{name_of(module)}.weight"] = (left * values @ right.T).float()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(SHAPES)}
    for run, strength in (("lora", 1.0), ("still_lora", 0.0)):
        (folder / run).mkdir()
        factors = {}
        for module, (m, n) in SHAPES.items():
            prefix = f"base_model.model.{name_of(module)}.lora_"
            factors[f"{prefix}A.weight"] = normal(4, n, seed=20).float() / n**0.5
            factors[f"{prefix}B.weight"] = strength * normal(m, 4, seed=21).float() / m**0.5
        save_file(factors, folder / run / "adapter_model.safetensors")
        (folder / run / "adapter_config.json").write_text(json.dumps(config))
    for run, noise in (("base", 0.0), ("full", 2e-4), ("still_full", 0.0)):
        (folder / run).mkdir()
        tuned = {
            name: weight + noise * normal(*weight.shape, seed=30).float()
            for name, weight in weights.items()
        }
        save_file(tuned, folder / run / "model.safetensors", metadata={"format": "pt"})
    return folder


class FlippedSpectra(BaseSpectra):
    """Another SVD of the same weights: some pairs of singular vectors have other signs."""

    def svd(self, matrix):
        base = super().svd(matrix)
        signs = normal(len(base.S), seed=40).sign()
        return SVD(base.U * signs, base.S, signs[:, None] * base.Vh)


def drifts(folder, run, cache, spectra=BaseSpectra, settings=SETTINGS):
    weights = Weights(folder / "base")
    checkpoint = read_checkpoint(folder / run, weights)
    base = spectra(weights, cache)
    return {m.module: measure(checkpoint, m, base, settings) for m in checkpoint.matrices}


@pytest.mark.parametrize("is_dense", [False, True], ids=["fast", "dense"])
@pytest.mark.parametrize("run", ["lora", "full"])
def test_signs_of_the_cached_vectors_change_nothing(folder, tmp_path, run, is_dense):
    settings = replace(SETTINGS, dense=is_dense, directions=8)
    first = drifts(folder, run, tmp_path, settings=settings)
    second = drifts(folder, run, tmp_path, FlippedSpectra, settings)
    assert first["q_proj"].method == ("dense" if is_dense else "iterative")
    for module, drift in first.items():
        again = second[module]
        (residual,) = (row["value"] for row in drift.rows if row["metric"] == "residual")
        assert 0 < residual < (1e-13 if drift.method == "dense" else 1e-6)
        assert again.method == drift.method
        assert len(drift.rows) == len(again.rows) > 20
        for row, other in zip(drift.rows, again.rows):
            assert abs(row["value"] - other["value"]) <= 1e-12 * max(1, abs(row["value"])), row
            assert row | {"value": 0} == other | {"value": 0}
        assert (drift.tuned_values - again.tuned_values).abs().max() <= 1e-12
        assert (drift.similarity - again.similarity).abs().max() <= 1e-9


@pytest.mark.parametrize("is_dense", [False, True], ids=["fast", "dense"])
@pytest.mark.parametrize("run", ["lora", "full", "still_lora"])
def test_a_matrix_is_decomposed_on_the_device_and_its_results_are_on_the_cpu(
    folder, tmp_path, run, is_dense
):
    settings = replace(SETTINGS, dense=is_dense, directions=8)
    expected = drifts(folder, run, tmp_path / "cpu", settings=settings)
    with SimulatedGPU():
        spectra = partial(BaseSpectra, device="cuda")
        for cache in ("computed", "read"):
            on_gpu = drifts(folder, run, tmp_path / "gpu", spectra, settings)
            for module, drift in expected.items():
                for row, other in zip(on_gpu[module].rows, drift.rows, strict=True):
                    assert row == other | {"value": pytest.approx(other["value"], abs=1e-12)}, cache
                for field in ("base_values", "tuned_values", "update_values", "similarity"):
                    tensor = getattr(on_gpu[module], field)
                    assert type(tensor) is torch.Tensor
                    assert (tensor - getattr(drift, field)).abs().max() < 1e-9
                for side, basis in zip(on_gpu[module].directions, drift.directions, strict=True):
                    assert type(side) is torch.Tensor and side.shape == basis.shape


@pytest.mark.parametrize("spectra", [BaseSpectra, FlippedSpectra])
@pytest.mark.parametrize("run", ["still_lora", "still_full"])
def test_an_unchanged_matrix_has_no_drift_whatever_the_signs(folder, tmp_path, run, spectra):
    for drift in drifts(folder, run, tmp_path, spectra).values():
        assert drift.method == "unchanged"
        for row in drift.rows:
            assert abs(row["value"] - UNCHANGED.get(row["metric"], 0)) <= 1e-12, row


def test_a_matrix_smaller_than_every_k_has_its_size_measures_alone(folder, tmp_path):
    measured = drifts(folder, "lora", tmp_path, settings=DriftSettings((200,), (0.5,)))
    assert {row["k"] for row in measured["q_proj"].rows} == {None, 200}
    assert {row["k"] for row in measured["v_proj"].rows} == {None}


def test_a_fallback_is_recorded_and_printed(folder, tmp_path, monkeypatch):
    base = Base("made-up", folder / "base", folder, {"digest": ""})
    checkpoint = Checkpoint("lora", 0, folder / "lora")
    unit = DriftUnit(Subject("lora", 0, checkpoint, no_arm("lora"), None, False, False))
    settings = replace(settings_for(study="fallback"), output_dir=tmp_path)
    options = DriftOptions(SETTINGS.ks, SETTINGS.epsilons, workers=1)
    analysis = DriftAnalysis(settings, base, options)
    weights = read_checkpoint(checkpoint.folder, analysis.weights)
    with monkeypatch.context() as patch:
        patch.setattr(solver, "TOLERANCE", 0.0)  # never reached
        analysis.write(unit, analysis.measure(weights, unit))
    analysis.derived_records()
    ((_, document),) = analysis.results.units()
    records = pd.DataFrame(document["records"]).query("layer == 0")
    for table in (records, pd.read_parquet(analysis.results.folder / "drift_layers.parquet")):
        methods = table.groupby("module", observed=True)["decomposition"].unique().map(list)
        assert methods.to_dict() == {"q_proj": ["dense after iterative"], "v_proj": ["dense"]}
    assert analysis.outputs()["2 decompositions"] == "1 dense, 1 dense after iterative"
