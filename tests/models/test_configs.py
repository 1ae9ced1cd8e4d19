"""config.json, index and adapter_config.json of strangers: read, or refused in one line."""

import copy
import json
import shutil

import pytest
import torch
from conftest import tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import change_json, ends_or_refuses, settings_for

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint, weights_key
from lora_tradeoffs.models.adapters import read_checkpoint
from lora_tradeoffs.models.base import (
    empty_model,
    load_base,
    load_tokenizer,
    prepare_base,
    read_model_config,
)
from lora_tradeoffs.models.checkpoint_models import checkpoint_models
from lora_tradeoffs.models.configs import adapter_fields, differing_fields, read_config
from lora_tradeoffs.models.weights import Weights

PROMPT = torch.tensor([[5, 17, 200, 23]])
JUNK = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 3, 16, 10**12, 10**400, 0.5, 1e400, "", "8"]),
    st.sampled_from([float("nan"), [], {}, [1], [[]], {"a": 1}, {"rope_type": "yarn"}, "\ud800"]),
    st.sampled_from(["flash_attention_2", "a/b", "../x", "(", r"(\w+\.?)+!", "(.*)*x", "none"]),
    st.recursive(
        st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=4,
    ),
).map(copy.deepcopy)  # a value that was drawn may be changed within, too
# Fields beside those of the file that change what is loaded, or how.
FIELDS = {
    "config.json": (
        *("attn_implementation", "_attn_implementation", "quantization_config", "auto_map"),
        *("rope_scaling", "rope_theta", "dtype", "torch_dtype", "transformers_weights"),
        *("sliding_window", "layer_types", "text_config", "use_bidirectional_attention"),
    ),
    "model.safetensors.index.json": ("weight_map", "metadata"),
    "adapter_config.json": ("use_dora", "trainable_token_indices", "layers_pattern", "of_tomorrow"),
}


@st.composite
def mutations(draw, value, extra):
    """The JSON value with one or two of its fields, at any depth, removed or made another."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        place = value
        key = draw(st.sampled_from(sorted({*place, *extra})))
        while isinstance(place.get(key), dict) and place[key] and draw(st.booleans()):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)))
        if draw(st.integers(0, 4)):
            place[key] = draw(JUNK)
        else:
            place.pop(key, None)
    return value if draw(st.integers(0, 30)) else draw(JUNK)


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A sharded base, a healthy adapter and its logits, and a folder of each to change.

    Its tokenizer has no merges: reading SmolLM2's would take most of an example's time.
    """
    from peft import LoraConfig, get_peft_model

    root = tmp_path_factory.mktemp("strangers")
    tiny_llama(root / "whole", tokenizer.train_new_from_iterator([], 300))
    shutil.copytree(root / "whole", root / "base")
    (root / "base" / "model.safetensors").unlink()
    base = prepare_base(settings_for(model=str(root / "whole")))
    load_base(base).save_pretrained(root / "base", max_shard_size="20KB")
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        init_lora_weights=False,
    )
    model = get_peft_model(load_base(base), adapter).eval()
    model.save_pretrained(root / "adapter", save_embedding_layers=False)
    shutil.copytree(root / "adapter", root / "changed")
    with torch.no_grad():
        logits = model(PROMPT).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_tradeoffs.models.configs.MATCHING_SECONDS", 0.5)
        yield base, root, logits


def use(folder):
    """All that a command does with a base: plan, identify, load, and read for drift."""
    settings = settings_for(model=str(folder))
    empty_model(read_model_config(settings), "it")
    base = prepare_base(settings)
    load_tokenizer(base)
    with torch.no_grad():
        assert load_base(base)(PROMPT).logits.isfinite().all()
    shutil.rmtree(base.tokenizer_folder)  # one for every example
    return base


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@given(data=st.data())
def test_a_changed_base_is_read_or_refused(folders, name, data):
    path = folders[1] / "base" / name
    whole = path.read_text()
    try:
        path.write_text(json.dumps(data.draw(mutations(json.loads(whole), FIELDS[name]))))
        with ends_or_refuses():
            use(path.parent)
    finally:
        path.write_text(whole)


@pytest.mark.fuzz
@given(data=st.data())
def test_a_changed_adapter_is_read_or_refused_and_the_next_is_itself(folders, data):
    base, root, expected = folders
    whole = json.loads((root / "adapter" / "adapter_config.json").read_text())
    changed = data.draw(mutations(whole, FIELDS["adapter_config.json"]))
    (root / "changed" / "adapter_config.json").write_text(json.dumps(changed))
    wanted = [Checkpoint(name, 0, root / name) for name in ("changed", "adapter")]
    with ends_or_refuses(), torch.no_grad():
        models = {c.run: m if isinstance(m, UserError) else m(PROMPT).logits
                  for c, m in checkpoint_models(base, wanted) if c}  # fmt: skip
    assert torch.equal(models["adapter"], expected)
    with ends_or_refuses():
        read_checkpoint(root / "changed", Weights(base.folder))
    if isinstance(models["changed"], UserError):
        with ends_or_refuses():
            raise models["changed"]


def edited(folders, tmp_path, source, name, **fields):
    """A copy of one of the folders in which fields of one file have other values."""
    shutil.copytree(folders[1] / source, tmp_path / source)
    change_json(tmp_path / source / name, **fields)
    return tmp_path / source


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps"),
        ({"num_hidden_layers": 10**9}, "its num_hidden_layers is 1000000000"),
        ({"hidden_size": 64}, "does not fit its config.json"),
        ({"rms_norm_eps": float("nan")}, "its logits are not finite"),
        ({"is_causal": False}, "its attention is bidirectional"),
    ],
    ids=str,
)
def test_a_base_that_cannot_be_used_is_one_line(folders, tmp_path, fields, says):
    folder = edited(folders, tmp_path, "base", "config.json", **fields)
    with ends_or_refuses() as lines:
        use(folder)
    assert says in lines[0] and str(folder) in lines[0]


def test_attention_and_files_that_a_base_names_are_not_used(folders, tmp_path):
    names = {"attn_implementation": "kernels-of/nobody", "transformers_weights": "../x.safetensors"}
    folder = edited(folders, tmp_path, "base", "config.json", **names)
    assert load_base(use(folder)).config._attn_implementation == "sdpa"


def test_what_tools_note_in_a_config_is_no_other_computation(folders, tmp_path):
    notes = {"_attn_implementation_autoset": True, "unsloth_version": "1", "torch_dtype": "float16"}
    noted = edited(folders, tmp_path, "base", "config.json", **notes, max_window_layers=1)
    first, second = read_config(noted), read_config(folders[1] / "base")
    assert differing_fields(first, second) == ["max_window_layers"]


def test_a_newer_tokenizer_and_an_adapter_in_a_base_are_one_line(folders, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(folders[1] / "base", folder)
    shutil.copy(folders[1] / "adapter" / "adapter_config.json", folder)
    with pytest.raises(UserError, match="holds a whole model and an adapter"):
        use(folder)
    (folder / "adapter_config.json").unlink()
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["type"] = "BPE2"
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="cannot read the tokenizer in"):
        use(folder)


def test_what_a_base_computes_is_its_identity(folders, tmp_path):
    folder = edited(folders, tmp_path, "base", "config.json")
    first, of_first = use(folder), weights_key(folder)
    change_json(folder / "generation_config.json", max_length=99)
    assert use(folder).digest == first.digest and weights_key(folder) == of_first
    for name, fields in (
        ("config.json", {"rms_norm_eps": 0.5}),
        ("config.json", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        ("generation_config.json", {"eos_token_id": [2, 5]}),
        ("tokenizer_config.json", {"eos_token": "<|endoftext|>"}),
    ):
        path = folder / name
        whole = path.read_text()
        change_json(path, **fields)
        other = use(folder)
        assert other.digest != first.digest and other.name != first.name
        assert (weights_key(folder) == of_first) == name.startswith("tokenizer")
        eos_token = load_tokenizer(other).eos_token
        path.write_text(whole)
    assert eos_token == "<|endoftext|>" != load_tokenizer(first).eos_token
    save_file({"x": torch.zeros(2)}, folder / "stray.safetensors")
    assert use(folder).digest == first.digest


def test_a_pattern_that_does_not_end_is_refused(folders, tmp_path):
    base = folders[0]
    for fields in (
        {"target_modules": r"(\w+\.?)+!"},
        {"alpha_pattern": {r"(\w+\.?)+!": 3}},
        {"modules_to_save": [r"(\w+\.?)+!"]},
    ):
        folder = edited(folders, tmp_path, "adapter", "adapter_config.json", **fields)
        (_, _), (_, error) = checkpoint_models(base, [Checkpoint("it", 0, folder)])
        assert "takes too long to match" in str(error)
        shutil.rmtree(folder)
    folder = edited(folders, tmp_path, "adapter", "adapter_config.json", target_modules="(")
    with pytest.raises(UserError, match="is no regular expression"):
        read_checkpoint(folder, Weights(base.folder))


def test_what_an_adapter_leaves_out_is_pefts_default(folders, tmp_path):
    from peft import PeftConfig

    folder = edited(folders, tmp_path, "adapter", "adapter_config.json")
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({n: v for n, v in fields.items() if n not in ("r", "lora_alpha")}))
    theirs = PeftConfig.from_pretrained(folder)
    assert adapter_fields(folder)["r"] == theirs.r == 8
    assert adapter_fields(folder)["lora_alpha"] == theirs.lora_alpha == 8
