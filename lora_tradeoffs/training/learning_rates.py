"""The learning-rate sweep: the search for every arm's rate, and `learning_rates.json`.

The best rate depends on the arm, and its ratio to full
fine-tuning's on the length of the run, so every arm is searched separately, in runs of full length.
The search starts with factors of the arm's default rate. A rate is chosen only if half and twice
that rate were trained and neither is better: so a best rate at the edge widens the search, and
coarse factors are refined. Three rates are the fewest that can enclose an optimum, and more are
trained only where needed. Factors of two are the finest that one seed can usually distinguish.

The choice is by validation loss at the last checkpoint, averaged over tasks and seeds. A trained
rate is a run like any other, in the study's folder and named after its rate: it is resumed, skipped
when done, and measured by the analyses like the rest.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import BUILT_IN_FAMILIES, FAMILIES, Settings, UserError
from dataset_descriptions import family_of
from lora_tradeoffs.files import locked, read_json, write_json
from lora_tradeoffs.shapes import NUMBER
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.run import Run, is_main
from lora_tradeoffs.training.run_record import changed
from training_configs import TrainingConfig, rate_name

FACTORS = (0.5, 1.0, 2.0)
# The search goes this factor beyond the first rates: with the default factors from 1/16 of the
# arm's default to 16 times. An optimum beyond says more about the run (its length, its data).
REACH = 8.0
FILE = "learning_rates.json"
# These may differ between the sweep's runs and the run that uses the chosen rate.
FREE = ("learning_rate", "seed", "dtype")

# The types of the fields that figures and runs read from a record.
FIELDS = {
    **dict.fromkeys(("arm", "family", "method", "problem"), str),
    **{"rank": int, "learning_rate": NUMBER, "loss": (*NUMBER, type(None)), "chosen": bool},
}

Losses = dict[float, list[float]]  # by rate: the seeds' validation losses, inf if diverged


@dataclass(frozen=True)
class Search:
    """The losses of the trained rates, and the chosen rate, or the problem that left none."""

    losses: Losses
    rate: float | None
    problem: str = ""


# ------------------------------------------------------------------------------ the search


def rates_around(default: float, factors: Iterable[float] = FACTORS) -> list[float]:
    """Factors times the default, rising, to four figures. Raises UserError for a bad factor."""
    for factor in factors:
        if not 0 < factor < math.inf:
            raise UserError(f"--lr-sweep {factor:g}: a factor must be finite and above 0")
    return sorted({_rounded(default * factor) for factor in factors})


def mean_losses(losses: Mapping[float, Sequence[float]]) -> dict[float, float]:
    """The mean over seeds by rate, rising; infinite where any seed diverged."""
    means = {rate: sum(values) / len(values) for rate, values in sorted(losses.items())}
    return {rate: mean if math.isfinite(mean) else math.inf for rate, mean in means.items()}


def best_rate(losses: Mapping[float, Sequence[float]]) -> float | None:
    """The rate with the lowest mean loss; None if every rate diverged.

    Ties go to the lowest rate, which moves the model least.
    """
    means = mean_losses(losses)
    best = min(means, key=lambda rate: (means[rate], rate))
    return best if math.isfinite(means[best]) else None


def untried(losses: Mapping[float, Sequence[float]]) -> list[float]:
    """The rates to try next: half and twice the best rate; half the lowest if all diverged."""
    best = best_rate(losses)
    wanted = [min(losses) / 2] if best is None else [best / 2, best * 2]
    tried = [rate for rate in wanted if any(math.isclose(rate, r, rel_tol=0.01) for r in losses)]
    return [_rounded(rate) for rate in wanted if rate not in tried]


def search(rates: Sequence[float], train: Callable[[list[float]], Losses]) -> Search:
    """Train the given rates, then half and twice the best rate until neither is better.

    `train` returns the losses of the rates that it is given. The search stops at REACH beyond the
    given rates, and chooses none if the best rate still lies at that edge.
    """
    low, high = min(rates) / REACH, max(rates) * REACH
    losses = train(list(rates))
    while wanted := [r for r in untried(losses) if 0.99 * low < r < 1.01 * high]:
        losses |= train(wanted)
    losses = dict(sorted(losses.items()))
    best, tried = best_rate(losses), f"{min(losses):g} to {max(losses):g}"
    if best is None:
        return Search(losses, None, f"every learning rate from {tried} diverged")
    if untried(losses):
        return Search(
            losses,
            None,
            f"the validation loss is lowest at {best:g}, the edge of the learning rates tried"
            f" ({tried}); give other factors to --lr-sweep",
        )
    return Search(losses, best)


def _rounded(rate: float) -> float:
    return float(f"{rate:.4g}")


# -------------------------------------------------------------------------------- the sweep


def sweep(
    runs: Sequence[Run], settings: Settings, train_run: Callable[[Run], bool], overwrite: bool
) -> int:
    """Search the rate of every arm, starting with its planned runs; 1 if an arm gets none.

    `train_run` trains a run unless it is done, and returns whether it is done then. Every choice is
    written to models/<study>/learning_rates.json as soon as it is made.
    """
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    problems = []
    for arm, arm_runs in arms.items():
        try:
            result = _search_arm(arm_runs, train_run, overwrite)
        except UserError as error:
            problems.append(f"{arm}: {error}")
            continue
        problems += [f"{arm}: {result.problem}"] * bool(result.problem)
        if is_main():
            default = arm_runs[0].default.learning_rate
            records = search_records(arm, arm_runs[0].config, default, result)
            write_rates(settings.runs_dir, arm, records)
    if is_main():
        print(rates_table([r for r in read_rates(settings.runs_dir) if r["arm"] in arms]))
        path = settings.runs_dir / FILE
        print(f"chosen rates: {path}; train with them with --swept-rates", flush=True)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _search_arm(runs: Sequence[Run], train_run: Callable[[Run], bool], overwrite: bool) -> Search:
    """The search of one arm. Raises UserError for a run that failed without diverging."""
    by_seed = {run.config.seed: run for run in runs}

    def losses(rates: Sequence[float]) -> Losses:
        return {
            rate: [_loss(run.at_rate(rate), train_run, overwrite) for run in by_seed.values()]
            for rate in rates
        }

    return search(sorted({run.config.learning_rate for run in runs}), losses)


def _loss(run: Run, train_run: Callable[[Run], bool], overwrite: bool) -> float:
    """The run's final validation loss, infinite if it diverged, now or before."""
    if run.has_diverged and not overwrite:
        if is_main():
            print(f"{run.name} diverged before: {run.folder} (--overwrite retrains it)", flush=True)
        return math.inf
    is_done = train_run(run)
    _wait_for_all()
    if run.has_diverged:
        return math.inf
    if not is_done:
        raise UserError(f"no learning rate can be chosen, since {run.name} could not be trained")
    return run.final_loss()


def _wait_for_all() -> None:
    """Wait until the main process has written what the others are about to read."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


# ------------------------------------------------------------------------- learning_rates.json


def search_records(
    arm: str, config: TrainingConfig, default: float, result: Search
) -> list[dict[str, Any]]:
    """Flat records of an arm's search, one per rate.

    `loss` is None if a seed diverged; `chosen` is true at one rate, or at none, and then `problem`
    says why.
    """
    settings = _settings(config)
    return [
        {
            "arm": arm,
            **settings,
            "learning_rate": rate,
            "factor": _rounded(rate / default),
            "seeds": len(result.losses[rate]),
            "loss": loss if math.isfinite(loss) else None,
            "chosen": rate == result.rate,
            "problem": result.problem,
        }
        for rate, loss in mean_losses(result.losses).items()
    ]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """The settings that a choice is valid for: all but learning rate, seed and precision."""
    values = {k: v for k, v in config.compared().items() if k not in FREE}
    return values | {"tasks": "+".join(config.tasks)}


def read_rates(runs_dir: Path) -> list[dict[str, Any]]:
    """The records of the study's sweep, [] if there was none. Raises UserError for other files."""
    path = runs_dir / FILE
    if not path.is_file():
        return []
    return read_json(path, {"records": [FIELDS]})["records"]


def records_of_arm(run: Run) -> list[dict[str, Any]]:
    """The records of the sweep that are of the run's arm."""
    return [record for record in read_rates(run.folder.parent) if record["arm"] == run.arm]


def write_rates(runs_dir: Path, arm: str, records: list[dict[str, Any]]) -> Path:
    """Replace an arm's records; other processes may write those of other arms meanwhile."""
    path = runs_dir / FILE
    with locked(path.with_name(f".{FILE}.lock")):
        others = [record for record in read_rates(runs_dir) if record["arm"] != arm]
        order = operator.itemgetter("family", "method", "rank", "arm", "learning_rate")
        write_json(path, {"records": sorted(others + records, key=order)})
    return path


def chosen_rate(run: Run) -> float:
    """The rate that the study's sweep chose for the run's arm.

    Raises UserError, naming the command, if there is none for these settings.
    """
    arm, records = run.arm, records_of_arm(run)
    chosen = next((record for record in records if record["chosen"]), None)
    options = {"lr_sweep": True, "study": run.folder.parent.name} | run_options(run)
    command = " ".join(["python multi_task_training.py", *flags(options)])
    if chosen is None:
        problem = f" ({records[0]['problem']})" if records else ""
        raise UserError(
            f"no learning rate was chosen for {arm}{problem}; sweep first, with the same other"
            f" flags: {command}"
        )
    settings = _settings(run.config)
    if changes := changed({name: chosen.get(name) for name in settings}, settings):
        raise UserError(
            f"the learning rate of {arm} was chosen with other settings: {'; '.join(changes)}."
            f" Sweep again: {command}"
        )
    return float(chosen["learning_rate"])


def run_options(run: Run) -> dict[str, Any]:
    """The options of multi_task_training.py that say which tasks and which arm a run has."""
    config = run.config
    is_family = config.tasks == FAMILIES[config.family] and config.family in BUILT_IN_FAMILIES
    options: dict[str, Any] = {config.family: True} if is_family else {"tasks": config.tasks}
    if family_of(config.tasks) != config.family:
        options["family"] = f"{config.family}={'+'.join(FAMILIES[config.family])}"
    return options | {"adapter": str(ArmSpec.of(config, run.default))}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options as flags: True is a flag alone, a sequence all its values, None and False nothing."""
    parts: list[str] = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        parts.append(f"--{name.replace('_', '-')}")
        if value is not True:
            parts += map(str, value if isinstance(value, (list, tuple)) else [value])
    return parts


def rates_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Per arm its rates as factors of the default, their validation losses, and the choice."""
    import pandas as pd

    rows = [
        {
            "arm": r["arm"],
            "rate": rate_name(r["learning_rate"]).removeprefix("lr"),
            "of default": f"x{r['factor']:g}",
            "validation loss": "diverged" if r["loss"] is None else f"{r['loss']:.4f}",
            "": "chosen" if r["chosen"] else "",
        }
        for r in records
    ]
    table = pd.DataFrame(rows, columns=["arm", "rate", "of default", "validation loss", ""])
    problems = dict.fromkeys((r["arm"], r["problem"]) for r in records if r["problem"])
    lines = [f"no rate for {arm}: {problem}" for arm, problem in problems]
    return "\n".join([table.to_string(index=False), *lines])
