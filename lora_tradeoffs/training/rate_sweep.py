"""`multi_task_training.py --lr-sweep`: train every arm's learning rates until one can be chosen.

A point of the sweep is a run like any other, in the study's folder and named after its rate: it is
resumed, skipped when done, and measured by the analyses like the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

from config import Settings, UserError
from lora_tradeoffs.training.learning_rates import (
    FILE,
    Losses,
    Search,
    read_rates,
    records_of,
    search,
    table,
    write_rates,
)
from lora_tradeoffs.training.run import Run, is_main


def sweep(
    runs: Sequence[Run], settings: Settings, train_run: Callable[[Run], bool], overwrite: bool
) -> int:
    """Search the rate of every arm among the runs, which are its grid; 1 if an arm has none.

    `train_run` trains a run, or finds it done, and says whether it has ended. Every choice is
    written when it is made, to models/<study>/learning_rates.json.
    """
    arms: dict[str, list[Run]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    problems = []
    for arm, own in arms.items():
        try:
            found = _search(own, train_run, overwrite)
        except UserError as error:
            problems.append(f"{arm}: {error}")
            continue
        problems += [f"{arm}: {found.problem}"] * bool(found.problem)
        if is_main():
            default = own[0].default.learning_rate
            records = records_of(arm, own[0].config, default, found)
            write_rates(settings.runs_dir, arm, records)
    if is_main():
        records = [r for r in read_rates(settings.runs_dir) if r["arm"] in arms]
        print(table(records))
        print(f"choices: {settings.runs_dir / FILE}; --swept-rates trains with them", flush=True)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _search(runs: Sequence[Run], train_run: Callable[[Run], bool], overwrite: bool) -> Search:
    """The search of one arm; raises UserError for a run that failed, but not from its rate."""
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
            print(f"{run.name} diverged: {run.folder} (--overwrite trains it again)", flush=True)
        return math.inf
    ended = train_run(run)
    _wait_for_all()
    if run.has_diverged:
        return math.inf
    if not ended:
        raise UserError(f"no learning rate can be chosen, since {run.name} could not be trained")
    return run.final_loss()


def _wait_for_all() -> None:
    """Until the main process has written what the others are about to read."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
