"""What a study is: written down at its first start, compared at every other.

A study goes on if it has the same model, rows and budget, wherever these lie; its grid may grow.
outputs/<study>/study.yaml holds the plan of the whole grid, study.json what is derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import BUILT_IN_FAMILIES, FAMILIES, Settings, UserError
from lora_tradeoffs.files import read_json, write_json, write_text
from lora_tradeoffs.records import STUDY
from lora_tradeoffs.study.plan import plan_runs
from lora_tradeoffs.study.study_file import StudyPlan, naming, read_study_file
from lora_tradeoffs.tables.arms import Arm, arm_of_config
from lora_tradeoffs.training.plan import check_arms
from lora_tradeoffs.training.run import Run
from lora_tradeoffs.training.run_record import changed
from training_configs import parse_assignments

# What makes a study the same one; the grid itself may grow.
FIXED = (
    *("preset", "model", "data", "max_steps", "set", "dtype", "items", "measure_then_delete"),
    *("apply_chat_template", "system_instruction"),  # older studies have none
)


def checked_runs(study: StudyPlan, settings: Settings, file: Path | None = None) -> list[Run]:
    """The study's runs. Raises UserError for an arm that the model cannot have."""
    from lora_tradeoffs.hardware import pick_device
    from lora_tradeoffs.models.base import empty_model, read_model_config

    config = read_model_config(settings)
    with naming(file):
        runs = plan_runs(study, settings, config.hidden_size)
        check_arms(runs, empty_model(config, settings.model), pick_device())
    return runs


def folder_digests(settings: Settings) -> dict[str, str]:
    """Digests of the model's weights and of the rows, where these are in folders of the user's."""
    from lora_tradeoffs.data.sources import source_digest
    from lora_tradeoffs.models.base import load_tokenizer, prepare_base

    digests = {}
    if settings.apply_chat_template or settings.system_instruction:
        load_tokenizer(prepare_base(settings), settings)  # refuses a chat without a template
    if Path(settings.model).expanduser().is_dir():
        digests["model"] = prepare_base(settings).digest
    if settings.data not in ("hub", "sample"):
        digests["data"] = source_digest(Path(settings.data))
    return digests


def check_study(study: StudyPlan, settings: Settings, runs: Sequence[Run]) -> None:
    """Write what defines the study, or compare. Raises UserError with the fields that differ.

    The same weights or rows in another folder are no difference. `arms` grow with the grid: the
    report's confirmatory tests are those of all.
    """
    mixes = [run for run in runs if run.config.tasks == FAMILIES[run.config.family]]
    families = dict.fromkeys((*BUILT_IN_FAMILIES, *(run.config.family for run in mixes)))
    arms = {
        f: {arm_of_config(r.name, r.config) for r in mixes if r.config.family == f}
        for f in families
    }
    request = {name: getattr(study, name) for name in FIXED}
    request["set"] = [f"{name}={value}" for name, value in study.set.items()]
    path = settings.output_dir / "outputs" / settings.study / "study.json"
    before = read_json(path, STUDY) if path.is_file() else dict(request)
    request["digests"] = before.get("digests", {}) if path.is_file() else folder_digests(settings)
    if any(request[name] != before[name] for name in ("model", "data")):
        here, there = folder_digests(settings), request["digests"]
        request |= {name: before[name] for name in here if there.get(name) == here[name]}
    for family, planned in before.get("arms", {}).items():
        arms.setdefault(family, set()).update(Arm(**fields) for fields in planned)
    fixed = [{name: record.get(name) or None for name in FIXED} for record in (before, request)]
    for record in fixed:
        record["set"] = parse_assignments(record["set"] or ())
    if changes := changed(*fixed):
        raise UserError(
            f"study {settings.study!r} was started with different settings: {'; '.join(changes)}."
            " Use the same, or start another with --study NAME"
        )
    request["arms"] = {
        family: [_arm_fields(arm) for arm in sorted(of_family)]
        for family, of_family in arms.items()
    }
    plan_file = path.with_name("study.yaml")
    if plan_file.is_file():
        before_plan = read_study_file(plan_file)
        with naming(plan_file):
            study = study.extended(StudyPlan.of(before_plan, settings))
            checked_runs(study, settings)  # an arm may have two words
    if request != before:
        write_json(path, request)
    if not plan_file.is_file() or plan_file.read_text(encoding="utf-8") != study.text():
        write_text(plan_file, study.text())


def _arm_fields(arm: Arm) -> dict[str, Any]:
    """The fields of an arm that are not the default's, for JSON."""
    default = Arm(arm.method)
    return {
        name: value
        for name, value in vars(arm).items()
        if value != getattr(default, name) or name in ("method", "rank")
    }
