"""Whether a results document holds what the scripts write: fields, types, no measurement twice."""

from __future__ import annotations

import math
import reprlib
import sys
from typing import TYPE_CHECKING, Any

from config import PRESETS
from lora_tradeoffs.records import OLD_VERSIONS, RECORD_VERSION, TRAINED, Record
from lora_tradeoffs.tables.arms import METHODS

if TYPE_CHECKING:
    from pandas import DataFrame

TEXTS = ("run", "family", "method", "split", "task", "metric")
NUMBERS = ("rank", "seed", "step", "fraction", "value")
LARGEST_FLOAT = sys.float_info.max
NEVER_NULL = ("run", "method", "metric", "task", "split", "rank", "seed", "step")
# What a measurement gives: two records that differ in nothing else are of one measurement.
FIGURES = (
    *("value", "stderr", "low", "high", "n", "p_value", "test", "detectable", "chance"),
    *("at_chance", "truncated", "forgotten", "gained", "random", "over"),
    *("defined", "scale", "other_scale", "reason"),
)
OPTIONAL = {
    **dict.fromkeys(("low", "high", "stderr", "n"), math.nan),
    "shots": 0,
    "prompt": 0,
    "update_scale": 1.0,
    "learning_rate": 0.0,
    "target_modules": "",
}


def meta_problem(meta: dict[str, Any]) -> str:
    version = meta.get("record_version", 1)
    if version not in (RECORD_VERSION, *OLD_VERSIONS):
        return f"record version {version!r}, this suite reads {RECORD_VERSION}"
    return "" if meta.get("preset") in PRESETS else f"preset is {meta.get('preset')!r}"


def record_problem(records: dict[int, Record], frame: DataFrame) -> str:
    """A field or type that no script writes, in records by their number; "" if there is none."""
    import numpy as np

    required = {*TEXTS, *NUMBERS}
    for number, record in records.items():
        if missing := required - record.keys():
            return f"record {number} lacks {', '.join(sorted(missing))}"
    types: dict[str, Any] = dict.fromkeys(("target_modules", "tasks", "variant", *TEXTS), str)
    types = dict.fromkeys((*NUMBERS, *OPTIONAL), (int, float)) | types
    for name in filter(types.get, frame):
        wrong = frame[name].isna() & (name in NEVER_NULL)
        if name == "method":
            wrong |= ~frame[name].isin(METHODS)
        dtype = frame[name].dtype
        if not (dtype == "str" if types[name] is str else dtype.kind in "iuf"):
            values = frame[name].dropna()
            right = [
                isinstance(v, types[name])
                and not isinstance(v, bool)
                # a whole number can be above every float
                and (not isinstance(v, int) or abs(v) < LARGEST_FLOAT)
                for v in values
            ]
            wrong[values.index] |= ~np.array(right, dtype=bool)
        if wrong.any():
            number = wrong.idxmax()
            return f"{name} of record {number} is {reprlib.repr(records[number].get(name))}"
    return ""


def contradiction(frame: DataFrame) -> str:
    """Two records of one measurement, or of one run as two arms; "" if there are none."""
    arms = frame[["run", *(name for name in (*TRAINED, "variant") if name in frame)]]
    try:
        arms = arms.drop_duplicates()
        repeated = frame.duplicated([name for name in frame if name not in FIGURES])
    except TypeError:
        return "a record holds a list or an object"
    if (changed := arms["run"].duplicated()).any():
        run = arms["run"][changed].iloc[0]
        first, other = arms[arms["run"] == run].iloc[:2].to_dict("records")
        fields = [f"{n} {first[n]!r} and {other[n]!r}" for n in first if first[n] != other[n]]
        return f"run {run} has {', '.join(fields)} in records {arms.index[changed][0]} and before"
    if repeated.any():
        row = frame[repeated].iloc[0]
        about = f"{row['metric']} on {row['task']} of {row['run']} at step {row['step']}"
        return f"record {repeated.idxmax()} repeats an earlier one ({about})"
    return ""
