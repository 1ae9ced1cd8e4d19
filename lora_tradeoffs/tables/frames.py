"""Results as tables: the arm of a record, the last checkpoint of a run, means over seeds.

    records = load_records(Path("performance_analysis/demo/adaptation.json"))
    print(score_table(records))

Every mean and interval comes from `summarise`: with one seed the interval is over items, as in the
record; with three seeds and more it counts seeds and items (seed_intervals.py); two seeds have a
mean alone.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import FAMILIES, RANKS, SPLITS, TARGET_MODULES, TASKS, UserError
from dataset_descriptions import DESCRIPTIONS
from lora_tradeoffs.records import metric_scale
from training_configs import rate_name

if TYPE_CHECKING:
    from pandas import DataFrame

SCRIPTS = {
    "adaptation.json": "eval.py",
    "retention.json": "retention_eval.py",
    "drift.json": "svd_analysis.py",
    "gradients.json": "gradient_conflict.py",
}
TEXT = ("run", "family", "method", "split", "task", "metric")
NUMBERS = ("rank", "seed", "step", "fraction", "value")
OPTIONAL = {
    **dict.fromkeys(("low", "high", "stderr", "n"), math.nan),
    "shots": 0,
    "prompt": 0,
    "update_scale": 1.0,
    "learning_rate": 0.0,
}
KINDS = ("LoRA", "full qv", "full", "base")
LABEL = re.compile(r"(?P<kind>LoRA r=(?P<rank>\d+)|full qv|full|base)(?: \((?P<extra>.+)\))?")
RATE = re.compile(r"(?<![^\s(])lr[\d.]+e-?\d+(?![^\s,)])")
RUN_NAME = re.compile(r"(?P<tasks>.+?)_(?:lora_r\d+|full_qv|full)(?:_(?P<extra>.+))?_seed\d+")


def load_records(path: Path) -> DataFrame:
    """The records of a results document, one a row, with their arm.

    `attrs["meta"]` and the column `preset` hold where they come from. Raises UserError if the file
    is missing or holds no records of this suite.
    """
    import pandas as pd

    script = SCRIPTS.get(path.name, "eval.py")
    if not path.is_file():
        others = sorted(p.parent.name for p in path.parent.parent.glob(f"*/{path.name}"))
        raise UserError(
            f"no {path}; make it with: python {script} --study {path.parent.name}"
            f" (studies that have one: {', '.join(others) or 'none'})"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        meta, records = dict(document["meta"]), [dict(record) for record in document["records"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is no results document of {script}; name another file") from None
    for number, record in enumerate(records):
        missing = [name for name in TEXT + NUMBERS if name not in record]
        if missing:
            raise UserError(f"{path}: record {number} lacks {', '.join(missing)}; run {script}")
    frame = pd.DataFrame(records, columns=None if records else [*TEXT, *NUMBERS])
    for name, default in OPTIONAL.items():
        frame[name] = frame[name].fillna(default) if name in frame else default
    for name in (*NUMBERS, "low", "high", "stderr"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    frame["arm"] = _parted_by_rate(frame, [arm_of(record) for record in records])
    frame["preset"] = meta.get("preset")
    frame.attrs["meta"] = meta
    return frame


def is_demo(frame: DataFrame) -> bool:
    """Whether the records are the demo's, which no figure may pass over."""
    meta = frame.attrs.get("meta", {})
    return meta.get("preset") == "demo" or bool((frame.get("preset") == "demo").any())


def arm_of(record: Mapping[str, Any]) -> str:
    """The arm's label: "LoRA r=8", "full", "full qv", "base", or a baseline's name.

    What parts a run from the grid's (place, other fields, a single task, the other family; an
    outside run's name) follows in brackets, so that only runs of other seeds are averaged.
    """
    method, run = record["method"], str(record["run"])
    if method == "baseline":
        return run
    shots, prompt = (_count(record.get(name)) for name in ("shots", "prompt"))
    asked = [f"{shots}-shot"] * bool(shots) + [f"prompt {prompt}"] * bool(prompt)
    if method == "base":
        return _label("base", asked)
    place = place_of(record.get("target_modules", "")) if method == "lora" else "qv"
    extras = [place] * (place != "qv")
    name = RUN_NAME.fullmatch(run)
    if name is None:
        extras.append(run)
    else:
        fields = " ".join(part for part in (name["extra"] or "").split("_") if part != place)
        extras += [fields] * bool(fields)
        extras += [f"{name['tasks']} alone"] * (name["tasks"] not in FAMILIES)
    task = DESCRIPTIONS.get(record.get("task", ""))
    if task and record.get("family", task.family) != task.family:
        extras.append(f"trained on {record['family']}")
    kind = f"LoRA r={int(record['rank'])}" if method == "lora" else method.replace("_", " ")
    return _label(kind, extras + asked)


def _parted_by_rate(frame: DataFrame, labels: list[str]) -> list[str]:
    """The labels; where one stands for several learning rates of a family, with the rate.

    A run's name holds its rate only where it is not the default, and the default depends on preset
    and model, so it may change within a study. Such runs are no seeds of each other.
    """
    keys = list(zip(frame["family"], labels))
    rates: dict[Any, set[float]] = {}
    for key, rate in zip(keys, frame["learning_rate"]):
        rates.setdefault(key, set()).add(rate)
    return [
        _with_rate(label, rate) if rate > 0 and len(rates[key]) > 1 else label
        for key, label, rate in zip(keys, labels, frame["learning_rate"])
    ]


def _with_rate(label: str, rate: float) -> str:
    found = LABEL.fullmatch(label)
    if found is None or RATE.search(label):
        return label
    return _label(found["kind"], [found["extra"]] * bool(found["extra"]) + [rate_name(rate)])


def without_rate(label: str) -> str:
    """The label of the arm whose learning rates are compared: "LoRA r=8" of "LoRA r=8 (lr1e-3)"."""
    return _without(label, RATE.fullmatch)


def shared_words(frames: Iterable[DataFrame]) -> set[str]:
    """What the names of all trained runs say of their fields ("steps40", "fp32"): it parts no arms.

    All frames of a study are to be asked together; runs that were made elsewhere do not count.
    """
    runs = {run for frame in frames for run in frame.loc[is_trained(frame), "run"]}
    extras = [set((n["extra"] or "").split("_")) for n in map(RUN_NAME.fullmatch, runs) if n]
    return set.intersection(*extras) - {"", *TARGET_MODULES} if extras else set()


def without_words(label: str, words: set[str]) -> str:
    """An arm's label without what is known to part no arms: "LoRA r=8" of "LoRA r=8 (steps40)"."""
    return _without(label, words.__contains__)


def with_plain_arms(*frames: Any) -> list[Any]:
    """The frames of one figure, their arms without what all runs share; the first's note says it.

    Whatever has no arms (None, a folder) is passed on.
    """
    own = [frame for frame in frames if "arm" in getattr(frame, "columns", ())]
    words = shared_words(frame for frame in own if "method" in frame)
    if not words:
        return list(frames)
    said = f"All runs: {' '.join(sorted(words))}."
    found = []
    for frame in frames:
        if any(frame is each for each in own):
            attrs = dict(frame.attrs)
            frame = frame.assign(arm=[without_words(arm, words) for arm in frame["arm"]])
            frame.attrs = attrs | {"note": " ".join(filter(None, (attrs.get("note"), said)))}
        found.append(frame)
    return found


def _without(label: str, is_left_out: Callable[[str], Any]) -> str:
    found = LABEL.fullmatch(label)
    if found is None or not found["extra"]:
        return label
    extras = [
        " ".join(word for word in part.split() if not is_left_out(word))
        for part in found["extra"].split(", ")
    ]
    return _label(found["kind"], [part for part in extras if part])


def _rate_in(label: str) -> float:
    """The learning rate in a label, 0 if it names none."""
    found = RATE.search(label)
    return float(found[0].removeprefix("lr")) if found else 0.0


def _count(value: Any) -> int:
    """A whole number, 0 for what is missing (None, or a data frame's nan)."""
    return int(value) if value and value == value else 0


def _label(kind: str, extras: list[str]) -> str:
    return f"{kind} ({', '.join(extras)})" if extras else kind


def place_of(modules: Any) -> str:
    """The place's name in TARGET_MODULES, from itself or from the modules' names."""
    if not isinstance(modules, str):
        modules = ",".join(modules) if isinstance(modules, Iterable) else "qv"
    names = {name for name in re.split(r"[\s,+]+", modules) if name}
    for place, members in TARGET_MODULES.items():
        if names in ({place}, set(members)):
            return place
    return "+".join(sorted(names)) or "qv"


def arm_order(arm: str) -> tuple[int, int, str, float]:
    """LoRA by rank, full qv, full, base, baselines; an arm's learning rates rising."""
    found = LABEL.fullmatch(arm)
    if found is None:
        return len(KINDS), 0, arm, 0.0
    rank = int(found["rank"] or 0)
    return (0 if rank else KINDS.index(found["kind"])), rank, without_rate(arm), _rate_in(arm)


def ordered(tasks: Iterable[str]) -> list[str]:
    """Tasks in the suite's order, others after them."""
    found = set(tasks)
    return [task for task in TASKS if task in found] + sorted(found - set(TASKS))


def scores(frame: DataFrame) -> DataFrame:
    """The rows of each task's primary metric, the first of its description, on our own splits."""
    first = {task: description.metrics[0] for task, description in DESCRIPTIONS.items()}
    frame = frame[frame["split"].isin(SPLITS)]
    return frame[frame["metric"] == frame["task"].map(first)].dropna(subset=["value"])


def is_trained(frame: DataFrame) -> Any:
    """A mask: the rows of runs, not of the base or a baseline."""
    return ~frame["method"].isin(["base", "baseline"])


def last_checkpoints(frame: DataFrame) -> DataFrame:
    """Rows of every run's last checkpoint, without runs that have not ended; base and baselines."""
    last = frame["step"] == frame.groupby("run")["step"].transform("max")
    ended = ~(frame["fraction"] < 0.999)  # an outside checkpoint has no fraction
    return frame[~is_trained(frame) | (last & ended)]


def unfinished(frame: DataFrame, so: str = "Left out") -> str:
    """A sentence for captions: the runs that `last_checkpoints` leaves out."""
    runs = set(frame[is_trained(frame)]["run"]) - set(last_checkpoints(frame)["run"])
    return f" {so}, not measured at its end: {', '.join(sorted(runs))}." if runs else ""


def summarise(frame: DataFrame, by: tuple[str, ...] = ()) -> DataFrame:
    """Mean, standard error, interval and number of seeds for each task, arm and `by`.

    Columns value, stderr, low, high (nan where there is none), seeds and `over`, what the interval
    counts, in the order of legends. A record holds its seed's error over items, not what all seeds
    share of it: so the interval over seeds and items errs to the wide side (seed_intervals.py).
    """
    import pandas as pd

    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS
    from lora_tradeoffs.statistics.seed_intervals import (
        BOTH,
        ITEMS,
        NOTHING,
        SEEDS,
        estimate_over_seeds,
    )

    keys, rows = ["task", "arm", *by], []
    for key, group in frame.groupby(keys):
        values = group["value"].to_numpy()
        seeds, mean = len(values), values.mean()
        stderr = low = high = math.nan
        over = NOTHING
        if seeds == 1:
            stderr, low, high = group[["stderr", "low", "high"]].iloc[0]
            over = ITEMS
        elif seeds >= MIN_SEEDS:
            item_variance = (group["stderr"] ** 2).mean()  # nan if no record has one
            over = BOTH if item_variance > 0 else SEEDS
            found = estimate_over_seeds(values, item_variance if over == BOTH else 0.0)
            stderr, low, high = found.stderr, found.low, found.high
        rows.append((*key, mean, stderr, low, high, seeds, over))
    columns = [*keys, "value", "stderr", "low", "high", "seeds", "over"]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(keys, key=lambda s: s.map(arm_order) if s.name == "arm" else s)


def score_table(frame: DataFrame) -> DataFrame:
    """Arms by tasks: value ± standard error at the last checkpoint, on test if it was read.

    A cell of the validation split is marked "val"; the error is over items for one seed (the mean
    over three and more carries its error over seeds and items, and the seeds' number).
    """
    import pandas as pd

    cells: dict[str, dict[str, str]] = {}
    rows = last_checkpoints(scores(frame))
    table = summarise(rows[rows["prompt"] == 0], by=("split",))
    for row in table.sort_values("split").itertuples():  # test before validation
        digits = 1 if metric_scale(DESCRIPTIONS[row.task].metrics[0]) == 100 else 3
        text = f"{row.value:.{digits}f}"
        text += "" if math.isnan(row.stderr) else f" ± {row.stderr:.{digits}f}"
        text += f" ({row.seeds} seeds)" if row.seeds > 1 else ""
        text += " val" if row.split != "test" else ""
        cells.setdefault(row.arm, {}).setdefault(row.task, text)
    arms = sorted(cells, key=arm_order)
    return pd.DataFrame(cells, index=ordered(table["task"]), columns=arms).T.fillna("")


def run_table(runs_dir: Path) -> DataFrame:
    """What the study's run.json files say, a run a row; empty if there are none."""
    import pandas as pd

    rows = {}
    for path in sorted(runs_dir.glob("*/run.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            config, environment = dict(record["config"]), dict(record["environment"])
        except (OSError, ValueError, KeyError, TypeError):
            rows[path.parent.name] = {"note": "run.json is unreadable"}
            continue
        names = ("method", "rank", "alpha", "learning_rate", "epochs", "batch_size", "seed")
        row = {"base": record.get("base", {}).get("name"), "steps": record.get("steps")}
        row |= {name: config.get(name) for name in names}
        row |= {name: environment.get(name) for name in ("device_name", "precision")}
        row["commit"] = str(environment.get("git_commit") or "")[:12]
        versions = environment.get("versions", {})
        rows[path.parent.name] = row | {p: versions.get(p) for p in ("torch", "transformers")}
    return pd.DataFrame.from_dict(rows, orient="index")


def gaps(frame: DataFrame, tested: bool = True) -> list[str]:
    """What the study's grid lacks in the records, a sentence each; `tested`: also test scores.

    Of an arm at several learning rates the one with the most seeds counts.
    """
    from lora_tradeoffs.statistics.comparisons import MIN_SEEDS

    said = []
    runs = frame[is_trained(frame)]
    grid = [*(f"LoRA r={rank}" for rank in RANKS), "full"]
    words = shared_words([frame])
    for family in FAMILIES:
        ended = last_checkpoints(runs[runs["family"] == family])
        if ended.empty:
            said.append(f"{family}: no run that is measured at its end")
            continue
        plain = ended["arm"].map(lambda arm: without_words(without_rate(arm), words))
        missing = [arm for arm in grid if arm not in set(plain)]
        if missing:
            said.append(f"{family}: no {', '.join(missing)}")
        at_rates = ended.assign(plain=plain).groupby(["plain", "arm"])["seed"].nunique()
        seeds = at_rates.groupby("plain").max()
        few = sorted(seeds[seeds < MIN_SEEDS].index, key=arm_order)
        if few:
            said.append(
                f"{family}: fewer than {MIN_SEEDS} seeds, so nothing about methods can be claimed:"
                f" {', '.join(few)}"
            )
        untested = set(plain) - set(plain[ended["split"] == "test"])
        if tested and untested:
            said.append(f"{family}: no test score of {', '.join(sorted(untested, key=arm_order))}")
    left = set(runs["run"]) - set(last_checkpoints(runs)["run"])
    return said + [f"not measured at its end: {run}" for run in sorted(left)]
