"""Settings: precedence, and values that cannot be."""

import importlib
import os
import subprocess
import sys

import pytest
from support import ROOT, assert_one_line_error, settings_for

import config
from config import UserError, guarded
from training_configs import settable_fields


def test_flag_beats_environment_beats_env_file_beats_preset(monkeypatch):
    assert settings_for().study == "demo"
    monkeypatch.setattr(config, "_env_file", lambda: {"STUDY_NAME": "file", "PRESET": "study"})
    assert settings_for().study == "file"
    assert settings_for().model == "meta-llama/Llama-3.2-1B"
    assert settings_for().sources["study"] == "STUDY_NAME in .env"
    monkeypatch.setenv("STUDY_NAME", "environment")
    assert settings_for().study == "environment"
    assert settings_for(study="flag").study == "flag"
    assert settings_for(preset="demo").model == config.EMBEDDED_MODEL


def test_an_empty_variable_is_no_value(monkeypatch):
    monkeypatch.setenv("STUDY_NAME", "")
    assert settings_for().study == "demo"


def test_the_headline_says_what_runs_and_where_it_came_from():
    line = settings_for(study="mine").headline("cpu")
    for part in ("preset demo (default)", "study mine (--study)", "data sample", "device cpu"):
        assert part in line
    assert "cp .env.example .env" in line


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PRESET", "big", "study, demo"),
        ("STUDY_NAME", "../up", "not a path"),
        ("STUDY_NAME", "base", "reserved"),
        ("DATA_SOURCE", "no-such-folder", "hub, sample"),
        ("EXAMPLES_PER_TASK", "many", "a whole number of at least 1"),
        ("EVAL_EXAMPLES_PER_TASK", "0", "a whole number of at least 1"),
        ("OUTPUT_DIR", str(ROOT / "README.md"), "a folder"),
    ],
)
def test_a_value_that_cannot_be_names_the_variable_and_what_is_allowed(
    monkeypatch, variable, value, allowed
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as error:
        settings_for()
    assert variable in str(error.value) and allowed in str(error.value)


def test_a_bare_model_name_belongs_to_the_user(monkeypatch):
    monkeypatch.setenv("HF_USERNAME", "ada")
    assert settings_for(model="my-llama").model == "ada/my-llama"
    assert settings_for(model="other/llama").model == "other/llama"
    assert settings_for().model == config.EMBEDDED_MODEL


def test_every_variable_of_env_example_is_read(monkeypatch):
    """And every variable that is read is documented there."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    documented = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    source = (ROOT / "config.py").read_text()
    assert all(f'"{name}"' in source for name in documented)
    from support import VARIABLES

    assert documented == set(VARIABLES)


@pytest.mark.parametrize(
    "name", ["multi_task_training.py", "data_preprocessing.py", "dataset_descriptions.py"]
)
def test_help_needs_neither_torch_nor_a_second(script, name):
    process = script("-X", "importtime", name, "--help")
    assert process.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "peft", "evaluate"}


def test_bad_flags_are_one_line(script):
    assert_one_line_error(
        script("multi_task_training.py", "--preset", "big"), "preset", "study, demo"
    )
    assert_one_line_error(script("multi_task_training.py", "--lora", "x"), "--lora")


def test_memory_that_ran_out_is_one_line(capsys):
    import torch

    def main(argv=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    assert guarded(main)([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the memory ran out") and "smaller" in line


@pytest.mark.parametrize("number", [5, 13, 28, 30, 36, 116, 122])
def test_an_error_of_the_disk_is_one_line(capsys, number):
    def main(argv=None):
        raise OSError(number, os.strerror(number), "/there/file")

    assert guarded(main)([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {os.strerror(number)}: /there/file; ")
    assert "mend that" not in line and line.endswith("then run the same command to resume")


def test_an_error_of_the_disk_is_one_line_when_a_library_wrapped_it(tmp_path, capsys):
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.zeros(4)}

    def wrapped(argv=None):
        try:
            save_file(tensors, "/proc/self/none/a.safetensors")
        except OSError as error:
            raise RuntimeError("it failed") from error

    for main in (
        lambda argv=None: save_file(tensors, "/proc/self/none/a.safetensors"),
        wrapped,
    ):
        assert guarded(main)([]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: No such file")

    def unrelated(argv=None):
        raise OSError("a library's message")

    with pytest.raises(OSError, match="a library's message"):
        guarded(unrelated)([])


COMMANDS = {
    "broken-pipe": ("| head -1; echo ${PIPESTATUS[0]}", "141"),
    "full": ("> out; echo $?", "2"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_an_output_that_takes_no_more_ends_the_command_quietly(tmp_path, case):
    path = tmp_path / "command.py"
    path.write_text(
        "import sys; from config import guarded\n"
        "def main(argv=None):\n    for n in range(20_000): print(n)\n    return 0\n"
        "sys.exit(guarded(main)())"
    )
    redirection, code = COMMANDS[case]
    process = subprocess.run(
        ["bash", "-c", f"ulimit -f 16; {sys.executable} {path} {redirection}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert process.stdout.split()[-1] == code
    errors = process.stderr.splitlines()
    assert (
        errors == []
        if case == "broken-pipe"
        else errors[0].startswith("error: File too large; free")
    )
    assert len(errors) == (case == "full")


def test_a_count_below_one_is_refused_by_its_flag(capsys):
    parser = config.Parser(prog="command")
    parser.add_argument("--limit", type=config.positive_int)
    assert parser.parse_args(["--limit", "3"]).limit == 3
    for value, message in (("0", "--limit must be 1 or more, not 0"), ("x", "invalid int value")):
        with pytest.raises(SystemExit) as exit:
            parser.parse_args(["--limit", value])
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --limit") and message in line


@pytest.mark.parametrize(
    "command",
    [
        *("data_preprocessing", "multi_task_training", "eval", "retention_eval"),
        *("svd_analysis", "gradient_conflict", "run_study"),
    ],
)
def test_every_flag_of_every_command_has_a_sentence(command):
    parser = importlib.import_module(command).build_parser()
    assert not [action.dest for action in parser._actions if not action.help]
    if any(action.dest == "set" for action in parser._actions):
        lines = parser.format_help().splitlines()
        for name in settable_fields():
            assert sum(line.startswith(f"  {name} ") for line in lines) == 1, name
