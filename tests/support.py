"""What the tests share beside fixtures: variables, settings, and the look of an error."""

from __future__ import annotations

import argparse
import json
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import DOCUMENTS, PRESETS, UserError
from lora_tradeoffs.files import read_json

ROOT = Path(__file__).resolve().parent.parent
VARIABLES = (
    *("PRESET", "MODEL_NAME", "DATA_SOURCE", "STUDY_NAME", "DATA_DIR", "TASKS_DIR", "OUTPUT_DIR"),
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


def write_benchmark(folder, task, split, rows):
    """Write a benchmark's rows into a folder of data; the file."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    path = folder / task / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def change_json(path, **fields):
    """Set fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@contextmanager
def edited_tensors(path):
    """The tensors of a safetensors file by name; what the block makes of them is saved."""
    tensors = load_file(path)
    yield tensors
    save_file(tensors, path, metadata={"format": "pt"})


def moved(model, noise=0.1):
    """The model with all that is trainable moved."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn_like(parameter))
    return model


def assert_one_line_error(process, *parts):
    """Exit code 2 and one line on stderr that holds the parts."""
    lines = [line for line in process.stderr.splitlines() if line.strip()]
    assert process.returncode == 2, process.stderr
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], (part, lines[0])


def values(output, study, documents=DOCUMENTS):
    """Every number of the documents, by what it is of."""
    numbers = {}
    for name in documents:
        for r in read_json(output / DOCUMENTS[name].format(study=study))["records"]:
            left_out = ("value", "stderr", "low", "high", "study", "random")
            key = {k: v for k, v in r.items() if k not in left_out}
            key = {k: v for k, v in key.items() if not isinstance(v, float) or k == "eps"}
            numbers.setdefault((name, json.dumps(key, sort_keys=True)), []).append(r["value"])
    return numbers


def assert_close(numbers, expected, rel=1e-9, abs=1e-12):
    """Of `values`: products of fp64 round in their last bits by where their operands lie."""
    assert numbers.keys() == expected.keys()
    for key, value in expected.items():
        assert numbers[key] == pytest.approx(value, rel=rel, abs=abs), key


class Hang(BaseException):
    """A block that did not end in time; no `except Exception` of the code under test takes it."""


@contextmanager
def ends_or_refuses(seconds=60):
    """The block ends within `seconds`, or raises UserError with one printable line.

    What else it raises is a fault, and passes. The list that it gives holds the error's line.
    """

    def stop(*_):
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    lines = []
    try:
        yield lines
    except UserError as error:
        lines.append(str(error))
        assert lines[0].strip() and len(lines[0].splitlines()) == 1, repr(lines[0])
        lines[0].encode()  # a surrogate or the like could not be printed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
