"""Files are written whole; whole checkpoints are found, broken ones named."""

import json

import pytest

from lora_tradeoffs.files import (
    checkpoint_problem,
    checkpoints,
    drop_resume_state,
    newest_whole_checkpoint,
    write_json,
    write_manifest,
    written_whole,
)


def write_content(path, text, as_folder):
    with written_whole(path) as temporary:
        if as_folder:
            temporary.mkdir()
            (temporary / "content").write_text(text)
        else:
            temporary.write_text(text)
        if text == "half":
            raise KeyboardInterrupt


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_write_that_fails_leaves_the_old_content_alone(tmp_path, as_folder):
    path = tmp_path / "new" / "result"
    content = path / "content" if as_folder else path
    write_content(path, "one", as_folder)
    write_content(path, "two", as_folder)
    with pytest.raises(KeyboardInterrupt):
        write_content(path, "half", as_folder)
    assert content.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["result"]


def make_checkpoint(run, step, resumable=True):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    names = ["model.safetensors", "trainer_state.json"]
    names += ["optimizer.pt", "scheduler.pt", "rng_state.pth"] if resumable else []
    for name in names:
        (folder / name).write_text(f"{name} of {step}")
    write_manifest(folder, step=step)
    return folder


def test_a_checkpoint_is_whole_iff_its_manifest_agrees(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 5)
    assert checkpoint_problem(checkpoint) is None
    (checkpoint / "optimizer.pt").write_text("optimizer.pt of 6")  # the same size
    assert "corrupt" in checkpoint_problem(checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    assert "missing" in checkpoint_problem(checkpoint)
    (checkpoint / "manifest.json").unlink()
    assert "did not end" in checkpoint_problem(checkpoint)


def test_the_newest_whole_checkpoint_is_resumed_and_broken_ones_go(tmp_path):
    for step in (5, 10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-10"
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-10"]
    assert newest_whole_checkpoint(tmp_path / "none") is None


def test_a_checkpoint_stays_whole_without_its_optimizer(tmp_path):
    checkpoint = make_checkpoint(tmp_path, 5)
    drop_resume_state(checkpoint)
    assert checkpoint_problem(checkpoint) is None
    assert sorted(p.name for p in checkpoint.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "trainer_state.json",
    ]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
