"""A CUDA GPU against the CPU beside it: the same numbers, how fast, and in how much memory.

    python -m benchmarks.gpu_check --data FOLDER --json FILE

Meant for eight minutes on an H100. Numbers, in fp32, with SmolLM2-135M and the rows of the folder:
the suite's own commands run with the GPU and with it hidden, and their losses and records are
compared; a run that is resumed must end with the weights of the one that was not. Speed and memory,
in bf16, at the shape of Llama-3.2-1B with random weights: training, HellaSwag and generation
against their peers, and the peak of two short runs against what --dry-run expects. A check that
fails is printed, and the others run on; the exit code is then 1. All that is written but the JSON
goes to a temporary folder (TMPDIR; about 40 GB).

Without a GPU both sides are the CPU, and nothing is checked but that they agree; --quick takes a
few steps and items, and two layers in place of Llama's shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.comparison import benchmark_settings, build_parser, timed
from benchmarks.gpu_speed import measuring_speed, memory, training_speed
from config import ROOT, Settings, UserError
from lora_tradeoffs.command_line import guarded

if TYPE_CHECKING:
    import pandas as pd

STUDIES = ("gpu", "bf16", "cpu", "resumed", "on-gpu", "on-cpu", "memory")
# The largest difference of a record between the devices, over its value or 1, by analysis and the
# beginning of the metric's name. Scores of whole items are equal unless two answers tie.
LIMITS = {
    "adaptation": {"": 1e-6},
    "retention": {"acc": 1e-6, "": 1e-3},
    "drift": {"": 1e-6},  # the solver's tolerance; most agree to rounding
}
# The columns of a record that say how it was measured, or what was found.
RESULTS = ("study", "value", "stderr", "low", "high", "decomposition")


@dataclass
class Checks:
    """The checks in the order in which they ran, and the figures beside them."""

    settings: Settings
    device: str
    quick: bool = False
    pairs: int = 3
    rows: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return 2 if self.quick else 20

    @property
    def items(self) -> int:
        return 4 if self.quick else 50

    def check(self, what: str, value: float, limit: float, at_least: bool = False) -> None:
        """Note a value, which must not be above the limit, or not below it."""
        passed = bool(value >= limit if at_least else value <= limit)
        sign = ">=" if at_least else "<="
        self.rows.append({"check": what, "value": value, "": sign, "limit": limit})
        self.rows[-1]["passed"] = passed

    def part(self, function: Callable[[Checks], None]) -> None:
        """Run one part; its error is a check that failed, and the next part runs."""
        from lora_tradeoffs.hardware import release_memory

        print(f"{function.__name__}: {function.__doc__.splitlines()[0]}", flush=True)
        try:
            seconds, _ = timed(function, self)
            self.figures[f"{function.__name__}_seconds"] = round(seconds, 1)
        except Exception as error:  # of any library, and a GPU whose memory ran out
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            self.rows.append({"check": function.__name__, "passed": False, "error": reason})
        release_memory()

    def command(self, script: str, *flags: Any, study: str = "", hidden: bool = False) -> None:
        """Run a script of the suite, `hidden`: without the GPU. Raises UserError if it fails."""
        argv = [*map(str, flags), "--study", study or self.settings.study]
        for name in ("preset", "model", "data"):
            if f"--{name}" not in argv:
                value = getattr(self.settings, name)
                argv += [f"--{name}", getattr(value, "name", value)]
        if hidden and self.device != "cpu":
            process = subprocess.run(
                [sys.executable, str(ROOT / f"{script}.py"), *argv],
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
                capture_output=True,
                text=True,
            )
            code, errors = process.returncode, process.stderr
        else:
            told = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
                code = importlib.import_module(script).main(argv)
            errors = told.getvalue()
        if code:
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            raise UserError(f"{script} {study}: {(lines or errors.splitlines() or ['?'])[-1]}")

    def runs(self, study: str) -> list[Path]:
        """The folders of a study's finished runs."""
        done = self.settings.output_dir.glob(f"models/{study}/*/training.json")
        return sorted(path.parent for path in done)


# ----------------------------------------------------------------------------------- numbers


def arms(checks: Checks) -> list[Any]:
    """Flags of LoRA 8 and full fine-tuning, two checkpoints each."""
    fields = ["learning_rate=1e-4", "checkpoints=2", "logging_steps=1", "report_to=none"]
    arm = ["--similar", "--lora", 8, "--full-finetune", "--seed", 42, "--max-steps", checks.steps]
    fields.append(f"eval_examples_per_task={min(checks.items, 16)}")
    return [*arm, "--set", *fields]


def training(checks: Checks) -> None:
    """The losses of LoRA and full fine-tuning on the GPU are those on the CPU."""
    checks.command("multi_task_training", *arms(checks), "--dtype", "fp32", study="gpu")
    checks.command("multi_task_training", *arms(checks), "--dtype", "bf16", study="bf16")
    hidden = dict(study="cpu", hidden=True)
    checks.command("multi_task_training", *arms(checks), "--dtype", "fp32", **hidden)
    expected = losses(checks.runs("cpu"))
    for study, limit in {"gpu": 1e-3, "bf16": 0.05}.items():
        for arm, curve in losses(checks.runs(study)).items():
            worst = max(abs(a / b - 1) for a, b in zip(curve, expected[arm], strict=True))
            checks.check(f"losses of {arm}, {study} over cpu - 1", worst, limit)


def losses(runs: Sequence[Path]) -> dict[str, list[float]]:
    """By method, the training loss of every step, then the validation losses."""
    from lora_tradeoffs.files import read_json

    curves = {}
    for run in runs:
        training = read_json(run / "training.json")
        curve = [point["loss"] for point in training["loss_curve"]]
        curve += [point["eval_loss"] for point in training["validation"]]
        curves[read_json(run / "run.json")["config"]["method"]] = curve
    return curves


def resuming(checks: Checks) -> None:
    """A run that is resumed at half its steps ends with the same weights, bit for bit."""
    from safetensors.torch import load_file

    models = checks.settings.output_dir / "models"
    shutil.copytree(models / "gpu", models / "resumed")
    for run in checks.runs("resumed"):
        (run / "training.json").unlink()
        shutil.rmtree(run / f"checkpoint-{checks.steps}")
    checks.command("multi_task_training", *arms(checks), "--dtype", "fp32", study="resumed")
    for run, resumed in zip(checks.runs("gpu"), checks.runs("resumed"), strict=True):
        name = f"checkpoint-{checks.steps}"
        (file,) = (run / name).glob("*.safetensors")
        expected, weights = load_file(file), load_file(resumed / name / file.name)
        worst = max(float((expected[key] - weights[key]).abs().max()) for key in expected)
        checks.check(f"resumed weights of {run.name}", worst, 0.0)


def measuring(checks: Checks) -> None:
    """Evaluation, generation, retention and drift of one checkpoint are equal on both devices."""
    shared = ["--runs", *checks.runs("gpu"), "--checkpoints", "last", "--no-figures"]
    limit = ["--limit", checks.items, "--dtype", "fp32"]
    flags = {
        "eval": [*limit, "--tasks", "sst2", "mnli", "squad_v2", "--shots", 0, "--splits", "test"],
        "retention_eval": [*limit, *(["--tasks", "hellaswag", "--documents", 1] * checks.quick)],
        "svd_analysis": [],
    }
    output = checks.settings.output_dir
    for study, hidden in {"on-gpu": False, "on-cpu": True}.items():
        shutil.rmtree(output / "drift_analysis_plots" / "base", ignore_errors=True)
        for script, own in flags.items():
            where = dict(study=study, hidden=hidden)
            seconds, _ = timed(lambda s=script, o=own, w=where: checks.command(s, *shared, *o, **w))
            checks.figures[f"{script}_{study}_seconds"] = round(seconds, 1)
    for analysis, limits in LIMITS.items():
        pairs = compared_records(checks.settings, analysis)
        scale = pairs["value_cpu"].abs().clip(lower=1.0)
        difference = (pairs["value_gpu"] - pairs["value_cpu"]).abs() / scale
        for metric, values in difference.groupby(pairs["metric"]):
            most = next(value for name, value in limits.items() if metric.startswith(name))
            checks.check(f"{analysis}: {metric}, gpu - cpu", float(values.max()), most)


def compared_records(settings: Settings, analysis: str) -> pd.DataFrame:
    """The records of both studies side by side. Raises UserError if one side has others."""
    import pandas as pd

    from lora_tradeoffs.files import read_json

    frames = []
    for study in ("on-gpu", "on-cpu"):
        document = dataclasses.replace(settings, study=study).document(analysis)
        frame = pd.DataFrame(read_json(document)["records"])
        frames.append(frame[frame["value"].notna()])
    keys = [column for column in frames[0] if column not in RESULTS]
    frames = [frame.assign(**frame[keys].astype(str)) for frame in frames]
    merged = frames[0].merge(frames[1], on=keys, suffixes=("_gpu", "_cpu"), validate="1:1")
    if not 0 < len(merged) == len(frames[0]) == len(frames[1]):
        counts = f"{len(frames[0])} and {len(frames[1])} records, {len(merged)} of them of the same"
        raise UserError(f"{analysis}: {counts}")
    return merged


PARTS = (training, resuming, measuring, training_speed, measuring_speed, memory)


# -------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def temporary_folders(settings: Settings) -> Iterator[Settings]:
    """The settings with all folders in a temporary one, but for the base models.

    The studies share the prepared data.
    """
    settings.bases_dir.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as name:
        output, data = Path(name), Path(name) / "data"
        (output / "models").mkdir()
        (output / "models" / "base").symlink_to(settings.bases_dir)
        (data / "shared").mkdir(parents=True)
        for study in (*STUDIES, settings.study):
            (data / study).symlink_to(data / "shared")
        os.environ.update(OUTPUT_DIR=str(output), DATA_DIR=str(data))
        try:
            yield dataclasses.replace(settings, output_dir=output, data_dir=data)
        finally:
            os.environ.clear()
            os.environ.update(before)


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    names = [part.__name__ for part in PARTS]
    text = f"run only these parts: {', '.join(names)} (resuming and measuring need training)"
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="PART", default=names, help=text
    )
    args = parser.parse_args(argv)
    settings = benchmark_settings(args)
    import pandas as pd

    from lora_tradeoffs.files import write_json
    from lora_tradeoffs.hardware import describe_environment, pick_device, pick_precision

    device = pick_device(fp64=True)
    print(settings.headline(device), flush=True)
    meta = describe_environment(device, pick_precision("auto", device) == "bf16", "auto", 1)
    with temporary_folders(settings) as own:
        checks = Checks(own, device, args.quick, args.pairs)
        for part in PARTS:
            if part.__name__ in args.only:
                checks.part(part)
                if args.json:  # after every part: the machine may be there for minutes only
                    rows = {"checks": checks.rows, "figures": checks.figures}
                    write_json(args.json, {"meta": meta, **rows})
    print(pd.DataFrame(checks.rows).to_string(index=False, na_rep=""))
    failed = sum(not row["passed"] for row in checks.rows)
    print(f"{len(checks.rows)} checks, {failed} failed" + f": {args.json}" * bool(args.json))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
