"""Made-up command lines: every command takes them or refuses them in one line."""

import importlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support import ends_or_refuses

from config import resolve_settings
from lora_tradeoffs.measuring.loop import options_from
from lora_tradeoffs.study.plan import plan_runs

# What a command makes of its flags before it loads a model.
OPTIONS = {
    "eval": "lora_tradeoffs.adaptation.analysis.AdaptationOptions",
    "retention_eval": "lora_tradeoffs.retention.analysis.RetentionOptions",
    "svd_analysis": "lora_tradeoffs.drift.analysis.DriftOptions",
    "gradient_conflict": "lora_tradeoffs.gradients.analysis.GradientOptions",
}
COMMANDS = (*OPTIONS, "data_preprocessing", "multi_task_training", "run_study")
NUMBERS = st.one_of(
    st.sampled_from(["inf", "-inf", "nan", "1e999", "-1", "0", "1", "8", "0.5", "9" * 20, "--"]),
    st.integers().map(str),
    st.floats().map(str),
)
PATHS = st.sampled_from(["~nosuchuser/x", "n" * 300, "a\nb", "a\0b", "\udcff", "../up", "", "/"])
TEXTS = NUMBERS | PATHS | st.text(st.characters(exclude_categories=()), max_size=8)


@st.composite
def command_lines(draw):
    """A command, and up to four of its flags with values."""
    name = draw(st.sampled_from(COMMANDS))
    parser = importlib.import_module(name).build_parser()
    words = []
    for action in draw(st.lists(st.sampled_from(parser._actions[1:]), max_size=4)):
        words += action.option_strings[:1]
        if action.nargs != 0:
            choices = st.sampled_from([*map(str, action.choices)]) if action.choices else TEXTS
            fields = st.sampled_from([*FIELDS]).flatmap(lambda f: TEXTS.map(f"{f}={{}}".format))
            values = fields | TEXTS if action.dest == "set" else TEXTS | choices
            words += draw(st.lists(values, min_size=1, max_size=2))
    return name, words


FIELDS = importlib.import_module("training_configs").settable_fields()


@pytest.mark.fuzz
@given(command_lines())
@example(("run_study", ["--seeds", str(2**32)]))
@example(("multi_task_training", ["--seed", str(2**32)]))
@example(("retention_eval", ["--scale-update", "nan"]))
@example(("svd_analysis", ["--epsilon", "inf"]))
def test_any_flags_are_taken_or_refused_in_one_line(workspace, capsys, line):
    name, words = line
    module = importlib.import_module(name)
    before = sorted(workspace.rglob("*"))
    with ends_or_refuses():
        try:
            args = module.build_parser().parse_args(words)
        except SystemExit as ended:
            output = capsys.readouterr()
            assert ended.code == 2 and len(output.err.splitlines()) == 1, output.err
            return
        settings = resolve_settings(args)
        if name in OPTIONS:
            package, _, options = OPTIONS[name].rpartition(".")
            options_from(getattr(importlib.import_module(package), options), args)
        elif name == "multi_task_training":
            module.plan(args, settings, 576)
        elif name == "run_study":
            study, settings = module.read_plan(args)
            module.plan_steps(study, settings, plan_runs(study, settings, 576))
    assert sorted(workspace.rglob("*")) == before
