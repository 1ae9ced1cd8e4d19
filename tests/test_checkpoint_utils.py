"""The door to checkpoints: the examples in its docstrings run, and wrong bases are refused."""

import doctest
import shutil

import pytest
import torch
from support import settings_for

import checkpoint_utils
from config import UserError
from multi_task_training import main as train


@pytest.fixture(scope="module")
def run(tiny):
    """A run with two checkpoints."""
    short = ["--limit", "64", "--dtype", "fp32", "--set", "checkpoints=2"]
    argv = ["--similar", "--lora", "8", *short, "--model", str(tiny), "--study", "door"]
    assert train(argv) == 0
    (record,) = settings_for(study="door").runs_dir.glob("*/run.json")
    return record.parent


@pytest.fixture
def clone(run, tiny, tmp_path, monkeypatch):
    """The working folder as the examples assume it: a clone with a run of its demo."""
    folder = tmp_path / "models" / "demo" / "similar_lora_r8_seed42"
    shutil.copytree(run, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("MODEL_NAME", str(tiny))
    return folder


@pytest.mark.parametrize("name", checkpoint_utils.__all__)
def test_the_examples_in_the_docstrings_run(clone, name):
    function = getattr(checkpoint_utils, name)
    (examples,) = (
        test
        for test in doctest.DocTestFinder(recurse=False).find(function, name)
        if test.examples or pytest.fail(f"{name} has no example")
    )
    assert doctest.DocTestRunner().run(examples).failed == 0


def test_a_run_stands_for_its_last_checkpoint(clone):
    tokens = torch.tensor([[5, 17, 400, 23]])
    last, first = (
        checkpoint_utils.load_checkpoint_model(folder)(tokens).logits
        for folder in (clone, clone / "checkpoint-3")
    )
    named = checkpoint_utils.load_checkpoint_model(clone / "checkpoint-6")(tokens).logits
    assert torch.equal(last, named) and not torch.equal(last, first)


def test_another_base_and_a_broken_checkpoint_are_refused(clone, tmp_path):
    other = tmp_path / "other"
    base = checkpoint_utils.load_base_model()
    with torch.no_grad():
        base.model.norm.weight += 1
    base.save_pretrained(other)
    shutil.copy(checkpoint_utils.find_base().tokenizer_folder / "tokenizer.json", other)
    with pytest.raises(UserError, match="was trained on"):
        checkpoint_utils.load_checkpoint_model(clone, model=str(other))
    path = clone / "checkpoint-6" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="is corrupt"):
        checkpoint_utils.load_checkpoint_model(clone)
