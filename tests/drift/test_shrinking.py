"""Shrunk intruders against the formula in dense fp64, and against PEFT's own mitigation."""

import json

import pytest
import torch
from safetensors.torch import save_file
from simulated_gpu import OnGPU, SimulatedGPU
from synthetic_spectra import lora, power_law, weight_of, with_values

from lora_tradeoffs.drift.matrix import BaseSpectra
from lora_tradeoffs.drift.shrinking import directions
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.weights import Weights

SHAPES = {"q_proj": (320, 320), "v_proj": (120, 320), "o_proj": (320, 120)}
NAME = "model.layers.0.self_attn.{}".format
RANK = 12


def svd(matrix):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U, S, Vh


def is_intruder(weight, base):
    """Of the 10 leading left singular vectors of a weight, which are unlike all of the base's."""
    return (svd(base)[0].T @ svd(weight)[0][:, :10]).abs().amax(0) < 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of one layer, an adapter that makes intruders, and a full checkpoint of the same."""
    folder = tmp_path_factory.mktemp("intruders")
    base, factors, tuned = {}, {}, {}
    for seed, (module, shape) in enumerate(SHAPES.items()):
        weight = weight_of(with_values(power_law(min(shape)), shape, seed)).float()
        A, B = (factor.float() for factor in lora(shape, RANK, 1.2, seed))
        prefix = f"base_model.model.{NAME(module)}.lora_"
        base[f"{NAME(module)}.weight"] = weight
        factors |= {f"{prefix}A.weight": A, f"{prefix}B.weight": B}
        tuned[f"{NAME(module)}.weight"] = weight + 2 * B @ A
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 24, "target_modules": [*SHAPES]}
    for name, tensors in (("base", base), ("full", tuned), ("lora", factors)):
        (folder / name).mkdir()
        file = "adapter_model" if name == "lora" else "model"
        save_file(tensors, folder / name / f"{file}.safetensors", metadata={"format": "pt"})
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("run", ["lora", "full"])
def test_the_shrunk_weights_are_those_of_the_dense_formula(folder, tmp_path, run):
    weights = Weights(folder / "base")
    checkpoint = read_checkpoint(folder / run, weights)
    spectra, total = BaseSpectra(weights, tmp_path), 0
    for matrix in checkpoint.matrices:
        base = weights.tensor(matrix.tensor).double()
        if run == "lora":
            A, B, scale = checkpoint.factors(matrix)
            tuned = base + scale * B.double() @ A.double()
        else:
            tuned = checkpoint.weight(matrix).double()
        U, S, Vh = svd(tuned)
        found = directions(checkpoint, matrix, spectra)
        intruders = is_intruder(tuned, base).nonzero()[:, 0]
        assert found.chosen["intruders"].tolist() == intruders.tolist()
        control = found.chosen["control"]
        assert len(set(control.tolist())) == len(intruders)
        assert ((svd(base)[0].T @ U[:, control]).abs().amax(0) >= 0.5).all()
        total += len(intruders)
        for shrunk, indices in (("intruders", intruders), ("control", control)):
            for factor in (0.0, 0.25, 1.0, 1.5):
                left, right = found.change(shrunk, factor)
                ours = tuned + left @ right.T
                sizes = (factor - 1) * S[indices]
                expected = tuned + U[:, indices] * sizes @ Vh[indices]
                assert (ours - expected).abs().max() < 1e-5 * S[0]
                if factor == 1:
                    assert torch.equal(ours, tuned)
                if factor == 0:
                    assert (U[:, indices].T @ ours).norm(dim=1).max() < 1e-5 * S[0]
                    assert (ours @ Vh[indices].T).norm(dim=0).max() < 1e-5 * S[0]
                assert found.intruders(shrunk, factor) == int(is_intruder(expected, base).sum())
    assert total > 5


def test_the_control_has_the_nearest_singular_values(folder, tmp_path):
    """On a line the best matching keeps the order, so dynamic programming finds its cost."""
    weights = Weights(folder / "base")
    checkpoint = read_checkpoint(folder / "lora", weights)
    for matrix in checkpoint.matrices:
        found = directions(checkpoint, matrix, BaseSpectra(weights, tmp_path))
        intruders, control = (found.values[found.chosen[k]] for k in ("intruders", "control"))
        others = found.values[~found.is_unlike].tolist()
        costs = [0.0] * (len(others) + 1)
        for value in intruders.tolist():
            best = [float("inf")]
            for cost, other in zip(costs, others):
                best.append(min(best[-1], cost + abs(value - other)))
            costs = best
        assert float((intruders - control).abs().sum()) == pytest.approx(costs[-1], abs=1e-9)


@pytest.mark.filterwarnings("ignore:Adapter intruder_reduced")
def test_truncated_to_its_rank_the_update_is_pefts_mitigated_one(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    weights = Weights(folder / "base")
    checkpoint = read_checkpoint(folder / "lora", weights)
    model = torch.nn.ModuleDict(
        {m.module: torch.nn.Linear(*reversed(weights.shapes[m.tensor]), False)
         for m in checkpoint.matrices}
    )  # fmt: skip
    config = LoraConfig(r=RANK, lora_alpha=24, target_modules=[*SHAPES])
    model = get_peft_model(model, config).double()
    layers = {m: model.base_model.model[m.module] for m in checkpoint.matrices}
    for matrix, layer in layers.items():
        A, B, _ = checkpoint.factors(matrix)
        layer.base_layer.weight.data = weights.tensor(matrix.tensor).double()
        layer.lora_A["default"].weight.data = A.double()
        layer.lora_B["default"].weight.data = B.double()
    reduce_intruder_dimension(model, mitigation_lambda=0.25, logging_sink=None)
    for matrix, layer in layers.items():
        left, right = directions(checkpoint, matrix, BaseSpectra(weights, tmp_path)).change(
            "intruders", 0.25
        )
        A, B, scale = checkpoint.factors(matrix)
        U, S, Vh = svd(scale * B.double() @ A.double() + left @ right.T)
        ours = U[:, :RANK] * S[:RANK] @ Vh[:RANK]
        theirs = layer.get_delta_weight("intruder_reduced").detach()
        assert len(left.T) > 0 and (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("run", ["lora", "full"])
def test_intruders_are_found_on_the_device(folder, tmp_path, run):
    weights = Weights(folder / "base")
    checkpoint = read_checkpoint(folder / run, weights)
    matrix = checkpoint.matrices[0]
    expected = directions(checkpoint, matrix, BaseSpectra(weights, tmp_path / "cpu"))
    with SimulatedGPU():
        on_gpu = directions(checkpoint, matrix, BaseSpectra(weights, tmp_path / "gpu", "cuda"))
        for shrunk in on_gpu.chosen:
            assert on_gpu.intruders(shrunk, 0.5) == expected.intruders(shrunk, 0.5)
            for side, same in zip(on_gpu.change(shrunk, 0.5), expected.change(shrunk, 0.5)):
                assert type(side) is OnGPU and torch.equal(side.cpu(), same)
