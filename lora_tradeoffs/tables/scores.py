"""What each analysis prints at its end: the last checkpoints, a line a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from config import FAMILIES, INTRUDER_EPSILON, INTRUDER_K
from dataset_descriptions import describe
from lora_tradeoffs.records import BOTH, MEAN, OVERALL, TEXT

DRIFT_COLUMNS = {
    "|dW|/|W0|": ("relative_frobenius", ".2e"),
    "stable rank": ("stable_rank", ".1f"),
    "rank90": ("rank90", ".1f"),
    "rho": ("rho", ".2f"),
    "intruders": ("intruders", ".2f"),
}


def adaptation_table(records: list[dict[str, Any]]) -> str:
    """Runs against tasks: the primary metric at the last checkpoint, test where it was read."""
    last: dict[str, int] = {}
    for r in records:
        last[r["run"]] = max(last.get(r["run"], 0), r["step"])
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for r in records:
        primary = describe(r["task"]).metrics[0]
        if r["metric"] != primary or r["step"] != last[r["run"]] or r["prompt"]:
            continue
        row = r["run"] + (f" ({r['shots']} shots)" if r["shots"] else "")
        if (row, r["task"]) not in cells or r["split"] == "test":
            cells[row, r["task"]] = r
    rows = list(dict.fromkeys(row for row, _ in cells))
    tasks = [t for tasks in FAMILIES.values() for t in tasks if any(t == k[1] for k in cells)]
    best: dict[tuple[str, bool], float] = {}  # of scores on one split: v is not held against test
    for (_, task), c in cells.items():
        key = (task, c["split"] == "validation")
        best[key] = max(best.get(key, c["value"]), c["value"])
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {t + ' ' + describe(t).metrics[0]:>24}" for t in tasks)]
    for row in rows:
        texts = []
        for task in tasks:
            c = cells.get((row, task))
            validated = bool(c) and c["split"] == "validation"
            mark = "*" if c and c["value"] == best[task, validated] else " "
            split = " v" if validated else "  "
            texts.append(f"{c['value']:.3f} +- {c['stderr']:.3f}{mark}{split}" if c else "-   ")
        lines.append(f"{row:<{width}}" + "".join(f"  {text:>24}" for text in texts))
    lines += _spread_over_prompts(records, last)
    lines.append(
        "value +- standard error over items; v: validation, else test; * the highest of its split"
    )
    return "\n".join(lines)


def _spread_over_prompts(records: list[dict[str, Any]], last: dict[str, int]) -> list[str]:
    """Mean and standard deviation of the primary metric over prompts, where there are several."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for r in records:
        primary = r["metric"] == describe(r["task"]).metrics[0]
        if primary and r["step"] == last[r["run"]] and not r["shots"]:
            values.setdefault((r["run"], r["task"], r["split"]), []).append(r["value"])
    return [
        f"over {len(v)} prompts: {run} {task} {split}"
        f" mean {np.mean(v):.3f}, sd {np.std(v, ddof=1):.3f}"
        for (run, task, split), v in values.items()
        if len(v) > 1
    ]


def retention_table(records: list[dict[str, Any]], shots: int = 0) -> str:
    """Runs against tasks at the last checkpoint: score and forgetting, with standard errors.

    Benchmarks are those with so many examples before a question.
    """
    records = [r for r in records if r["shots"] == shots or r["task"].startswith(TEXT)]
    last: dict[str, int] = {}
    for r in records:
        last[r["run"]] = max(last.get(r["run"], 0), r["step"])
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    losses: dict[tuple[str, str], dict[str, Any]] = {}
    for r in records:
        if r["step"] != last[r["run"]] or r["update_scale"] != 1:
            continue
        key = (r["run"], r["task"])
        if r["metric"] == "forgetting":
            losses[key] = r
        elif r["metric"] in ("acc_norm", "retention", "log_likelihood"):
            scores[key] = r
        elif r["metric"] == "acc":
            scores.setdefault(key, r)
    tasks = sorted({task for _, task in scores}, key=lambda t: (t.startswith(TEXT), t == "mean", t))
    width = max(map(len, last))
    lines = [" " * width + "".join(f"  {task:>27}" for task in tasks)]
    for run in last:
        texts = []
        for task in tasks:
            score, loss = scores.get((run, task)), losses.get((run, task))
            text = f"{score['value']:.3f}" if score else "-"
            if loss and loss["stderr"] is not None:
                mark = "*" if loss["p_value"] < 0.05 else " "
                text += f" ({-loss['value']:+.3f} +- {loss['stderr']:.3f}{mark})"
            texts.append(text)
        lines.append(f"{run:<{width}}" + "".join(f"  {text:>27}" for text in texts))
    flat = sorted({t for (_, t), r in losses.items() if r.get("at_chance")})
    if flat:
        lines.append(f"the base guesses (within two standard errors): {', '.join(flat)}; it has")
        lines[-1] += " nothing there that could be forgotten"
    cut: dict[str, int] = {}
    for r in records:
        if r.get("truncated"):
            cut[r["task"]] = max(cut.get(r["task"], 0), r["truncated"])
    if cut:
        counts = ", ".join(f"{n} of {task}" for task, n in sorted(cut.items()))
        lines.append(f"contexts longer than the model's window, cut from the left: {counts}")
    lines.append(
        "in brackets: change against the base on the same items +- standard error; * p < .05 of the"
        " paired test, uncorrected; text: nats a token"
    )
    return "\n".join(lines)


def drift_table(records: list[dict[str, Any]]) -> str:
    """The last checkpoint of every run, a line a module; intruders: mean number a matrix."""
    last: dict[str, int] = {}
    for r in records:
        last[r["run"]] = max(last.get(r["run"], 0), r["step"])
    cells: dict[tuple[str, str], dict[str, float]] = {}
    for r in records:
        published = r["k"] in (None, INTRUDER_K) and r["eps"] in (None, INTRUDER_EPSILON)
        if r["layer"] < 0 and published and r["step"] == last[r["run"]]:
            cells.setdefault((r["run"], r["module"]), {})[r["metric"]] = r["value"]
    width = max((len(run) for run, _ in cells), default=3)
    head = f"{'run':<{width}}  {'module':>12}{'share':>8}"
    lines = [head + "".join(f"{name:>13}" for name in DRIFT_COLUMNS)]
    for (run, module), found in cells.items():
        if "relative_frobenius" not in found:
            continue
        share = f"{found['update_share']:8.1%}" if "update_share" in found else " " * 8
        texts = [
            format(found.get(metric, math.nan), form).replace("nan", "")
            for metric, form in DRIFT_COLUMNS.values()
        ]
        lines.append(f"{run:<{width}}  {module:>12}{share}" + "".join(f"{t:>13}" for t in texts))
    lines.append(
        f"share: of ||dW||^2 of all tensors; rho, intruders: k = {INTRUDER_K}, eps ="
        f" {INTRUDER_EPSILON}, mean over the matrices"
    )
    return "\n".join(lines)


def gradient_table(records: list[dict[str, Any]]) -> str:
    """Runs against pairs of tasks at the last checkpoint, over all layers; a part a family."""
    last: dict[str, int] = {}
    for r in records:
        last[r["run"]] = max(last.get(r["run"], 0), r["step"])
    found: dict[str, dict[tuple[str, str, str], dict[str, Any]]] = {}
    for r in records:
        if (r["layer"], r["module"], r["step"]) == (OVERALL, BOTH, last[r["run"]]):
            pair = "within" if r["task"] == r["other"] != MEAN else f"{r['task']} {r['other']}"
            pair = MEAN if r["task"] == MEAN else pair
            key = (r["run"], pair, r["metric"])
            found.setdefault(r["family"], {}).setdefault(key, []).append(r)
    lines = []
    for family in (f for f in FAMILIES if f in found):
        cells = found[family]
        runs = dict.fromkeys(run for run, _, _ in cells)
        pairs = dict.fromkeys(pair for _, pair, _ in cells)
        pairs = sorted(pairs, key=_column_order)
        width = max(map(len, [*runs, family]))
        lines.append(f"{family:<{width}}" + "".join(f"  {pair:>24}" for pair in pairs))
        for run in runs:
            texts = [_cell(cells, run, pair) for pair in pairs]
            lines.append(f"{run:<{width}}" + "".join(f"  {text:>24}" for text in texts))
    lines.append(
        "cosine +- standard error over batches (share of batches in conflict); within: of a task"
        " with itself, on halves of its batches, mean over the tasks: a reference for noise"
    )
    return "\n".join(lines)


def _column_order(pair: str) -> tuple[bool, bool, str]:
    return pair == "within", pair == MEAN, pair


def _cell(cells: dict[tuple[str, str, str], list[dict[str, Any]]], run: str, pair: str) -> str:
    metric = "within_cosine" if pair == "within" else "gradient_cosine"
    cosines = [r for r in cells.get((run, pair, metric), []) if r["value"] is not None]
    if not cosines:
        return "-"
    if pair == "within":
        return f"{sum(r['value'] for r in cosines) / len(cosines):+.3f}"
    error = "" if cosines[0]["stderr"] is None else f" +- {cosines[0]['stderr']:.3f}"
    share = cells[run, pair, "gradient_conflict"][0]["value"]
    return f"{cosines[0]['value']:+.3f}{error} ({share:4.0%})"
