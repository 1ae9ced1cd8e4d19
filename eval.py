"""Adaptation: every checkpoint and the base, evaluated on the tasks, with intervals.

    python eval.py                                      # all runs of the study
    python eval.py --runs similar_lora_r8_seed42 --checkpoints last
    python eval.py --runs FOLDER                        # any PEFT or full fine-tuning folder

Validation is measured at every checkpoint (on --limit items in mid-training), test at the base, the
last checkpoint and the one with the lowest validation loss alone. What is there is not measured
again. Results go to performance_analysis/<study>/.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import (
    DATA_SEED,
    FAMILIES,
    Parser,
    Settings,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)
from dataset_descriptions import describe

MID_TRAINING_LIMIT = 1_000
SHOWN = 8  # items of each unit that are kept as text
SHOTS = 4  # of the base's second row: a zero-shot base mostly lacks the format
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Subject:
    """A checkpoint, or the base (step 0), and what its records say about it."""

    run: str
    step: int
    checkpoint: Any  # checkpoint_models.Checkpoint; None for the base
    fields: dict[str, Any]
    family: str | None  # None: both
    is_final: bool  # base, last or validation-chosen: all items, and test


@dataclass(frozen=True)
class Unit:
    """One measurement: a subject on one split of one task."""

    subject: Subject
    split: str
    task: str
    limit: int
    shots: int

    @property
    def name(self) -> str:
        shots = f"-{self.shots}shot" if self.shots else ""
        return f"{self.subject.run}-{self.subject.step}-{self.task}-{self.split}{shots}"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate every checkpoint on the tasks.")
    add_common_arguments(parser)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--runs", nargs="+", metavar="RUN", help="names of runs, or folders")
    group.add_argument("--checkpoints", nargs="+", default=["all"], help="all | last | steps")
    group.add_argument("--splits", nargs="+", choices=("validation", "test"), help="default both")
    group.add_argument("--tasks", nargs="+", metavar="TASK", help="default: the run's family")
    group.add_argument("--cross-family", action="store_true", help="the other family's tasks, too")
    group.add_argument(
        "--limit",
        type=int,
        help=f"at most N items, drawn with a seed (mid-training: {MID_TRAINING_LIMIT}; else all)",
    )
    group.add_argument(
        "--shots", type=int, default=SHOTS, help="examples in the base's second row; 0: no such row"
    )
    group.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    group.add_argument("--token-budget", type=int, help="padded tokens of a batch")
    group.add_argument("--overwrite", action="store_true", help="measure again what is there")
    return parser


# ----------------------------------------------------------------------------- what to measure


def find_subjects(args: argparse.Namespace, settings: Settings, base: Any) -> list[Subject]:
    """The base, and the chosen checkpoints of the chosen runs.

    Raises UserError if there are none (and says how to make one), or of another base.
    """
    from checkpoint_models import checkpoints_in

    folders = _run_folders(args, settings)
    fields = {"base_model": base.name, "study": settings.study}
    subjects = [Subject("base", 0, None, {**fields, **_no_arm("base")}, None, True)]
    for folder in folders:
        arm, family, steps = _arm(folder, base)
        found = checkpoints_in(folder)
        final = {found[-1].step, _chosen_step(folder)}
        kept = [c for c in found if _is_asked(c.step, found[-1].step, args.checkpoints)]
        if not kept:
            listed = ", ".join(str(c.step) for c in found)
            raise UserError(f"{folder} has no such checkpoint; its steps are {listed}")
        for c in kept:
            own = {**fields, **arm, "fraction": c.step / steps if steps else 1.0}
            subjects.append(Subject(c.run, c.step, c, own, family, c.step in final))
    return subjects


def _run_folders(args: argparse.Namespace, settings: Settings) -> list[Path]:
    if args.runs:
        named = [settings.runs_dir / name for name in args.runs]
        folders = [p if p.is_dir() else Path(r) for p, r in zip(named, args.runs, strict=True)]
        for folder in folders:
            if not folder.is_dir():
                raise UserError(
                    f"no run {folder.name!r} in {settings.runs_dir}, and no such folder"
                )
        return folders
    found = sorted(p.parent for p in settings.runs_dir.glob("*/run.json"))
    found = [folder for folder in found if any(folder.glob("checkpoint-*"))]
    if not found:
        models = settings.runs_dir.parent
        studies = sorted({p.parent.parent.name for p in models.glob("*/*/run.json")})
        raise UserError(
            f"the study {settings.study!r} has no run with a checkpoint; make one with: python"
            f" multi_task_training.py --similar --lora 8 (studies that have: {studies or 'none'})"
        )
    return found


def _no_arm(method: str) -> dict[str, Any]:
    arm = dict(method=method, rank=0, alpha=0, scaling="", target_modules="")
    return {**arm, "learning_rate": 0.0, "seed": 0, "fraction": 0.0}


def _arm(folder: Path, base: Any) -> tuple[dict[str, Any], str | None, int]:
    """What the records say of a run, its family, and its steps; of a foreign folder, less."""
    from checkpoint_utils import read_json

    record_file = next(
        (p / "run.json" for p in (folder, folder.parent) if (p / "run.json").is_file()), None
    )
    if record_file is None:
        adapters = [*folder.glob("adapter_config.json"), *folder.glob("*/adapter_config.json")]
        if not adapters:
            return _no_arm("full"), None, 0
        adapter = read_json(adapters[0])
        arm = {**_no_arm("lora"), "rank": adapter["r"], "alpha": adapter["lora_alpha"]}
        return arm, None, 0
    record = read_json(record_file)
    if record["base"]["digest"] != base.digest:
        raise UserError(
            f"{folder.name} was trained on {record['base']['name']}, not on {base.name}: give that"
            " base with --model"
        )
    config = record["config"]
    names = ("method", "rank", "alpha", "scaling", "target_modules", "learning_rate", "seed")
    return {name: config[name] for name in names}, config["family"], record["steps"]


def _chosen_step(folder: Path) -> int:
    """The checkpoint with the lowest validation loss, -1 if the run does not say."""
    from checkpoint_utils import read_json

    path = folder / "training.json"
    if not path.is_file():
        return -1
    entries = [e for e in read_json(path)["validation"] if e["step"] > 0]
    return min(entries, key=lambda e: e["eval_loss"])["step"] if entries else -1


def _is_asked(step: int, last: int, asked: list[str]) -> bool:
    for word in asked:
        if word not in ("all", "last") and not word.isdigit():
            raise UserError(f"--checkpoints {word}: write all, last, or steps")
    return "all" in asked or str(step) in asked or ("last" in asked and step == last)


def plan_units(args: argparse.Namespace, subjects: list[Subject]) -> list[Unit]:
    """Every measurement that is asked for."""
    trained = {s.family for s in subjects if s.family} or set(FAMILIES)
    units = []
    for subject in subjects:
        families = [subject.family] if subject.family else sorted(trained, reverse=True)
        if args.cross_family:
            families = list(FAMILIES)
        tasks = [task for family in families for task in FAMILIES[family]]
        for task in args.tasks or tasks:
            describe(task)
            for split in args.splits or ("validation", "test"):
                if split == "test" and not subject.is_final and not args.splits:
                    continue
                limit = args.limit or (0 if subject.is_final else MID_TRAINING_LIMIT)
                shots = (0, args.shots) if subject.checkpoint is None and args.shots else (0,)
                units += [Unit(subject, split, task, limit, n) for n in shots]
    return units


# ------------------------------------------------------------------------------- measurement


class Evaluator:
    """Measures a model on a split of a task, batched; keeps the data between calls."""

    def __init__(self, settings: Settings, tokenizer: Any, device: str, bf16: bool, budget: int):
        self.settings, self.tokenizer, self.device = settings, tokenizer, device
        self.bf16, self.budget = bf16, budget
        self.prepared: dict[str, Any] = {}

    def task(self, name: str) -> Any:
        from data_preprocessing import prepare

        if name not in self.prepared:
            length = self.settings.preset.max_length[describe(name).family]
            count = self.settings.examples_per_task
            self.prepared |= prepare(self.settings, self.tokenizer, [name], length, count)
        return self.prepared[name]

    def rows(self, unit: Unit) -> Any:
        """The unit's items: all, or `limit` of them, the same for every checkpoint."""
        rows = self.task(unit.task).split(unit.split)
        if not unit.limit or unit.limit >= len(rows):
            return rows
        drawn = np.random.default_rng(DATA_SEED).permutation(len(rows))[: unit.limit]
        return rows.select(np.sort(drawn))

    def request(self, unit: Unit) -> dict[str, Any]:
        """What makes a measurement the same one."""
        return {
            "data": self.task(unit.task).fingerprint,
            "limit": unit.limit,
            "shots": unit.shots,
            "precision": "bf16 autocast" if self.bf16 else "fp32",
        }

    def measure(self, model: Any, unit: Unit) -> tuple[list[Any], dict[str, float], list[dict]]:
        """Scores, other figures (class shares), and some items as text."""
        import torch

        from metrics import score

        rows = self.rows(unit)
        prompts = self._prompts(rows, unit)
        description = describe(unit.task)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            if description.is_classification:
                predictions = self._classify(model, prompts, description)
                references = rows["label"][:]
                outputs = [description.label_words[p] for p in predictions]
            else:
                predictions = outputs = self._generate(model, prompts, description)
                references = rows["references"][:]
        shares = {
            f"share_{name}": float(np.mean(np.array(predictions) == i))
            for i, name in enumerate(description.label_names)
        }
        shown = [
            {"row": rows[i]["row"], "prompt": rows[i]["prompt"], "output": outputs[i]}
            | {"references": rows[i]["references"]}
            for i in range(min(SHOWN, len(rows)))
        ]
        return score(unit.task, predictions, references), shares, shown

    def baseline(self, unit: Unit) -> tuple[str, list[Any]]:
        """Name and scores of the predictions that need no model, on the unit's items."""
        from baselines import always_abstain, lead, majority_class, retrieved_code
        from metrics import score

        rows, name = self.rows(unit), unit.task
        references = rows["references"][:]
        if describe(name).is_classification:
            labels = rows["label"][:]
            return "majority_class", score(name, majority_class(labels).tolist(), labels)
        if name == "squad_v2":
            return "always_abstain", score(name, always_abstain(len(rows)), references)
        if name == "cnn_dailymail":
            articles = [p.removeprefix("Article: ") for p in rows["prompt"][:]]
            articles = [a.removesuffix("\nSummary:") for a in articles]
            return "lead_3", score(name, [lead(a) for a in articles], references)
        train = self.task(name).split("train")
        code = [c.strip() for c in train["completion"][:]]
        found = retrieved_code(rows["prompt"][:], train["prompt"][:], code)
        return "nearest_description", score(name, found, references)

    def _prompts(self, rows: Any, unit: Unit) -> list[list[int]]:
        from prompt_encoding import bos_ids, text_ids

        ids, starts = rows["input_ids"][:], rows["prompt_length"][:]
        prompts = [row[:start] for row, start in zip(ids, starts, strict=True)]
        if not unit.shots:
            return prompts
        train = self.task(unit.task).split("train")
        chosen = np.random.default_rng(DATA_SEED).permutation(len(train))[: unit.shots]
        examples = [train[int(i)]["prompt"] + train[int(i)]["completion"] for i in chosen]
        text = "".join(example + SHOT_SEPARATOR for example in examples)
        bos = bos_ids(self.tokenizer)
        return [bos + text_ids(self.tokenizer, text) + prompt[len(bos) :] for prompt in prompts]

    def _classify(self, model: Any, prompts: list[list[int]], description: Any) -> list[int]:
        from prompt_encoding import label_token_ids
        from scoring import Item, log_likelihoods

        words = [[i] for i in label_token_ids(self.tokenizer, description)]
        found = log_likelihoods(model, [Item(p, words) for p in prompts], self.budget)
        values = np.array([[s.log_likelihood for s in row] for row in found])
        if not np.isfinite(values).all():
            raise UserError(f"{description.name}: the model's logits are not finite")
        return values.argmax(axis=1).tolist()

    def _generate(self, model: Any, prompts: list[list[int]], description: Any) -> list[str]:
        from scoring import generate_greedily

        stop = description.stop
        decode = self.tokenizer.decode

        def stopped(tokens: list[int]) -> bool:
            return stop in decode(tokens[-8:]).lstrip()

        eos = [self.tokenizer.eos_token_id]
        try:
            found = generate_greedily(
                model, prompts, description.max_new_tokens, eos, stopped, self.budget
            )
        except FloatingPointError as error:
            raise UserError(f"{description.name}: {error}") from None
        return [decode(tokens).lstrip().partition(stop)[0].strip() for tokens in found]


def records_of(unit: Unit, scores: list[Any], shares: dict[str, float]) -> list[dict[str, Any]]:
    """The unit's flat records."""
    from comparisons import estimate

    family = describe(unit.task).family
    common = {
        **unit.subject.fields,
        "run": unit.subject.run,
        "family": unit.subject.family or family,
        "step": unit.subject.step,
        "split": unit.split,
        "task": unit.task,
        "shots": unit.shots,
        "prompt": 0,
    }
    records = []
    for s in scores:
        e = estimate(s)
        figures = {"value": e.value, "stderr": e.stderr, "low": e.low, "high": e.high, "n": e.n}
        records.append({**common, "metric": s.name, **figures})
    count = scores[0].count
    for name, value in shares.items():
        records.append({**common, "metric": name, "value": value, "n": count})
    return records


# ------------------------------------------------------------------------------------- report


def table(records: list[dict[str, Any]]) -> str:
    """Runs against tasks: the primary metric at the last checkpoint, test where it was read."""
    last: dict[str, int] = {}
    for r in records:
        last[r["run"]] = max(last.get(r["run"], 0), r["step"])
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for r in records:
        primary = describe(r["task"]).metrics[0]
        if r["metric"] != primary or r["step"] != last[r["run"]]:
            continue
        row = r["run"] + (f" ({r['shots']} shots)" if r["shots"] else "")
        if (row, r["task"]) not in cells or r["split"] == "test":
            cells[row, r["task"]] = r
    rows = list(dict.fromkeys(row for row, _ in cells))
    tasks = [t for tasks in FAMILIES.values() for t in tasks if any(t == k[1] for k in cells)]
    best = {t: max(c["value"] for (_, task), c in cells.items() if task == t) for t in tasks}
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"  {t + ' ' + describe(t).metrics[0]:>24}" for t in tasks)]
    for row in rows:
        texts = []
        for task in tasks:
            c = cells.get((row, task))
            mark = "*" if c and c["value"] == best[task] else " "
            split = " v" if c and c["split"] == "validation" else "  "
            texts.append(f"{c['value']:.3f} +- {c['stderr']:.3f}{mark}{split}" if c else "-   ")
        lines.append(f"{row:<{width}}" + "".join(f"  {text:>24}" for text in texts))
    lines.append("value +- standard error over items; * the highest; v: validation, else test")
    return "\n".join(lines)


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for name in ("limit", "token_budget"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} takes at least 1")
    settings = resolve_settings(args)
    from checkpoint_utils import load_tokenizer, prepare_base
    from results import Results
    from run_records import pick_device, pick_precision
    from scoring import TOKEN_BUDGET

    device = pick_device()
    print(settings.headline(device), flush=True)
    base = prepare_base(settings)
    subjects = find_subjects(args, settings, base)
    bf16 = pick_precision(args.dtype, device) == "bf16"
    budget = args.token_budget or TOKEN_BUDGET * (8 if device == "cuda" else 1)
    evaluator = Evaluator(settings, load_tokenizer(base), device, bf16, budget)
    results = Results(settings.output_dir / "performance_analysis" / settings.study)
    units = plan_units(args, subjects)
    pending = [
        unit
        for unit in units
        if args.overwrite or not results.is_done(unit.name, evaluator.request(unit))
    ]
    print(f"{len(units)} measurements, {len(units) - len(pending)} of them are there", flush=True)
    broken = _measure_all(evaluator, results, base, pending, device)
    meta = {"study": settings.study, "base_model": base.name, "preset": settings.preset.name}
    path = results.join("adaptation", meta)
    from checkpoint_utils import read_json

    print(table(read_json(path)["records"]))
    print(f"records: {path}\nitems and samples: {results.folder}")
    for message in broken:
        print(f"error: {message}", file=sys.stderr)
    return 1 if broken else 0


def _measure_all(
    evaluator: Evaluator, results: Any, base: Any, pending: list[Unit], device: str
) -> list[str]:
    """Measure checkpoint by checkpoint; what was wrong with those that could not be."""
    from tqdm import tqdm

    from checkpoint_models import checkpoint_models

    if not pending:
        return []
    by_folder: dict[Any, list[Unit]] = {}
    for unit in pending:
        by_folder.setdefault(unit.subject.checkpoint, []).append(unit)
    broken = []
    progress = tqdm(total=len(pending), unit="measurement")
    wanted = [checkpoint for checkpoint in by_folder if checkpoint is not None]
    for checkpoint, model in checkpoint_models(base, wanted, device):
        for unit in by_folder.get(checkpoint, []):
            progress.set_description(unit.name)
            if isinstance(model, UserError):
                progress.update()
                continue
            try:
                scores, shares, shown = evaluator.measure(model, unit)
            except UserError as error:
                if checkpoint is None:
                    raise
                broken.append(f"{unit.name}: {error}")
                progress.update()
                continue
            _write_samples(results.folder / "samples" / f"{unit.name}.jsonl", shown)
            records = records_of(unit, scores, shares)
            if checkpoint is None and not unit.shots:
                name, scored = evaluator.baseline(unit)
                arm = {**_no_arm("baseline"), "run": name}
                records += [{**r, **arm} for r in records_of(unit, scored, {})]
            results.write(unit.name, evaluator.request(unit), records, scores)
            progress.update()
        if isinstance(model, UserError):
            broken.append(str(model))
    progress.close()
    return broken


def _write_samples(path: Path, shown: list[dict[str, Any]]) -> None:
    import json

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in shown)
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
