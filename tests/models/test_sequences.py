"""Any adapters and checkpoints in any order: each computes what it computes alone, or is refused.

The references are plain PEFT and plain Transformers on a fresh model for each.
"""

import random
import shutil

import pytest
import torch
from support import change_json, edited_tensors, moved, settings_for

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base
from lora_tradeoffs.models.checkpoint_models import checkpoint_models, scaled_updates
from lora_tradeoffs.models.weights import Weights
from lora_tradeoffs.retention.benchmarks import text_log_likelihoods

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PROMPT = torch.tensor([[5, 17, 400, 23, 77]])
ADAPTERS = {
    "plain": {},
    "rslora": {"use_rslora": True, "target_modules": ["o_proj", "up_proj"]},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers\.1\..*": 30}},
    "expression": {"target_modules": r".*\.1\.self_attn\.(q|v)_proj"},
    "dora": {"use_dora": True},
    "bias_all": {"bias": "all"},
    "bias_lora": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "head_saved": {"modules_to_save": ["lm_head"]},
    "embedding_saved": {"modules_to_save": ["embed_tokens"]},
    "both_saved": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"trainable_token_indices": [5, 400]},
    "parameters": {"target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}
FULL = {  # fields of config.json
    "full": {},
    "eps": {"rms_norm_eps": 0.1},
    "heads": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "activation": {"hidden_act": "gelu"},
    "untied": {"tie_word_embeddings": False},
    "other_head": {},  # config.json says that it is tied
}
REFUSED = {  # by what the error has to name
    "pissa": "init_lora_weights is 'pissa'",
    "lora_ga": "init_lora_weights is 'lora_ga'",
    "replicated": "layer_replication is",
    "lacks": "1 are missing",
    "rank": "does not fit the base",
    "other_embedding": "was trained on another base",
    "both": "holds a whole model and an adapter",
    "unknown_activation": "unknown name 'nothing'",
    "shape": "does not fit the base",
}


def logits_of(model):
    with torch.no_grad():
        return model.eval()(PROMPT).logits


def fresh(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def zoo(tiny, tmp_path_factory):
    """The base, and a folder of every kind with its logits, or what its error has to name."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("zoo")
    shutil.copytree(tiny, root / "base")
    change_json(root / "base" / "config.json", attention_bias=True)
    with edited_tensors(root / "base" / "model.safetensors") as tensors:
        for name in [n for n in tensors if "self_attn" in n]:
            bias = torch.randn(len(tensors[name])) / 10
            tensors[name.replace(".weight", ".bias")] = bias
    expected = {}
    for name, options in ADAPTERS.items():
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **options}
        moved(get_peft_model(fresh(root / "base"), LoraConfig(**options))).save_pretrained(
            root / name
        )
        expected[name] = logits_of(PeftModel.from_pretrained(fresh(root / "base"), root / name))
    for name, fields in FULL.items():
        moved(fresh(root / "base")).save_pretrained(root / name)
        change_json(root / name / "config.json", **fields)
        if name in ("untied", "other_head"):
            with edited_tensors(root / name / "model.safetensors") as tensors:
                rows = len(tensors["model.embed_tokens.weight"])
                tensors["lm_head.weight"] = torch.randn(rows, 32)
        expected[name] = logits_of(fresh(root / name))
    break_copies(root)
    return prepare_base(settings_for(model=str(root / "base"))), root, expected | REFUSED


def break_copies(root):
    """The folders of REFUSED."""
    for name in ("pissa", "lora_ga", "replicated", "lacks", "rank"):
        shutil.copytree(root / "plain", root / name)
    change_json(root / "pissa" / CONFIG, init_lora_weights="pissa")
    change_json(root / "lora_ga" / CONFIG, init_lora_weights="lora_ga")
    change_json(root / "replicated" / CONFIG, layer_replication=[[0, 2], [0, 2]])
    with edited_tensors(root / "lacks" / ADAPTER) as tensors:
        del tensors[min(tensors)]
    change_json(root / "rank" / CONFIG, r=5)
    shutil.copytree(root / "embedding", root / "other_embedding")
    with edited_tensors(root / "other_embedding" / ADAPTER) as tensors:
        (name,) = (n for n in tensors if "base_layer" in n)
        tensors[name] += 1
    shutil.copytree(root / "full", root / "both")
    shutil.copy(root / "plain" / "adapter_config.json", root / "both")
    for name in ("unknown_activation", "shape"):
        shutil.copytree(root / "full", root / name)
    change_json(root / "unknown_activation" / "config.json", hidden_act="nothing")
    with edited_tensors(root / "shape" / "model.safetensors") as tensors:
        tensors["model.norm.weight"] = torch.ones(31)


def check(zoo, names):
    """Also after lm-eval had the model, which ties the head to the embedding of any."""
    base, root, expected = zoo
    tokenizer = load_tokenizer(base)
    wanted = [Checkpoint(name, i, root / name) for i, name in enumerate(names)]
    results = []
    for checkpoint, model in checkpoint_models(base, wanted):
        if checkpoint is None:
            assert torch.allclose(logits_of(model), logits_of(fresh(base.folder)), atol=1e-6)
            continue
        results.append(checkpoint)
        right = expected[checkpoint.run]
        if isinstance(right, str):
            assert isinstance(model, UserError) and right in str(model), (checkpoint.run, model)
            assert len(str(model).splitlines()) == 1
        else:
            assert not isinstance(model, UserError), (checkpoint.run, model)
            for _ in range(2):
                gap = float((logits_of(model) - right).abs().max())
                assert gap < 2e-5, (checkpoint.run, gap, names)
                text_log_likelihoods(model, tokenizer, ["A"])
    assert sorted(results, key=lambda c: c.step) == wanted


def test_each_kind_differs_from_every_other_and_from_the_base(zoo):
    base, _, expected = zoo
    logits = [logits_of(load_base(base)), *(e for e in expected.values() if not isinstance(e, str))]
    for i, first in enumerate(logits):
        for second in logits[i + 1 :]:
            assert float((first - second).abs().max()) > 1e-2


def test_every_kind_once_and_a_plain_adapter_after_each(zoo):
    names = list(zoo[2])
    check(zoo, [name for pair in zip(names, ["plain"] * len(names)) for name in pair])


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, 60))]
)
def test_any_sequence_of_ten_is_each_alone(zoo, seed):
    check(zoo, random.Random(seed).choices(list(zoo[2]), k=10))


def test_a_base_with_a_head_of_its_own_keeps_it_though_its_config_ties_it(zoo, tmp_path):
    _, root, expected = zoo
    for path in (root / "base").glob("tokenizer*"):
        shutil.copy(path, root / "other_head")
    base = prepare_base(settings_for(model=str(root / "other_head")))
    assert torch.allclose(logits_of(load_base(base)), expected["other_head"], atol=1e-6)
    moved(load_base(base)).save_pretrained(tmp_path / "tuned")
    wanted = [Checkpoint("tuned", 1, tmp_path / "tuned"), Checkpoint("full", 2, root / "full")]
    right = {"tuned": logits_of(fresh(tmp_path / "tuned")), "full": expected["full"]}
    for checkpoint, model in checkpoint_models(base, wanted):
        if checkpoint:
            assert torch.allclose(logits_of(model), right[checkpoint.run], atol=2e-5)
            if checkpoint.run == "tuned":
                scaled = scaled_updates(base, checkpoint, model, [0])
                assert torch.equal(logits_of(next(scaled)[1]), logits_of(load_base(base)))
                scaled.close()
            else:
                with pytest.raises(UserError, match="cannot be scaled: it computes with its own"):
                    next(scaled_updates(base, checkpoint, model, [0]))
    tuned = read_checkpoint(tmp_path / "tuned", Weights(base.folder))
    assert "lm_head.weight" in tuned.tensors and tuned.squares("lm_head.weight")[0] > 1
