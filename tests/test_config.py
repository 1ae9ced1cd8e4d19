"""Settings: precedence, and values that cannot be."""

import importlib
import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, assert_one_line_error, ends_or_refuses, settings_for

import config
from config import UserError
from lora_tradeoffs import command_line
from lora_tradeoffs.command_line import guarded
from training_configs import settable_fields


@pytest.fixture
def no_preset(monkeypatch):
    monkeypatch.delenv("PRESET")


def test_flag_beats_environment_beats_env_file_beats_preset(monkeypatch, no_preset):
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


def test_the_headline_says_what_runs_and_where_it_came_from(no_preset):
    line = settings_for(study="mine").headline("cpu")
    for part in ("preset demo (default)", "study mine (--study)", "data sample", "device cpu"):
        assert part in line
    assert "cp .env.example .env" in line


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("PRESET", "big", "study, demo, original"),
        ("STUDY_NAME", "../up", "not a path"),
        ("STUDY_NAME", "base", "reserved"),
        ("DATA_SOURCE", "no-such-folder", "hub, sample"),
        ("STUDY_NAME", "s" * 300, "up to 100 letters"),
        ("STUDY_NAME", "a\nb", "without control characters"),
        ("OUTPUT_DIR", "o" * 300, "File name too long"),
        ("OUTPUT_DIR", "~nosuchuser/out", "no such user"),
        ("DATA_DIR", "d\x1b[31m", "without control characters"),
        ("DATA_SOURCE", "~nosuchuser/rows", "no such user"),
        ("DATA_SOURCE", "r" * 300, "File name too long"),
        ("DATA_SOURCE", "not-utf8-\udcff", "UTF-8 text"),
        ("MODEL_NAME", "~nosuchuser/model", "no such user"),
        ("MODEL_NAME", "m" * 300, "File name too long"),
        ("EXAMPLES_PER_TASK", "9" * 5_000, "a whole number"),
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
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


def test_a_model_or_data_of_ones_own_asks_for_the_preset(monkeypatch, no_preset, tmp_path):
    """Neither a 1B model nor real rows are trained with the demo's budget unasked."""
    folder, model = str(tmp_path), "meta-llama/Llama-3.2-1B"
    for name, variable, values in (
        ("model", "MODEL_NAME", (model, folder)),
        ("data", "DATA_SOURCE", ("hub", folder)),
    ):
        for value in values:
            with pytest.raises(UserError, match=r"\(--\w+\), and no preset is set: add --preset"):
                settings_for(**{name: value})
            for preset in config.PRESETS:
                assert settings_for(**{name: value}, preset=preset).preset.name == preset
            with monkeypatch.context() as patch:
                patch.setenv(variable, value)
                with pytest.raises(UserError, match=f"variable {variable}.*original.*demo"):
                    settings_for()
            with monkeypatch.context() as patch:
                patch.setattr(config, "_env_file", lambda v=value, n=variable: {n: v})
                with pytest.raises(UserError, match=f"{variable} in .env"):
                    settings_for()
    demo = config.PRESETS["demo"]
    assert settings_for(model=demo.model, data=demo.data).sources["preset"] == "default"


@pytest.mark.parametrize(
    "content, message",
    [
        ("STUDY_NAME=caf\xe9".encode("latin-1"), "is not UTF-8 text"),
        (b"STUDY_NAME=a\0b", "STUDY_NAME holds a NUL"),
        (b"HF_TOKEN=hf_\0", "HF_TOKEN holds a NUL"),
        (b"PRESET=demo\nSTUDY_NAME my_study\n", "line 2 is not NAME=value"),
        (b"PRESET\n", "line 1 is not NAME=value"),
        (b"HF_TOKEN hf_secret\n", "line 1 is not NAME=value"),
    ],
)
def test_an_env_file_that_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / ".env"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        config.read_env_file(path)
    assert str(path) in str(error.value) and "secret" not in str(error.value)


def test_an_env_file_of_windows_notepad_is_read(tmp_path):
    (tmp_path / ".env").write_bytes("\ufeffPRESET=demo\r\nSTUDY_NAME=a\r\n".encode())
    assert config.read_env_file(tmp_path / ".env") == {"PRESET": "demo", "STUDY_NAME": "a"}


@pytest.mark.fuzz
@given(st.binary() | st.lists(st.binary()).map(b"\nSTUDY_NAME=".join))
def test_any_env_file_is_read_or_named(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("env") / ".env"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, ends_or_refuses():
        values = config.read_env_file(path)
        patch.setattr(config, "_env_file", lambda: values)
        settings_for()
    shutil.rmtree(path.parent)


BLOCKED = """
import importlib.abc, runpy, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
sys.path.insert(0, "")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("package", ["torch", "numpy", "transformers", "scipy"])
def test_a_missing_package_is_one_line(script, package):
    command = ("multi_task_training.py", "--similar", "--lora", "4", "--dry-run")
    process = script("-c", BLOCKED.replace("PACKAGE", repr(package)), *command)
    message = f"error: the package {package} is missing; pip install -r requirements.txt"
    assert process.returncode == 2 and process.stderr.splitlines()[-1] == message


def test_an_error_in_an_import_of_our_own_is_not_taken_for_a_missing_package(capsys):
    error = ModuleNotFoundError("No module named 'lora_tradeoffs.x'", name="lora_tradeoffs.x")
    command_line._without_a_package(type(error), error, None)
    assert "pip install" not in capsys.readouterr().err


def test_a_bare_model_name_belongs_to_the_user(monkeypatch):
    monkeypatch.setenv("HF_USERNAME", "ada")
    assert settings_for(model="my-llama", preset="demo").model == "ada/my-llama"
    assert settings_for(model="other/llama", preset="demo").model == "other/llama"
    assert settings_for().model == config.EMBEDDED_MODEL


def test_every_variable_of_env_example_is_read(monkeypatch):
    """And every variable that is read is documented there."""
    lines = (ROOT / ".env.example").read_text().splitlines()
    documented = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    source = (ROOT / "config.py").read_text()
    assert all(f'"{name}"' in source for name in documented)
    from support import VARIABLES

    assert documented == set(VARIABLES)


def test_env_example_says_the_presets_numbers():
    text = (ROOT / ".env.example").read_text()
    told = re.findall(r"study (\d+), demo (\d+).*\n([A-Z_]+)=", text)
    assert [name for _, _, name in told] == ["EXAMPLES_PER_TASK", "EVAL_EXAMPLES_PER_TASK"]
    for study, demo, name in told:
        numbers = [getattr(config.PRESETS[p], name.lower()) for p in ("study", "demo")]
        assert [int(study), int(demo)] == numbers


@pytest.mark.parametrize(
    "name",
    ["multi_task_training.py", "data_preprocessing.py", "dataset_descriptions.py", "eval.py"],
)
def test_help_needs_neither_torch_nor_a_second(script, name):
    process = script("-X", "importtime", name, "--help")
    assert process.returncode == 0
    loaded = {line.rpartition("|")[2].strip() for line in process.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "datasets", "peft", "evaluate", "scipy"}


# What `pip install torch transformers datasets evaluate peft numpy matplotlib seaborn safetensors`
# leaves out of requirements.txt.
LEFT_OUT = """
import importlib.machinery as machinery, runpy, sys
LEFT_OUT = {"scipy", "sklearn", "sacrebleu", "rouge_score", "nltk", "dotenv", "gguf", "lm_eval"}
LEFT_OUT |= {"tensorboard", "trackio", "mlflow", "nbclient", "nbconvert", "nbformat", "ipykernel"}
find = machinery.PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name.partition(".")[0] in LEFT_OUT else find(name, *rest)
machinery.PathFinder.find_spec = classmethod(find_spec)
sys.path.insert(0, "")
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_readmes_packages_suffice_for_training_and_drift(script, tiny):
    """What an analysis needs beside them it names in one line."""
    where = ["--model", tiny, "--study", "few-packages"]
    few = ["--max-steps", "2", "--set", "eval_examples_per_task=4"]
    for command in (
        ["multi_task_training.py", "--similar", "--lora", "4", *few],
        ["svd_analysis.py"],
    ):
        process = script("-c", LEFT_OUT, *command, *where)
        assert process.returncode == 0, process.stderr
    for command in (["eval.py"], ["retention_eval.py"], ["gradient_conflict.py"]):
        process = script("-c", LEFT_OUT, *command, *where)
        assert process.returncode == 2, process.stdout
        line = process.stderr.splitlines()[-1]
        assert re.fullmatch(r"error: the package \w+ is missing; pip install -r .*", line), line


def test_bad_flags_are_one_line(script):
    assert_one_line_error(
        script("multi_task_training.py", "--preset", "big"), "preset", "study, demo, original"
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
    "closed": (">&- 2> err; echo $?; cat err", "0"),
    "ascii": ("| tail -1", "caf\\xe9"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_an_output_that_takes_no_more_ends_the_command_quietly(tmp_path, case):
    path = tmp_path / "command.py"
    path.write_text(
        "import sys; from lora_tradeoffs.command_line import guarded\n"
        "def main(argv=None):\n    for n in range(20_000): print(n)\n"
        "    print('caf\\xe9')\n    return 0\n"
        "sys.exit(guarded(main)())"
    )
    redirection, code = COMMANDS[case]
    process = subprocess.run(
        ["bash", "-c", f"ulimit -f 16; {sys.executable} {path} {redirection}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert process.stdout.split()[-1] == code
    errors = process.stderr.splitlines()
    assert len(errors) == (case == "full")
    assert all(line.startswith("error: File too large; free") for line in errors)


def test_a_name_that_breaks_or_turns_the_line_is_shown_as_escapes(capsys):
    @guarded
    def main(argv=None):
        raise UserError("tensor a\nb\x1e\u2028\u202ec\ud800 é is odd")

    assert main() == 2
    assert capsys.readouterr().err == r"error: tensor a\nb\x1e\u2028\u202ec\ud800 é is odd" + "\n"


def test_a_value_that_no_flag_takes_is_one_line(capsys):
    parser = command_line.Parser(prog="command")
    parser.add_argument("--limit", type=command_line.positive_int)
    assert parser.parse_args(["--limit", "3"]).limit == 3
    parser.add_argument("--seed", type=command_line.seed_number)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--count", type=int)
    parser.add_argument("--name")
    for flag, value, message in (
        ("--limit", "0", "--limit must be 1 or more, not 0"),
        ("--limit", "x", "invalid int value"),
        ("--limit", "1" + "0" * 13, "must be at most"),
        ("--seed", str(2**32), "must be at most 4294967295"),
        ("--seed", "-1", "must be 0 or more"),
        ("--rate", "inf", "must be a number"),
        ("--rate", "nan", "must be a number"),
        ("--rate", "1e999", "must be a number"),
        ("--count", "9" * 5_000, "invalid int value"),
        ("--name", "a\nb", "without control characters"),
        ("--name", "\udcff", "must be UTF-8 text"),
        ("a\nb", "c", "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as exit:
            parser.parse_args([flag, value])
        assert exit.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line and len(line) < 400


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
