"""What an adapter's or a checkpoint's update is, and which are refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import change_json, edited_tensors, moved

from config import UserError
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.base import load_base
from lora_tradeoffs.models.weights import FullCheckpoint, Weights

ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def weights(base):
    return Weights(base.folder)


def make_adapter(base, folder, **fields):
    """A PEFT folder with random B; the update of each of its layers, as PEFT has it."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **fields}
    config = LoraConfig(init_lora_weights=False, **fields)
    model = get_peft_model(load_base(base), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module.get_delta_weight("default").detach()
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and module.get_base_layer().weight.ndim == 2
    }


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_low_rank_on_the_embedding_and_the_head_counts_as_pefts_own(
    base, weights, tmp_path, module
):
    """As PEFT saves it by default, with a copy of the base's."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, r=4, target_modules=["q_proj", module])
    model = get_peft_model(load_base(base), config)
    model.save_pretrained(tmp_path)
    (layer,) = (m for n, m in model.named_modules() if n.endswith(module))
    square = float(layer.get_delta_weight("default").detach().double().square().sum())
    adapter = read_checkpoint(tmp_path, weights)
    assert {matrix.module for matrix in adapter.matrices} == {"q_proj"}
    name = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}[module]
    assert adapter.squares_outside() == {name: pytest.approx(square, rel=1e-5)}

    copies = {n.replace(".base_layer", ""): t for n, t in load_file(tmp_path / ADAPTER).items()}
    save_file(copies, tmp_path / ADAPTER, {"format": "pt"})  # as save_embedding_layers
    assert read_checkpoint(tmp_path, weights).squares_outside() == adapter.squares_outside()
    with edited_tensors(tmp_path / ADAPTER) as tensors:
        tensors |= {name: t + 1 for name, t in tensors.items() if "lora" not in name}
    with pytest.raises(UserError, match="was trained on another base"):
        read_checkpoint(tmp_path, weights)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"rank_pattern": {"v_proj": 3}, "use_rslora": True},
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r".*layers\.1\.self_attn\.[kv]_proj"},
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]},
    ],
    ids=str,
)
def test_the_update_is_pefts_own(base, weights, tmp_path, fields):
    deltas = make_adapter(base, tmp_path, **fields)
    adapter = read_checkpoint(tmp_path, weights)
    assert {matrix.name for matrix in adapter.matrices} == set(deltas)
    for matrix in adapter.matrices:
        A, B, scale = adapter.factors(matrix)
        assert torch.allclose(scale * B @ A, deltas[matrix.name], atol=1e-6)
    if fields.get("target_modules") == "all-linear":  # PEFT saves the names that it stands for
        change_json(tmp_path / "adapter_config.json", target_modules="All-Linear")
        assert read_checkpoint(tmp_path, weights).matrices == adapter.matrices


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "type 'PREFIX_TUNING', not of LORA, OFT"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "may change the base"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]"),
        ({"of_tomorrow": {"k": 2}}, "of_tomorrow is"),
        ({"r": 0}, "its r is 0"),
        ({"r": 5}, "do not fit rank 5"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "no weight for layer 0 o_proj"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(base, weights, tmp_path, fields, named):
    make_adapter(base, tmp_path)
    change_json(tmp_path / "adapter_config.json", **fields)
    with pytest.raises(UserError, match=named):
        read_checkpoint(tmp_path, weights)


def test_an_adapter_with_broken_tensors_is_refused(base, weights, tmp_path):
    key = "base_model.model.model.layers.1.self_attn.{}.lora_{}.weight".format

    def refused(name, change, message):
        make_adapter(base, tmp_path / name)
        with edited_tensors(tmp_path / name / ADAPTER) as tensors:
            change(tensors)
        with pytest.raises(UserError, match=message):
            read_checkpoint(tmp_path / name, weights)

    refused("half", lambda t: t.pop(key("v_proj", "B")), "layer 1 v_proj has no lora_B")
    refused("shape", lambda t: t.update({key("q_proj", "B"): torch.zeros(7, 4)}), "do not fit")
    refused(
        "empty",
        lambda t: t.update({key("q_proj", "A"): torch.zeros(0, 32)}),
        "layer 1 q_proj has rank 0",
    )
    refused(
        "layers",
        lambda t: t.update({key("q_proj", f).replace("1", "9"): torch.zeros(1) for f in "AB"}),
        "layer 9 q_proj: the base has no such matrix",
    )
    refused("other", lambda t: t.update({"some.weight": torch.zeros(1)}), "no factor of LoRA")
    path = tmp_path / "cut" / ADAPTER
    make_adapter(base, path.parent)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is corrupt"):
        read_checkpoint(path.parent, weights)
    path.unlink()
    with pytest.raises(UserError, match=r"cut holds no adapter_model\.safetensors$"):
        read_checkpoint(path.parent, weights)


def save_full(base, folder, shard="10MB", noise=0.01):
    torch.manual_seed(1)
    model = moved(load_base(base), noise)
    model.save_pretrained(folder, max_shard_size=shard)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


@pytest.mark.parametrize("shard", ["10MB", "20KB"])
def test_a_full_checkpoint_gives_matrices_and_norms_whole_or_sharded(
    base, weights, tmp_path, shard, monkeypatch
):
    monkeypatch.setattr("lora_tradeoffs.models.weights.BLOCK", 5000)
    tuned = save_full(base, tmp_path, shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    start = {name: tensor.detach() for name, tensor in load_base(base).named_parameters()}
    checkpoint = FullCheckpoint(tmp_path, weights)
    assert checkpoint.tensors == sorted(tuned)
    for name, weight in tuned.items():
        update, square = checkpoint.squares(name)
        assert update == pytest.approx(float((weight - start[name]).double().square().sum()))
        assert square == pytest.approx(float(start[name].double().square().sum()))
    assert len(checkpoint.matrices) == 14  # seven in each of two layers
    for matrix in checkpoint.matrices:
        assert torch.equal(checkpoint.weight(matrix), tuned[matrix.tensor])


@pytest.mark.parametrize("kept", ["both", "head"])
def test_a_tied_head_counts_once_under_either_name(base, weights, tmp_path, kept):
    save_full(base, tmp_path)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        if kept == "head":
            del tensors["model.embed_tokens.weight"]
    checkpoint = FullCheckpoint(tmp_path, weights)
    assert "lm_head.weight" not in checkpoint.tensors
    assert checkpoint.squares("model.embed_tokens.weight")[0] > 0


def test_a_head_of_its_own_counts_and_is_measured_against_the_tied_one(base, weights, tmp_path):
    save_full(base, tmp_path)
    head = torch.randn(weights.shapes["model.embed_tokens.weight"])
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        tensors["lm_head.weight"] = head
    checkpoint = FullCheckpoint(tmp_path, weights)
    start = load_base(base).lm_head.weight.detach()
    update, square = checkpoint.squares("lm_head.weight")
    assert update == pytest.approx(float((head - start).double().square().sum()))
    assert square == pytest.approx(float(start.double().square().sum()))
    change_json(tmp_path / "config.json", tie_word_embeddings=False)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"lacks lm_head\.weight, and its config\.json"):
        FullCheckpoint(tmp_path, weights)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."],
)
def test_names_of_wrapped_models_are_those_of_the_model(base, weights, tmp_path, prefix):
    tuned = save_full(base, tmp_path)
    with edited_tensors(tmp_path / "model.safetensors") as tensors:
        for name in list(tensors):
            tensors[prefix + name.replace("mlp", f"{prefix}mlp")] = tensors.pop(name)
    checkpoint = FullCheckpoint(tmp_path, weights)
    for matrix in checkpoint.matrices:
        assert torch.equal(checkpoint.weight(matrix), tuned[matrix.tensor])

    for inside in ("model.language_model.", "language_model.model."):  # a multimodal model
        save_full(base, tmp_path)
        with edited_tensors(tmp_path / "model.safetensors") as tensors:
            for name in list(tensors):
                tensors[name.replace("model.", inside)] = tensors.pop(name)
        assert FullCheckpoint(tmp_path, weights).tensors == checkpoint.tensors


def test_the_files_of_a_model_are_those_that_transformers_reads(base, weights, tmp_path):
    from transformers import AutoModelForCausalLM

    tuned = save_full(base, tmp_path, "20KB")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.zeros(32, 32), "x": torch.zeros(2)}, tmp_path / "a.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    ours = Weights(tmp_path)
    assert set(ours.shapes) == set(tuned) and "x" not in ours.shapes
    assert all(torch.equal(ours.tensor(name), theirs[name]) for name in tuned)

    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())

    def refused(message, **files):
        index.write_text(json.dumps({**whole, "weight_map": {**whole["weight_map"], **files}}))
        with pytest.raises(UserError, match=message):
            Weights(tmp_path)

    for path in ("../outside.safetensors", "/etc/x.safetensors", 7, None, "x\0.safetensors"):
        refused("the name of a safetensors file in the same|damaged: weight_map", **{name: path})
    refused("q_proj.weight occurs twice, here and in a.safetensors", **{name: "a.safetensors"})
    refused("holds no model-of-nobody.safetensors", **{name: "model-of-nobody.safetensors"})
    index.write_text('{"weight_map": []}')
    with pytest.raises(UserError, match="is damaged: weight_map"):
        Weights(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a whole model and an adapter"):
        Weights(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(base, weights, tmp_path):
    name = "model.layers.1.self_attn.v_proj.weight"

    def refused(folder, change, message):
        save_full(base, tmp_path / folder)
        with edited_tensors(tmp_path / folder / "model.safetensors") as tensors:
            change(tensors)
        with pytest.raises(UserError, match=message):
            FullCheckpoint(tmp_path / folder, weights)

    refused("less", lambda t: t.pop(name), f"lacks {name}")
    refused("more", lambda t: t.update({name + "2": torch.zeros(1)}), "the base has not")
    refused(
        "other", lambda t: t.update({name: torch.zeros(8, 32)}), r"is \(8, 32\), not \(16, 32\)"
    )
    with pytest.raises(UserError, match="holds no"):
        FullCheckpoint(tmp_path, weights)
