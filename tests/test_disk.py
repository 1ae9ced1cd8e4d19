"""A disk that fails, processes that are killed, two of the same command: nothing is lost."""

import errno
import functools
import json
import shutil
import signal
import subprocess

import pandas as pd
import pytest
from failing_disk import FailingDisk
from safetensors.torch import load_file
from support import VARIABLES

from config import DOCUMENTS
from lora_tradeoffs.checkpoints import MANIFEST, checkpoint_problem, checkpoints

slow = pytest.mark.slow
RUN = "sst2_lora_r4_steps2_limit16_fp32_checkpoints2_seed42"
SHORT = ("--no-figures", "--dtype", "fp32")
# module and arguments of every command, in the order of a study
COMMANDS = {
    "prepare": ("data_preprocessing", "sst2", "--limit", "16"),
    "train": (
        *("multi_task_training", "--tasks", "sst2", "--lora", "4", "--limit", "16", "--dtype"),
        *("fp32", "--max-steps", "2", "--set", "checkpoints=2", "report_to=none"),
    ),
    "adaptation": ("eval", "--tasks", "sst2", "--shots", "0", "--limit", "4", *SHORT),
    "retention": (
        *("retention_eval", "--tasks", "arc_challenge", "--limit", "4", "--documents", "2"),
        *("--checkpoints", "last", *SHORT),
    ),
    "drift": ("svd_analysis", "--top-k", "4", "--no-figures"),
    "gradients": (
        *("gradient_conflict", "--batches", "2", "--batch-size", "2", "--checkpoints", "last"),
        *SHORT,
    ),
}
KINDS = {"full": errno.ENOSPC, "broken": errno.EIO, "forbidden": errno.EACCES, "killed": "kill"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    try:
        disk = FailingDisk(tmp_path_factory.mktemp("disk"))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no C compiler")
    yield disk
    disk.server.kill()


@pytest.fixture(scope="module")
def run_in(disk, tiny):
    """Run commands of COMMANDS side by side with a folder as the disk."""

    def run(folder, *names, **environment):
        variables = dict.fromkeys(VARIABLES, "") | {
            **{"OUTPUT_DIR": str(folder), "DATA_DIR": str(folder / "data"), "PRESET": "demo"},
            **{"MODEL_NAME": str(tiny), "STUDY_NAME": "s", "OMP_NUM_THREADS": "1"},
        }
        commands = [list(COMMANDS[name]) for name in names]
        return disk.run(*commands, **variables, **environment)

    return run


@pytest.fixture(scope="module")
def made(run_in, tmp_path_factory):
    """A function: a folder as it is before a command, and one in which the command has ended."""

    @functools.cache
    def make(name):
        folder = tmp_path_factory.mktemp(name)
        before = make("train")[1] if name in DOCUMENTS else tmp_path_factory.mktemp("empty")
        shutil.copytree(before, folder, dirs_exist_ok=True)
        codes, said = run_in(folder, name)
        assert codes == [0], said
        return before, folder

    return make


def assert_whole(folder):
    """No file below the folder is half-written under its own name."""
    for path in folder.rglob("*"):
        if path.name.endswith(".partial") or any(p.name.endswith(".partial") for p in path.parents):
            continue
        if path.name == MANIFEST:
            assert checkpoint_problem(path.parent) is None
        elif path.suffix == ".json" and "checkpoint-" not in str(path):
            json.loads(path.read_text())
        elif path.suffix == ".parquet":
            pd.read_parquet(path)
        elif path.suffix == ".safetensors" and "checkpoint-" not in str(path):
            load_file(path)


def results(folder, name):
    """What a command made, without times and names of folders."""
    if name == "prepare":
        return sorted(str(p.relative_to(folder)) for p in folder.glob("data/**/*.arrow"))
    if name == "train":
        run = folder / "models" / "s" / RUN
        training = json.loads((run / "training.json").read_text())
        weights = load_file(checkpoints(run)[-1] / "adapter_model.safetensors")
        losses = [[v["step"], v["eval_loss"]] for v in training["validation"]]
        return [losses, {name: tensor.tolist() for name, tensor in weights.items()}]
    return json.loads((folder / DOCUMENTS[name].format(study="s")).read_text())["records"]


def equal(one, other):
    """Equal but for the last bits of products of fp64."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-9, abs=1e-12)
    return one == other


def fail_one_by_one(disk, run_in, folder, before, name, kind, every):
    """Run the command until none of its writes fails any more; how many have failed.

    One that succeeds in spite of a failure starts anew, since it has left nothing to write.
    """
    disk.list.unlink(missing_ok=True)
    faults = {"FAIL_IN": str(folder), "FAIL_LIST": str(disk.list), "FAIL_EVERY": str(every)}
    allowed = {0, 1, 2} if kind != "killed" else {0, -signal.SIGKILL}
    for _ in range(500):
        count = len(disk.failures())
        (code,), said = run_in(folder, name, FAIL_WITH=str(KINDS[kind]), **faults)
        last = disk.failures()[count:]
        if not last:
            assert code == 0, said
            return count
        assert code in allowed and "Traceback" not in said, (last, said)
        if code in (1, 2):
            assert said.replace("output error: ", "").count("error: ") == 1, (last, said)
        assert_whole(folder)
        if code == 0:
            shutil.rmtree(folder)
            shutil.copytree(before, folder)


MATRIX = [
    pytest.param(name, kind, 1, marks=slow, id=f"{name}-{kind}")
    for name in COMMANDS
    for kind in KINDS
]
FEW = [("adaptation", "full", 23), ("drift", "killed", 13)]


@pytest.mark.parametrize(("name", "kind", "every"), [*FEW, *MATRIX])
def test_every_write_fails_once_and_the_result_is_the_same(
    disk, run_in, made, tmp_path, name, kind, every
):
    before, reference = made(name)
    folder = tmp_path / "out"
    shutil.copytree(before, folder)
    failed = fail_one_by_one(disk, run_in, folder, before, name, kind, every)
    print(f"{name}, {kind}: {failed} writes failed")
    assert failed
    assert equal(results(folder, name), results(reference, name))


@pytest.mark.parametrize(
    "name", ["adaptation", *(pytest.param(n, marks=slow) for n in [*DOCUMENTS][1:])]
)
def test_two_of_the_same_command_lose_and_double_nothing(run_in, made, tmp_path, name):
    before, reference = made(name)
    folder = tmp_path / "out"
    shutil.copytree(before, folder)
    shutil.rmtree(folder / "tokenizer")  # made by both
    codes, said = run_in(folder, name, name)
    assert codes == [0, 0], said
    assert_whole(folder)
    assert not list(folder.rglob("*.partial"))
    assert equal(results(folder, name), results(reference, name))


@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_damaged_items_are_named_and_their_unit_is_measured_again(run_in, made, tmp_path, damage):
    _, reference = made("adaptation")
    folder = tmp_path / "out"
    shutil.copytree(reference, folder)
    path, other, *_ = sorted((folder / "performance_analysis/s/items").iterdir())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "missing":
        path.unlink()
    else:
        shutil.copy(other, path)
    codes, said = run_in(folder, "adaptation")
    assert codes == [0] and f"{path} is damaged or missing" in said
    assert " 1 to run" in said
    assert pd.read_parquet(path).equals(pd.read_parquet(reference / path.relative_to(folder)))


OURS = {
    "training": (f"models/s/{RUN}/training.json", '{"validation": [{"step": 1}]}'),
    "record": (f"performance_analysis/s/records/{RUN}-2-sst2-validation.json", "[" * 100_000),
    "data": ("data/s/sst2/*/report.json", '{"fingerprint": 1, "splits": {}}'),
}


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_ours_that_is_damaged_is_named_and_made_again(run_in, made, tmp_path, name):
    _, reference = made("adaptation")
    folder = tmp_path / "out"
    shutil.copytree(reference, folder)
    pattern, text = OURS[name]
    paths = list(folder.glob(pattern))
    for path in paths:
        path.write_text(text)
    codes, said = run_in(folder, "adaptation")
    assert codes == [2] and "Traceback" not in said
    assert any(f"error: {path} is damaged: " in said for path in paths), said
    assert "; delete it and run the same command" in said
    for path in paths:
        path.unlink()
    if name == "training":
        assert run_in(folder, "train")[0] == [0]
    assert run_in(folder, "adaptation")[0] == [0]
    assert equal(results(folder, "adaptation"), results(reference, "adaptation"))
