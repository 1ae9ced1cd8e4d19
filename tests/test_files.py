"""Files are written whole; whole checkpoints are found, broken ones named."""

import json
import os

import pandas
import pytest
import safetensors.numpy

from config import UserError
from lora_tradeoffs.checkpoints import (
    checkpoint_problem,
    checkpoints,
    drop_resume_state,
    newest_whole_checkpoint,
    write_manifest,
)
from lora_tradeoffs.files import intact, read_json, remove_partial, write_json, written_whole
from lora_tradeoffs.shapes import NUMBER


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


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"files": [1]}', '{"files": {"a": {"size": "1"}}}']
)
def test_a_damaged_manifest_is_told_and_the_older_checkpoint_resumed(tmp_path, capsys, text):
    for step in (10, 100):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "manifest.json").write_text(text)
    assert newest_whole_checkpoint(tmp_path).name == "checkpoint-10"
    told = capsys.readouterr().out
    assert "not resuming from checkpoint-100: " in told and "manifest.json is damaged" in told
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-10"]


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


# ----------------------------------------------------------------------------- damaged JSON

SHAPE = {"steps": int, "loss?": (*NUMBER, type(None)), "runs": {"*": [{"name": str}]}}
WHOLE = {"steps": 3, "loss": 0.5, "runs": {"a": [{"name": "x", "more": []}]}, "more": {}}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (WHOLE, None),
        ({"steps": 3, "runs": {}}, None),
        ({**WHOLE, "loss": None}, None),
        ({"runs": {}}, "steps is missing"),
        ({**WHOLE, "steps": True}, "steps is true"),
        ({**WHOLE, "steps": 3.5}, "steps is 3.5"),
        ({**WHOLE, "loss": float("nan")}, "loss is NaN"),
        ({**WHOLE, "runs": []}, "runs is a list"),
        ({**WHOLE, "runs": {"a": [{"name": "x"}, {"name": 7}]}}, "runs.a.1.name is 7"),
        ([WHOLE], "it is a list"),
        (b"\xef\xbb\xbf" + json.dumps(WHOLE).replace(",", ",\r\n").encode(), None),
        ("[" * 100_000, "it is no JSON"),
        ('{"steps": 3', "it is no JSON"),
        (b"\xff\xfe{", "it is no JSON"),
    ],
)
def test_a_file_that_is_not_of_its_shape_is_damaged(tmp_path, content, problem):
    path = tmp_path / "file.json"
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if problem is None:
        assert read_json(path, SHAPE) == (WHOLE if isinstance(content, bytes) else content)
        return
    with pytest.raises(UserError) as error:
        read_json(path, SHAPE)
    message = str(error.value)
    assert message.startswith(f"{path} is damaged: {problem}") and "\n" not in message
    assert message.endswith("; delete it and run the same command")


def test_an_error_of_the_disk_is_not_called_damage(tmp_path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path / "folder.json")


def test_what_a_kill_left_goes_once_no_write_can_be_under_way(tmp_path):
    write_json(tmp_path / "a.json", {})
    old, new = tmp_path / ".a.json.1234.partial", tmp_path / "sub" / ".b.5678.partial"
    new.mkdir(parents=True)
    old.write_text("half")
    os.utime(old, (1, 1))
    remove_partial(tmp_path)
    assert not old.exists() and new.exists()
    remove_partial(tmp_path, age=0)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "sub"]


def test_what_a_library_cannot_read_is_damaged_and_what_the_disk_refuses_is_not(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(b"cut short")
    for read in (pandas.read_parquet, safetensors.numpy.load_file):
        with pytest.raises(UserError, match=r"table is damaged: .*; delete it"), intact(path):
            read(path)
    with pytest.raises(IsADirectoryError), intact(tmp_path):
        tmp_path.read_bytes()
