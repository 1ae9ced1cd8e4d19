"""Documents of many runs are joined, read and reported a part at a time."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
from large_study import write_large_study
from support import settings_for

from config import UserError
from lora_tradeoffs import files
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.files import read_records
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.tables import frames
from lora_tradeoffs.tables.frames import load_records

JOIN = """
import argparse
from pathlib import Path
from types import SimpleNamespace
from config import resolve_settings
from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions
from lora_tradeoffs.measuring.loop import run
settings = resolve_settings(argparse.Namespace(study="demo"))
base = SimpleNamespace(name="made-up", folder=Path("made-up"))
analysis = DriftAnalysis(settings, base, DriftOptions())
run(analysis, [], None, None, SimpleNamespace(overwrite=False, no_figures=True, pdf=False))
"""
REPORT = """
import argparse
from config import resolve_settings
from lora_tradeoffs.report.html import write_report
write_report(resolve_settings(argparse.Namespace(study="demo")))
"""
# VmHWM: the ru_maxrss of a process begins with that of the one which started it
MEASURED = """
import re, resource
own, children = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
memory = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print("\\n", own.ru_utime + children.ru_utime, max(memory, children.ru_maxrss) / 1e6)
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    return settings_for(study="demo")


def measured(code):
    """Seconds of a processor and gigabytes of memory that the code takes in its own process."""
    process = subprocess.run(
        [sys.executable, "-c", code + MEASURED],
        capture_output=True,
        text=True,
        env={**os.environ, "PRESET": "demo", "DATA_SOURCE": "sample"},
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return [float(figure) for figure in process.stdout.split()[-2:]]


@pytest.mark.slow
def test_200_runs_are_joined_and_reported_in_two_minutes_and_a_gigabyte(settings):
    write_large_study(settings, seeds=15)
    # the first join computes every pair of runs, which is done once
    parts = [measured(JOIN), measured(JOIN), measured(REPORT)]
    seconds, gigabytes = (list(column) for column in zip(*parts))
    assert seconds[0] < 120 and sum(seconds[1:]) < 120 and max(gigabytes) < 1, parts


def test_what_is_read_in_parts_is_the_whole(settings, monkeypatch):
    write_large_study(settings, seeds=1, points=2, layers=2)
    folder = settings.document("drift").parent
    units = [unit for _, unit in Results(folder).units()]
    records = [record for unit in units for record in unit["records"]]
    path = Results(folder).join("drift", {"preset": "demo"})
    assert json.loads(path.read_text())["records"] == records
    monkeypatch.setattr(files, "READ_BLOCK", 100)  # less than a record
    monkeypatch.setattr(frames, "PART", 1_000)
    assert list(read_records(path)) == records
    whole = pd.DataFrame(records)
    frame = load_records(path)
    assert len(frame) == len(whole) > 1_000
    for name in whole:
        assert (frame[name].eq(whole[name]) | (frame[name].isna() & whole[name].isna())).all()
        assert frame[name].dtype.kind == whole[name].dtype.kind, name
    shown = StudyRecords.load(settings).drift
    layers = whole[(whole["layer"] >= 0) & (whole["metric"] == "relative_frobenius")]
    assert len(shown[shown["layer"] >= 0]) == len(layers) > 0


@pytest.mark.parametrize("cut", [-3, -20, -2_000])
def test_a_document_that_is_cut_off_is_refused(settings, cut):
    write_large_study(settings, seeds=1, points=1, layers=1)
    path = Results(settings.document("drift").parent).join("drift", {"preset": "demo"})
    path.write_text(path.read_text()[:cut])
    with pytest.raises(UserError, match=r"drift.json is damaged: it is no JSON"):
        load_records(path)
