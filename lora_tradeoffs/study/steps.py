"""A study's steps: what each makes or measures, its command line, and whether it is done.

A step is one process of one script. It is done if the script's own test says so: a run is trained
with the same settings, an analysis has nothing left to measure, the report is newer than what it
shows. The tests run in this process, so that no process starts for a step that is done.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ROOT, Settings, UserError
from dataset_descriptions import preset_family
from lora_tradeoffs.checkpoints import checkpoints
from lora_tradeoffs.files import read_json, write_json
from lora_tradeoffs.records import read_run, units_of
from lora_tradeoffs.shapes import NUMBER
from lora_tradeoffs.training.learning_rates import flags, rates_around, records_of_arm
from lora_tradeoffs.training.run import Run

# stage: its script
STAGES = {
    "prepare": "data_preprocessing",
    "sweep": "multi_task_training",
    "train": "multi_task_training",
    "evaluate": "eval",
    "retention": "retention_eval",
    "drift": "svd_analysis",
    "gradients": "gradient_conflict",
    "report": "lora_tradeoffs.report.html",
}
# the stages that measure checkpoints, and their documents
ANALYSES = {
    "evaluate": "adaptation",
    "retention": "retention",
    "drift": "drift",
    "gradients": "gradients",
}
# accelerate's own launcher, with any free port
ACCELERATE = ("-m", "accelerate.commands.launch", "--main_process_port=0", "--num_machines=1")
DDP = ("--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no")
NOTEBOOK = ROOT / "plot_results.ipynb"

# (stage, options, names of runs) -> names of the runs, "base" among them, with a measurement left
UnmeasuredRuns = Callable[[str, Mapping[str, Any], Sequence[str]], set[str]]


@dataclass(frozen=True)
class Sweep:
    """A search of every arm's learning rate: the seed of its runs, and its grid of factors."""

    seed: int
    factors: tuple[float, ...]

    def runs(self, planned: Run) -> list[Run]:
        """The runs that a planned run stands for, from the rates that are known so far.

        With the sweep's seed: the arm at every rate that was tried, else at those of the grid. With
        another: at the chosen rate (until the search has ended the default), if there is one.
        """
        records = records_of_arm(planned)
        if planned.config.seed == self.seed:
            rates = [record["learning_rate"] for record in records]
            rates = rates or rates_around(planned.default.learning_rate, self.factors)
        elif records:
            rates = [record["learning_rate"] for record in records if record["chosen"]]
        else:
            rates = [planned.default.learning_rate]
        return [planned.at_rate(rate) for rate in rates]

    def has_chosen(self, planned: Run) -> bool:
        """Whether the arm has a rate, from a search that tried all of this grid."""
        records = records_of_arm(planned)
        tried = {record["learning_rate"] for record in records}
        wanted = rates_around(planned.default.learning_rate, self.factors)
        return any(record["chosen"] for record in records) and tried.issuperset(wanted)


@dataclass(frozen=True, eq=False)
class Step:
    """One process of the stage's script.

    `options` are the script's flags by name, but for those that say which runs and which study;
    `planned_runs` what it makes, prepares data for or measures (none: all runs of the study).
    """

    name: str
    stage: str
    options: Mapping[str, Any]
    planned_runs: tuple[Run, ...] = ()
    needs: tuple[str, ...] = ()  # steps that have to end before
    sweep: Sweep | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        """The runs that it makes or measures, in a sweep at the rates that are known so far."""
        if self.sweep is None:
            return self.planned_runs
        return tuple(run for planned in self.planned_runs for run in self.sweep.runs(planned))

    @property
    def tasks(self) -> list[str]:
        return sorted({task for run in self.planned_runs for task in run.config.tasks})

    def measurable_runs(self) -> list[str]:
        """Names of its runs that have a checkpoint now."""
        return [r.name for r in self.runs if any(r.folder.glob("checkpoint-*/manifest.json"))]


def command_line(
    step: Step, settings: Settings, gpus: int = 1, config: Path | None = None
) -> list[str]:
    """What a user would write after `python` for this step: the script and its arguments.

    An analysis draws no figures: the report draws them all once. Training on several GPUs is
    launched by accelerate: DDP, or for full fine-tuning what the configuration says.
    """
    script = STAGES[step.stage]
    head = ["-m", script] if "." in script else [f"{script}.py"]
    if gpus > 1 and script == STAGES["train"]:
        is_full = step.planned_runs[0].config.method == "full"
        way = [f"--config_file={config}"] if config and is_full else DDP
        head = [*ACCELERATE, f"--num_processes={gpus}", *way, str(ROOT / head[0])]
    options = dict(step.options)
    if step.stage in ANALYSES:
        options |= {"no_figures": True, "runs": step.measurable_runs() or None}
    names = ("preset", "study", "model", "data")
    values = (settings.preset.name, settings.study, settings.model, settings.data)
    tasks = step.tasks if step.stage == "prepare" else []
    chat = {"apply_chat_template": settings.apply_chat_template or None}
    chat |= {"system_instruction": settings.system_instruction or None}
    return [*head, *tasks, *flags(options), *flags(dict(zip(names, values)) | chat)]


# -------------------------------------------------------------------------- how steps ended


class Outcomes:
    """How the steps ended, in `outputs/<study>/steps.json`.

    Of every step its seconds and how many results it made, in all its starts; of one that ended
    well also its runs; of one that failed its exit code, error and log. A start that was killed
    together with the study is not counted.
    """

    def __init__(self, settings: Settings) -> None:
        self.path = settings.output_dir / "outputs" / settings.study / "steps.json"

    def read(self) -> dict[str, dict[str, Any]]:
        """The outcomes by the step's name; none from a file that is damaged."""
        shape = {"*": {"stage": str, "seconds?": NUMBER, "runs?": int, "new_results?": int}}
        try:
            return read_json(self.path, shape) if self.path.is_file() else {}
        except UserError:  # only an estimate hangs on it
            return {}

    def add(self, step: Step, seconds: float, new_results: int, **outcome: Any) -> None:
        """Note a start of the step that has ended, beside what its earlier ones took."""
        steps = self.read()
        before = steps.get(step.name, {})
        spent = round(before.get("seconds", 0) + seconds, 1)
        results = before.get("new_results", 0) + new_results
        outcome = {"stage": step.stage, "seconds": spent, "new_results": results, **outcome}
        write_json(self.path, {**steps, step.name: outcome})


def count_results(step: Step, settings: Settings) -> int:
    """How many units of the step's runs are measured; 0 for a step that measures none."""
    if step.stage not in ANALYSES:
        return 0
    records = settings.document(ANALYSES[step.stage]).parent / "records"
    return len(units_of([run.name for run in step.runs], records))


def progress(step: Step, settings: Settings) -> tuple[int, list[Path]]:
    """What a step has made so far: its results, and the newest checkpoint of each run."""
    newest = [folder for run in step.runs for folder in checkpoints(run.folder)[-1:]]
    return count_results(step, settings), newest


# ---------------------------------------------------------------------------- is it done?


class DoneTests:
    """Asks, of every step, the test by which its script skips what is done."""

    def __init__(self, settings: Settings, unmeasured_runs: UnmeasuredRuns) -> None:
        self.settings, self.unmeasured_runs = settings, unmeasured_runs
        self._data: dict[Any, dict[str, Any] | None] = {}

    def done_steps(self, steps: Sequence[Step]) -> set[str]:
        """Names of the steps that are done, as are all that they need.

        The costlier tests are made only where the cheaper ones passed: training before analyses.
        """
        names = {step.name for step in steps}
        analyses = [step for step in steps if step.stage in ANALYSES]
        unmeasured: dict[str, set[str]] = {}
        done: set[str] = set()
        for step in steps:
            if names & set(step.needs) - done:
                continue
            if step.stage not in ANALYSES:
                is_done = self._is_made(step)
            else:  # asked once for all steps that differ in their runs alone
                key = f"{step.stage} {dict(step.options)}"
                if key not in unmeasured:
                    alike = [s for s in analyses if f"{s.stage} {dict(s.options)}" == key]
                    unmeasured[key] = self._unmeasured(step, alike)
                is_done = not unmeasured[key] & {"base", *(run.name for run in step.runs)}
            if is_done:
                done.add(step.name)
        return done

    def _is_made(self, step: Step) -> bool:
        """Whether a step that measures nothing is done; False for what cannot be read.

        Its process says what is wrong.
        """
        try:
            if step.stage == "report":
                report = self.settings.output_dir / "outputs" / self.settings.study / "report.html"
                documents = map(self.settings.document, ANALYSES.values())
                return _is_newest(report, (NOTEBOOK, *documents))
            if step.stage == "prepare":
                caps = self.settings.preset.max_length, self.settings.examples_per_task
                return all(
                    self._prepared((task,), caps[0][preset_family([task])], caps[1], 0)
                    for task in step.tasks
                )
            if step.stage == "sweep" and not all(map(step.sweep.has_chosen, step.planned_runs)):
                return False
            return all(
                self._is_trained(run) or (step.stage == "sweep" and run.has_diverged)
                for run in step.runs
            )
        except UserError:
            return False

    def _is_trained(self, run: Run) -> bool:
        """Whether training would skip the run: it is done, with these settings, base and data.

        The precision `auto` is what it was where the run was trained.
        """
        from lora_tradeoffs.training.run_record import different_settings

        config = run.config
        data = self._prepared(
            config.tasks, config.max_length, config.examples_per_task, config.limit
        )
        if not run.is_done or data is None:
            return False
        before = read_run(run.folder, "compared", "base", "data")
        precision = before["compared"].get("dtype") if config.dtype == "auto" else config.dtype
        record = {
            "compared": dataclasses.replace(config, dtype=precision).compared(),
            "base": self._base.record,
            "data": {name: task.report for name, task in data.items()},
        }
        return not different_settings(before, record)

    def _unmeasured(self, step: Step, alike: Sequence[Step]) -> set[str]:
        """The runs of these steps, and the base, that have a measurement left.

        All of them if the analysis was killed between its last measurement and its document.
        """
        runs = list(dict.fromkeys(name for s in alike for name in s.measurable_runs()))
        document = self.settings.document(ANALYSES[step.stage])
        records = (document.parent / "records").glob("*.json")
        if not runs or not _is_newest(document, records):
            return {"base"}
        try:
            return self.unmeasured_runs(step.stage, step.options, runs)
        except UserError:
            return {"base"}

    @functools.cached_property
    def _base(self) -> Any:
        from lora_tradeoffs.models.base import prepare_base

        return prepare_base(self.settings)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from lora_tradeoffs.models.base import load_tokenizer

        return load_tokenizer(self._base, self.settings)

    def _prepared(self, tasks: tuple[str, ...], *limits: int) -> dict[str, Any] | None:
        """The tasks' prepared data, if they and the base are there already."""
        from lora_tradeoffs.data.preparation import find_prepared
        from lora_tradeoffs.models.base import base_is_here

        if (tasks, limits) not in self._data:
            here = base_is_here(self.settings)
            data = find_prepared(self.settings, self._tokenizer, tasks, *limits) if here else None
            self._data[tasks, limits] = data
        return self._data[tasks, limits]


def _is_newest(path: Path, others: Iterable[Path]) -> bool:
    """Whether the file exists and none of the others was written after it."""
    times = [other.stat().st_mtime_ns for other in others if other.is_file()]
    return path.is_file() and path.stat().st_mtime_ns >= max(times, default=0)
