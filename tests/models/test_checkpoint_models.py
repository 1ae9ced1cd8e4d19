"""Many checkpoints over one base: each is itself, and what is broken is named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ROOT, change_json, edited_tensors, moved

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint, checkpoints_in, write_manifest
from lora_tradeoffs.models.base import load_base
from lora_tradeoffs.models.checkpoint_models import checkpoint_models, scaled_updates, with_added

PROMPT = torch.tensor([[5, 17, 400, 23]])


def logits_of(model):
    with torch.no_grad():
        return model(PROMPT).logits


def make_adapter(base, folder, rank=4, seed=0, modules=("q_proj", "v_proj"), **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), **options)
    config.init_lora_weights = False  # random B, so that the adapter does something
    model = get_peft_model(load_base(base), config).eval()
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(model)


def make_full(base, folder, seed=0, untied=False):
    torch.manual_seed(seed)
    model = moved(load_base(base).eval(), 0.02)
    model.save_pretrained(folder)
    if untied:  # some tools write the tied lm_head, too
        path = folder / "model.safetensors"
        with edited_tensors(path) as weights:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    return logits_of(model)


def collect(base, folders):
    wanted = [Checkpoint("run", i, folder) for i, folder in enumerate(folders)]
    found = {}
    for checkpoint, model in checkpoint_models(base, wanted):
        key = checkpoint.folder.name if checkpoint else "base"
        found[key] = str(model) if isinstance(model, UserError) else logits_of(model)
    return found


def test_every_checkpoint_is_itself_whatever_came_before(base, tmp_path):
    expected = {
        "a": make_adapter(base, tmp_path / "a", 4, seed=1),
        "b": make_adapter(base, tmp_path / "b", 8, seed=2, modules=("q_proj", "o_proj")),
        "full": make_full(base, tmp_path / "full", seed=3),
        "untied": make_full(base, tmp_path / "untied", seed=4, untied=True),
        "c": make_adapter(base, tmp_path / "c", 2, seed=5),
        "base": logits_of(load_base(base).eval()),
    }
    folders = [tmp_path / name for name in ("full", "a", "b", "untied", "c")]
    found = collect(base, folders)
    assert list(found) == ["base", "a", "b", "c", "full", "untied"]  # adapters first
    for name, logits in expected.items():
        assert torch.allclose(found[name], logits, atol=1e-5), name
    assert not torch.allclose(found["a"], found["base"], atol=1e-3)


def test_linears_stored_in_bf16_give_autocast_the_same_bits(base, tmp_path):
    make_adapter(base, tmp_path / "adapter", 4, seed=1)
    make_full(base, tmp_path / "full", seed=3)
    make_full(base, tmp_path / "untied", seed=4, untied=True)
    wanted = [checkpoints_in(tmp_path / name)[0] for name in ("adapter", "full", "untied")]
    with torch.autocast("cpu", torch.bfloat16):
        stored, plain = (
            [logits_of(model) for _, model in checkpoint_models(base, wanted, bf16=bf16)]
            for bf16 in (True, False)
        )
    assert len(stored) == 4
    for ours, theirs in zip(stored, plain, strict=True):
        assert torch.equal(ours, theirs)


def test_broken_checkpoints_are_named_and_the_others_are_done(base, tmp_path):
    whole = make_adapter(base, tmp_path / "whole", seed=1)
    full = make_full(base, tmp_path / "full", seed=2)
    for name in ("lacks", "extra", "truncated", "pickled", "other", "bare"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
    with edited_tensors(tmp_path / "lacks" / "adapter_model.safetensors") as weights:
        del weights[min(weights)]
    with edited_tensors(tmp_path / "extra" / "adapter_model.safetensors") as weights:
        first = min(weights)
        weights[first.replace("layers.0", "layers.7")] = weights[first].clone()
    path = tmp_path / "truncated" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "a.bin")
    change_json(tmp_path / "other" / "adapter_config.json", r=9)
    (tmp_path / "bare" / "adapter_config.json").write_text("{")
    shutil.copytree(tmp_path / "full", tmp_path / "short")
    with edited_tensors(tmp_path / "short" / "model.safetensors") as weights:
        del weights["model.layers.1.mlp.up_proj.weight"]

    for name, field in (
        ("unknown", {"of_tomorrow": 1}),
        ("start", {"init_lora_weights": "pissa"}),
        ("rank", {"rank_pattern": {"v_proj": 0}}),
    ):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        change_json(tmp_path / name / "adapter_config.json", **field)

    names = ["lacks", "other", "unknown", "whole", "extra", "rank", "truncated", "pickled", "bare"]
    names += ["start", "short", "full"]
    found = collect(base, [tmp_path / name for name in names])
    assert "1 are missing" in found["lacks"] and "1 are unexpected" in found["extra"]
    assert "corrupt" in found["truncated"] and "pickled" in found["pickled"]
    assert "size mismatch" in found["other"] or "does not fit" in found["other"]
    assert "adapter_config.json is damaged" in found["bare"]
    assert "its rank_pattern is {'v_proj': 0}, not ranks by module" in found["rank"]
    assert "cannot be loaded: its of_tomorrow is 1" in found["unknown"]
    assert "cannot be loaded: its init_lora_weights is 'pissa'" in found["start"]
    assert "lacks model.layers.1.mlp.up_proj.weight" in found["short"]
    for text in (v for v in found.values() if isinstance(v, str)):
        assert "\n" not in text and str(tmp_path) in text
    assert torch.allclose(found["whole"], whole, atol=1e-5)
    assert torch.allclose(found["full"], full, atol=1e-5)


def test_a_half_written_checkpoint_of_ours_is_named(base, tmp_path):
    for name in ("checkpoint-1", "checkpoint-2"):
        make_adapter(base, tmp_path / name)
    (tmp_path / "run.json").write_text("{}")
    write_manifest(tmp_path / "checkpoint-2", step=2)
    found = collect(base, [tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"])
    assert "its saving did not end" in found["checkpoint-1"]
    assert isinstance(found["checkpoint-2"], torch.Tensor)


def test_runs_and_foreign_folders_are_found(base, tmp_path):
    run = tmp_path / "run"
    for step in (100, 20, 3):
        make_adapter(base, run / f"checkpoint-{step}")
    assert [(c.run, c.step) for c in checkpoints_in(run)] == [("run", 3), ("run", 20), ("run", 100)]
    alone = checkpoints_in(run / "checkpoint-20")
    assert [(c.run, c.step, c.is_adapter) for c in alone] == [("run", 20, True)]
    make_full(base, tmp_path / "mine")
    assert [(c.run, c.step, c.is_adapter) for c in checkpoints_in(tmp_path / "mine")] == [
        ("mine", 0, False)
    ]
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints_in(tmp_path / "nothing")


def models_of(base, folder):
    """The checkpoint and its model, as checkpoint_models gives them."""
    wanted = [Checkpoint("run", 1, folder)]
    return next((c, m) for c, m in checkpoint_models(base, wanted) if c is not None)


def test_scaled_adapters_run_from_the_base_to_the_checkpoint(base, tmp_path):
    before = logits_of(load_base(base).eval())
    options = {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    for name, extra in (("plain", {}), ("other", options)):
        make_adapter(base, tmp_path / name, seed=1, **extra)
        checkpoint, model = models_of(base, tmp_path / name)
        whole = logits_of(model)
        found = {}
        for t, scaled in scaled_updates(base, checkpoint, model, [0, 0.5, 1, 1.25, 1]):
            assert scaled is model
            found.setdefault(t, []).append(logits_of(scaled))
        assert torch.equal(found[0][0], before)
        assert all(torch.equal(logits, whole) for logits in found[1])
        assert torch.equal(logits_of(model), whole)
        shutil.copytree(tmp_path / name, tmp_path / f"{name}_half")
        with edited_tensors(tmp_path / f"{name}_half" / "adapter_model.safetensors") as weights:
            weights |= {key: w / 2 for key, w in weights.items() if "lora_B" in key}
        half = logits_of(models_of(base, tmp_path / f"{name}_half")[1])
        assert torch.allclose(found[0.5][0], half, atol=1e-6)


@pytest.mark.parametrize(
    ("untied", "stored"),
    [(False, "float32"), (True, "float32"), (False, "bfloat16"), (True, "float8_e4m3fn")],
)
def test_scaled_weights_run_from_the_base_to_the_checkpoint(base, tmp_path, untied, stored):
    make_full(base, tmp_path / "full", seed=3, untied=untied)
    path = tmp_path / "full" / "model.safetensors"
    weights = {name: w.to(getattr(torch, stored)) for name, w in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    start = load_base(base).state_dict()
    end = {name: weight.float() for name, weight in weights.items()}
    checkpoint, model = models_of(base, tmp_path / "full")
    for t, scaled in scaled_updates(base, checkpoint, model, [0.5, 0, 1.25, 1, 0.5, 0]):
        weights = scaled.state_dict()
        for name, tensor in end.items():
            expected = {0: start[name], 1: tensor}.get(t)
            if expected is None:
                expected = start[name] + t * (tensor - start[name])
                assert torch.allclose(weights[name], expected, rtol=1e-5, atol=1e-7), (t, name)
            else:
                assert torch.equal(weights[name].view(torch.int32), expected.view(torch.int32))
        assert scaled.lm_head.weight is scaled.model.embed_tokens.weight
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in end.items())


def test_a_scaled_update_that_is_left_early_is_whole_again(base, tmp_path):
    make_full(base, tmp_path / "full", seed=3)
    make_adapter(base, tmp_path / "adapter", seed=1)
    for name in ("full", "adapter"):
        checkpoint, model = models_of(base, tmp_path / name)
        whole = logits_of(model)
        with pytest.raises(KeyboardInterrupt):
            for _ in scaled_updates(base, checkpoint, model, [0, 0.5]):
                raise KeyboardInterrupt
        assert torch.equal(logits_of(model), whole)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_what_is_added_to_weights_acts_as_dense_weights_and_leaves_no_trace(base, tmp_path, kind):
    (make_adapter if kind == "adapter" else make_full)(base, tmp_path / kind, seed=1)
    _, model = models_of(base, tmp_path / kind)
    model, generator = model.double(), torch.Generator().manual_seed(0)
    before, changes = logits_of(model), {}
    for name, rows in (("model.layers.0.self_attn.q_proj", 32), ("model.layers.1.mlp.up_proj", 64)):
        sides = [torch.randn(n, 3, generator=generator).double() / 9 for n in (rows, 32)]
        changes[name] = tuple(sides)
    with pytest.raises(KeyboardInterrupt), with_added(model, changes) as changed:
        added = logits_of(changed)
        raise KeyboardInterrupt
    assert torch.equal(logits_of(model), before) and not torch.equal(added, before)
    dense = model.merge_and_unload() if kind == "adapter" else model
    for name, (left, right) in changes.items():
        dense.get_submodule(name).weight.data += left @ right.T
    assert torch.allclose(logits_of(dense), added, atol=1e-12)


def test_updates_that_cannot_be_scaled_are_refused(base, tmp_path):
    for options in ({"bias": "lora_only"}, {"modules_to_save": ["norm"]}):
        (name,) = options
        make_adapter(base, tmp_path / name, **options)
        checkpoint, model = models_of(base, tmp_path / name)
        assert not isinstance(model, UserError), model
        with pytest.raises(UserError, match=f"cannot be scaled: its {name}"):
            next(scaled_updates(base, checkpoint, model, [0.5]))
    make_full(base, tmp_path / "full")
    checkpoint, model = models_of(base, tmp_path / "full")
    with pytest.raises(ValueError, match="finite"):
        next(scaled_updates(base, checkpoint, model, [0, float("nan")]))
    path = tmp_path / "full" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is corrupt"):
        next(scaled_updates(base, checkpoint, model, [0.5]))


@pytest.mark.parametrize("many", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_many_full_checkpoints_need_the_memory_of_one(tmp_path, many):
    """A model of 28 million parameters, in a process of its own for each count."""
    code = """
import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from lora_tradeoffs.checkpoints import checkpoints_in
from lora_tradeoffs.models.checkpoint_models import checkpoint_models
from lora_tradeoffs.models.base import Base
from lora_tradeoffs.hardware import (peak_memory, reset_peak_memory)
run, count = Path(sys.argv[1]), int(sys.argv[2])
if not run.exists():
    config = LlamaConfig(vocab_size=32000, hidden_size=512, intermediate_size=1024,
        num_hidden_layers=4, num_attention_heads=8, tie_word_embeddings=True)
    for step in range(1, int(sys.argv[3]) + 1):
        LlamaForCausalLM(config).save_pretrained(run / f"checkpoint-{step}")
found = checkpoints_in(run)[:count]
base = Base("base", found[0].folder, found[0].folder, {})
reset_peak_memory("cpu")
for checkpoint, model in checkpoint_models(base, found):
    assert not isinstance(model, Exception), model
print(peak_memory("cpu"))
"""

    def peak(count):
        command = [sys.executable, "-c", code, str(tmp_path / "run"), str(count), str(many)]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return int(process.stdout.split()[-1])

    peak(1)  # writes them
    assert peak(many) < 1.1 * peak(1)
    assert Path(tmp_path / "run" / f"checkpoint-{many}").exists()


def test_too_little_memory_is_not_told_as_a_corrupt_adapter(base, tmp_path, monkeypatch):
    from peft import PeftModel

    make_adapter(base, tmp_path / "adapter")

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory is left")

    monkeypatch.setattr(PeftModel, "__init__", full)
    with pytest.raises(torch.OutOfMemoryError):
        models_of(base, tmp_path / "adapter")
