"""The measuring loop: what is pending, errors, and batches that do not fit into memory."""

import argparse
from dataclasses import dataclass

import pytest
import torch
from support import settings_for

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.loop import Analysis, Measurement, pending, run
from lora_tradeoffs.measuring.subjects import Subject, no_arm
from lora_tradeoffs.models.base import prepare_base

FLAGS = argparse.Namespace(overwrite=False, pdf=False, no_figures=True)


@dataclass(frozen=True)
class Unit:
    subject: Subject
    part: str

    @property
    def name(self):
        return f"{self.subject.run}-{self.subject.step}-{self.part}"


class Memory(Analysis):
    """Measures how many tokens fit; `options` are those that do."""

    name = "adaptation"

    def units(self, subjects):
        return [Unit(subject, part) for subject in subjects for part in ("first", "second")]

    def request(self, unit):
        return {"part": unit.part}

    def batch_tokens(self, unit):
        return 1_024

    def measure(self, model, unit, batch_tokens):
        if model == "broken" and unit.part == "first":
            raise UserError("it is broken")
        if batch_tokens > self.options:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        subject = unit.subject
        record = {**subject.fields, "run": subject.run, "family": "", "step": subject.step}
        record |= {"task": unit.part, "metric": "tokens", "value": batch_tokens}
        return Measurement([record])

    def table(self, records):
        return f"{len([*records])} records"


@pytest.fixture
def study(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    settings = settings_for(study="looped", model=str(tiny))
    fields = {"study": "looped", "base_model": "tiny", **no_arm("base")}
    subjects = [Subject("base", 0, None, fields, None, True, True)]
    for step in (1, 2):
        checkpoint = Checkpoint("run", step, tmp_path)
        subjects.append(Subject("run", step, checkpoint, fields, None, step == 2, False))
    return settings, prepare_base(settings), subjects


def models(checkpoints, broken=None):
    broken = broken or {}
    yield None, "base"
    for checkpoint in checkpoints:
        yield checkpoint, broken.get(checkpoint.step, "model")


def values_in(analysis):
    return {
        name: (document["batch_tokens"], document["records"][0]["value"])
        for name, document in analysis.results.units()
    }


def test_batches_are_halved_until_they_fit_and_stay_so(study):
    settings, base, subjects = study
    analysis = Memory(settings, base, 300)
    assert run(analysis, analysis.units(subjects), models, None, FLAGS) == 0
    assert set(values_in(analysis).values()) == {(256, 256)} and analysis.halvings == 2
    # the size of the batches does not make another measurement
    assert not pending(Memory(settings, base, 4_096), analysis.units(subjects))


def test_a_single_row_that_does_not_fit_is_an_error(study):
    settings, base, subjects = study
    analysis = Memory(settings, base, 1)
    with pytest.raises(torch.OutOfMemoryError):
        run(analysis, analysis.units(subjects), models, None, FLAGS)


def test_what_is_pending_is_told_without_a_model_and_overwrite_repeats_it(study, capsys):
    settings, base, subjects = study
    analysis = Memory(settings, base, 4_096)
    units = analysis.units(subjects)
    assert pending(analysis, units) == units
    assert run(analysis, units[:4], models, None, FLAGS) == 0
    assert "4 measurements: 0 cached, 4 to run" in capsys.readouterr().out
    assert pending(analysis, units) == units[4:]
    assert pending(analysis, units, overwrite=True) == units
    assert run(analysis, units, models, None, FLAGS) == 0
    assert "6 measurements: 4 cached, 2 to run\n" in capsys.readouterr().out
    assert len(read_json(settings.document("adaptation"))["records"]) == 6


def test_errors_of_checkpoints_are_named_and_the_rest_is_measured(study, capsys):
    settings, base, subjects = study
    analysis = Memory(settings, base, 4_096)

    def broken(checkpoints):
        return models(checkpoints, {1: UserError("checkpoint 1 is corrupt"), 2: "broken"})

    assert run(analysis, analysis.units(subjects), broken, None, FLAGS) == 1
    errors = capsys.readouterr().err
    assert "error: checkpoint 1 is corrupt\nerror: run-2-first: it is broken\n" in errors
    assert set(values_in(analysis)) == {"base-0-first", "base-0-second", "run-2-second"}


def test_an_error_of_the_base_ends_the_measuring(study):
    settings, base, subjects = study
    analysis = Memory(settings, base, 4_096)

    def broken(checkpoints):
        yield None, "broken"

    with pytest.raises(UserError, match="it is broken"):
        run(analysis, analysis.units(subjects), broken, None, FLAGS)
