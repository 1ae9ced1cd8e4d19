"""What the tests share beside fixtures: variables, settings, and the look of an error."""

from __future__ import annotations

import argparse
from pathlib import Path

from config import PRESETS

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    *("PRESET", "MODEL_NAME", "DATA_SOURCE", "STUDY_NAME", "DATA_DIR", "OUTPUT_DIR"),
    *("HF_TOKEN", "HF_USERNAME", "EXAMPLES_PER_TASK", "EVAL_EXAMPLES_PER_TASK"),
)


# For scripts in processes of their own, which read the user's .env: variables beat it.
DEMO = {
    "PRESET": "demo",
    "STUDY_NAME": "demo",
    "MODEL_NAME": PRESETS["demo"].model,
    "DATA_SOURCE": PRESETS["demo"].data,
    "EXAMPLES_PER_TASK": str(PRESETS["demo"].examples_per_task),
    "EVAL_EXAMPLES_PER_TASK": str(PRESETS["demo"].eval_examples_per_task),
}


def settings_for(**flags):
    """Settings as the command line would resolve them."""
    from config import resolve_settings

    return resolve_settings(argparse.Namespace(**flags))


def assert_one_line_error(process, *parts):
    """Exit code 2 and one line on stderr that holds the parts."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])
