"""Whether a step is done: the tests of the scripts, asked from outside."""

import dataclasses
import os

import pytest
from support import settings_for

from config import UserError
from lora_tradeoffs.files import read_json, write_json
from lora_tradeoffs.models.base import load_tokenizer, prepare_base
from lora_tradeoffs.study import steps as study_steps
from lora_tradeoffs.study.steps import ANALYSES, DoneTests, Outcomes, Step, flags
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.plan import plan_runs
from lora_tradeoffs.training.run import Run


def never(*_):
    raise AssertionError("asked what is measured")


@pytest.fixture
def settings(tiny, tmp_path):
    return dataclasses.replace(
        settings_for(model=str(tiny), study="steps"), output_dir=tmp_path, data_dir=tmp_path
    )


@pytest.fixture
def run(settings) -> Run:
    (run,) = plan_runs(settings, 32, [("sst2",)], [ArmSpec("lora", 4)], [42], {"dtype": "fp32"})
    return run


def prepared(settings, run):
    from lora_tradeoffs.data.preparation import prepare

    config, tokenizer = run.config, load_tokenizer(prepare_base(settings))
    limits = config.max_length, config.examples_per_task
    return prepare(settings, tokenizer, config.tasks, *limits)


def trained(settings, run):
    """The run as training leaves it, but for its checkpoints."""
    record = {
        "compared": run.config.compared(),
        "base": prepare_base(settings).record,
        "data": {name: task.report for name, task in prepared(settings, run).items()},
    }
    write_json(run.folder / "run.json", record)
    write_json(run.folder / "training.json", {})


def measured(settings, run, stage="drift"):
    """A checkpoint, a record and the document, as far as a step looks at them."""
    write_json(run.folder / "checkpoint-4" / "manifest.json", {})
    document = settings.document(ANALYSES[stage])
    write_json(document.parent / "records" / f"{run.name}-4.json", {})
    write_json(document, {})
    return document


def is_done(settings, step, ask=never):
    return DoneTests(settings, ask).done_steps([step]) == {step.name}


def test_data_are_prepared_if_their_fingerprint_is_there(settings, run):
    step = Step("prepare", "prepare", {}, (run,))
    assert not is_done(settings, step) and not settings.prepared_dir.exists()
    prepared(settings, run)
    assert is_done(settings, step)
    assert not is_done(dataclasses.replace(settings, examples_per_task=8), step)


def test_a_run_is_trained_if_its_settings_base_and_data_are_the_same(settings, run):
    step = Step("train", "train", {}, (run,))
    assert not is_done(settings, step)
    trained(settings, run)
    assert is_done(settings, step)
    record = read_json(run.folder / "run.json")
    for key, value in (
        ("compared", record["compared"] | {"warmup": 0.5}),
        ("base", record["base"] | {"digest": "another"}),
        ("data", {"sst2": record["data"]["sst2"] | {"fingerprint": "another"}}),
    ):
        write_json(run.folder / "run.json", record | {key: value})
        assert not is_done(settings, step), key
    (run.folder / "run.json").write_text("{")
    assert not is_done(settings, step)


def test_a_diverged_run_is_a_result_of_a_sweep_alone(settings, run):
    prepared(settings, run)
    write_json(run.folder / "error.json", {"diverged": True})
    assert not is_done(settings, Step("train", "train", {}, (run,)))


def test_analyses_that_differ_in_their_runs_alone_are_asked_about_once(settings, run):
    runs = [run, run.at_rate(0.5), run.at_rate(0.25)]
    for one in runs:
        measured(settings, one, "retention")
        measured(settings, one, "drift")
    asked = []

    def ask(stage, options, names):
        asked.append((stage, dict(options), list(names)))
        return {runs[1].name} if stage == "drift" else set()

    steps = [
        Step(f"{stage}-{i}", stage, {"dtype": "fp32"}, (one,))
        for stage in ("retention", "drift")
        for i, one in enumerate(runs)
    ]
    done = DoneTests(settings, ask).done_steps(steps)
    assert done == {step.name for step in steps} - {"drift-1"}
    assert asked == [
        (stage, {"dtype": "fp32"}, [one.name for one in runs]) for stage in ("retention", "drift")
    ]


def test_nothing_is_asked_of_a_step_whose_needs_are_not_done(settings, run):
    steps = [Step("train", "train", {}, (run,)), Step("drift", "drift", {}, (run,), ("train",))]
    assert DoneTests(settings, never).done_steps(steps) == set()


def test_an_analysis_is_not_done_if_the_base_is_pending_or_nothing_can_be_said(settings, run):
    def broken(*_):
        raise UserError("a record cannot be read")

    step = Step("drift", "drift", {}, (run,))
    assert not is_done(settings, step)  # no checkpoint to measure
    measured(settings, run)
    assert is_done(settings, step, lambda *_: set())
    assert not is_done(settings, step, lambda *_: {"base"})
    assert not is_done(settings, step, broken)


def test_an_analysis_that_was_killed_before_its_document_is_not_done(settings, run):
    document = measured(settings, run)
    os.utime(document, (1, 1))
    assert not is_done(settings, Step("drift", "drift", {}, (run,)))
    document.unlink()
    assert not is_done(settings, Step("drift", "drift", {}, (run,)))


def test_a_report_is_done_if_it_is_newer_than_what_it_shows(settings, tmp_path, monkeypatch):
    notebook = tmp_path / "notebook.ipynb"
    monkeypatch.setattr(study_steps, "NOTEBOOK", notebook)
    document, step = settings.document("drift"), Step("report", "report", {})
    report = settings.output_dir / "outputs" / "steps" / "report.html"
    for path in (notebook, document, report):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    for times, done in (((1, 2, 3), True), ((1, 4, 3), False), ((4, 2, 3), False)):
        for path, time in zip((notebook, document, report), times, strict=True):
            os.utime(path, (time, time))
        assert is_done(settings, step) == done
    report.unlink()
    assert not is_done(settings, step)


def test_options_as_flags():
    options = {"limit": 4, "full_qv": True, "top_k": (4, 8), "scale_update": (), "set": None}
    expected = ["--limit", "4", "--full-qv", "--top-k", "4", "8", "--scale-update"]
    assert flags(options) == expected and flags({"pdf": False, "seed": 0}) == ["--seed", "0"]


def test_outcomes_are_kept_by_step_and_what_its_starts_took_is_added(settings):
    outcomes = Outcomes(settings)
    assert outcomes.read() == {}
    outcomes.add(Step("drift", "drift", {}), 1.26, 3, error="no space")
    outcomes.add(Step("report", "report", {}), 6, 0)
    outcomes.add(Step("drift", "drift", {}), 5, 2, runs=4)
    spent = {"stage": "drift", "seconds": 6.3, "new_results": 5, "runs": 4}
    assert outcomes.read()["drift"] == spent
    assert list(outcomes.read()) == ["drift", "report"]
    outcomes.path.write_text("{")
    assert outcomes.read() == {}
