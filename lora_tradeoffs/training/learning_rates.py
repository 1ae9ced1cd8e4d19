"""The search for an arm's learning rate: grid, choice, edge, and `learning_rates.json`.

The best rate depends on the arm (with alpha = 2r on the rank, too) and its ratio to full
fine-tuning's on the run's length, so every arm is searched by itself, in runs of full length. A
grid is made of factors of the arm's default rate. A rate is chosen only if half and twice of it
were trained and neither is better, whatever the grid: so an optimum at the edge widens the grid,
and a coarse grid is refined. Three rates are the fewest that can hold such an optimum, and every
further one is trained where it is needed: five at once would train two that tell little. Steps of
two are the finest that one seed can mostly tell apart.

The choice is by validation loss at the last checkpoint, the mean over tasks and seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import FAMILIES, UserError
from lora_tradeoffs.files import read_json, write_json
from training_configs import TrainingConfig, rate_name

FACTORS = (0.5, 1.0, 2.0)
# A grid is widened this many times either way: with the default's, down to 1/16 of the arm's rate
# and up to 16 times. An optimum beyond speaks of the run (its length, its data), not of the rate.
REACH = 8.0
FILE = "learning_rates.json"
# These may differ between a choice and the run that uses it: what is searched and averaged over,
# and how numbers are computed.
FREE = ("learning_rate", "seed", "dtype")

# What figures and runs take from a record of a sweep.
FIELDS = {
    **dict.fromkeys(("arm", "family", "method", "problem"), str),
    **{"rank": int, "learning_rate": float, "loss": (int, float, type(None)), "chosen": bool},
}

Losses = dict[float, list[float]]  # of each rate: a validation loss a seed, inf if it diverged


@dataclass(frozen=True)
class Search:
    """The rates that were trained, and the one that was chosen, or why there is none."""

    losses: Losses
    rate: float | None
    problem: str = ""


# ------------------------------------------------------------------------------ the search


def grid(default: float, factors: Iterable[float] = FACTORS) -> list[float]:
    """Rates by factors of the default, rising, of four figures. Raises UserError for a factor."""
    for factor in factors:
        if not 0 < factor < math.inf:
            raise UserError(f"--lr-sweep {factor:g}: a factor of the learning rate is above 0")
    return sorted({_rounded(default * factor) for factor in factors})


def mean_losses(losses: Mapping[float, Sequence[float]]) -> dict[float, float]:
    """The mean over seeds by rate, rising; infinite where any seed diverged."""
    means = {rate: sum(found) / len(found) for rate, found in sorted(losses.items())}
    return {rate: mean if math.isfinite(mean) else math.inf for rate, mean in means.items()}


def best_rate(losses: Mapping[float, Sequence[float]]) -> float | None:
    """The rate of the lowest mean loss; None if every rate diverged.

    Of equal rates the lowest, which moves the model least.
    """
    means = mean_losses(losses)
    best = min(means, key=lambda rate: (means[rate], rate))
    return best if math.isfinite(means[best]) else None


def untried(losses: Mapping[float, Sequence[float]]) -> list[float]:
    """What is to be tried next: half and twice the best rate; half the lowest if all diverged."""
    best = best_rate(losses)
    wanted = [min(losses) / 2] if best is None else [best / 2, best * 2]
    return [_rounded(r) for r in wanted if not any(_is_same(r, tried) for tried in losses)]


def search(rates: Sequence[float], train: Callable[[list[float]], Losses]) -> Search:
    """Train the grid, then half and twice the best rate until neither is better.

    `train` returns the losses of the rates it is given. The search goes no further than REACH
    beyond the grid's ends, and has no rate if the best one is still unchecked there.
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


def _is_same(rate: float, other: float) -> bool:
    """The same but for rounding."""
    return math.isclose(rate, other, rel_tol=0.01)


# ------------------------------------------------------------------------- learning_rates.json


def records_of(arm: str, config: TrainingConfig, default: float, found: Search) -> list[dict]:
    """Flat records of an arm's search, one a rate.

    `loss` is None where a seed diverged; `chosen` is true at one rate, or at none and `problem`
    says why.
    """
    settings = _settings(config)
    return [
        {
            "arm": arm,
            **settings,
            "learning_rate": rate,
            "factor": _rounded(rate / default),
            "seeds": len(found.losses[rate]),
            "loss": loss if math.isfinite(loss) else None,
            "chosen": rate == found.rate,
            "problem": found.problem,
        }
        for rate, loss in mean_losses(found.losses).items()
    ]


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """What a choice holds for: all that a run learns with, but rate, seed and precision."""
    values = {k: v for k, v in config.compared().items() if k not in FREE}
    return values | {"tasks": "+".join(config.tasks)}


def read_rates(runs_dir: Path) -> list[dict[str, Any]]:
    """The records of the study's sweep, empty if there was none. Raises UserError for others."""
    path = runs_dir / FILE
    if not path.is_file():
        return []
    document = read_json(path)
    try:
        records = [dict(record) for record in document["records"]]
        if all(isinstance(r[name], kind) for r in records for name, kind in FIELDS.items()):
            return records
    except (KeyError, TypeError, ValueError):
        pass
    raise UserError(f"{path} is no record of a sweep; delete it and sweep again (--lr-sweep)")


def write_rates(runs_dir: Path, arm: str, records: list[dict[str, Any]]) -> Path:
    """Put an arm's records in the place of its old ones; sweeps of other arms may run beside."""
    from filelock import FileLock

    path = runs_dir / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{FILE}.lock")):
        others = [record for record in read_rates(runs_dir) if record["arm"] != arm]
        write_json(path, {"records": sorted(others + records, key=_place)})
    return path


def _place(record: dict[str, Any]) -> tuple[str, str, int, str, float]:
    names = (record["family"], record["method"], record["rank"], record["arm"])
    return *names, record["learning_rate"]


def chosen_rate(runs_dir: Path, arm: str, config: TrainingConfig) -> float:
    """The rate that the study's sweep chose for the arm.

    Raises UserError, naming the command, if it chose none or under other settings.
    """
    own = [record for record in read_rates(runs_dir) if record["arm"] == arm]
    chosen = next((record for record in own if record["chosen"]), None)
    command = f"python multi_task_training.py --lr-sweep --study {runs_dir.name} {_flags(config)}"
    if chosen is None:
        why = f" ({own[0]['problem']})" if own else ""
        raise UserError(
            f"no learning rate was chosen for {arm}{why}; sweep first, with the same other flags:"
            f" {command}"
        )
    changed = [
        f"{name} {chosen.get(name)} -> {value}"
        for name, value in _settings(config).items()
        if chosen.get(name) != value
    ]
    if changed:
        raise UserError(
            f"the learning rate of {arm} was chosen with other settings: {'; '.join(changed)}."
            f" Sweep again: {command}"
        )
    return float(chosen["learning_rate"])


def _flags(config: TrainingConfig) -> str:
    whole = config.tasks == FAMILIES[config.family]
    tasks = f"--{config.family}" if whole else f"--tasks {' '.join(config.tasks)}"
    arms = {"full": "--full-finetune", "full_qv": "--full-qv"}
    return f"{tasks} {arms.get(config.method) or f'--lora {config.rank}'}"


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Arms by rates: factor of the default, validation loss, and which was chosen."""
    width = max([len("arm"), *(len(record["arm"]) for record in records)])
    lines = [f"{'arm':<{width}}  {'rate':>10}  {'of default':>10}  validation loss"]
    last = ""
    for r in records:
        name = "" if r["arm"] == last else r["arm"]
        loss = "diverged" if r["loss"] is None else f"{r['loss']:.4f}"
        mark = "  chosen" if r["chosen"] else ""
        rate = rate_name(r["learning_rate"]).removeprefix("lr")
        lines.append(
            f"{name:<{width}}  {rate:>10}  {'x' + format(r['factor'], 'g'):>10}  {loss}{mark}"
        )
        last = r["arm"]
    problems = dict.fromkeys((r["arm"], r["problem"]) for r in records if r["problem"])
    return "\n".join([*lines, *(f"no rate for {arm}: {problem}" for arm, problem in problems)])
