"""The model card of a published checkpoint: how it was trained, and what was measured on it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from config import BENCHMARKS, EMBEDDED_MODEL, Settings
from dataset_descriptions import describe
from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.records import read_run
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.learning_rates import flags, run_options
from lora_tradeoffs.training.run import Run
from training_configs import TrainingConfig, default_config

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard
    from pandas import DataFrame

# A path inside a text; an address of the Web is none.
ABSOLUTE = re.compile(r"(?<![\w.:/~-])~?/[\w.~@+-]+(?:/[\w.~@+-]*)+")
EMBEDDED_ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
CARD = """\
---
{{ card_data }}
---

# {{ name }}

{{ method }} of {{ base }} on {{ tasks | join(", ") }}: step {{ step }} of {{ steps }}.
{% if lossy %}
The base's weights were {{ lossy }}, so they are not exactly those of the repository named above.
{% endif %}
## How it was trained

| | |
|---|---|
{% for field, value in settings.items() %}| {{ field }} | {{ value }} |
{% endfor %}
```
{{ command }}
```

Trained on {{ rows }}:

{% for d in descriptions %}- {{ d.title }}: {{ d.hub_id }}, {{ d.licence }} ({{ d.citation }})
{% endfor %}
{% for title, text, table in tables %}## {{ title }}

{{ text }}

{{ table }}

{% else %}Nothing was measured on this checkpoint.

{% endfor %}
## Limits

One run with one seed: the intervals are over items, and say nothing about another seed. Scores are
for the prompts of this suite, on its validation and test rows. The licences of the base and of the
data hold for these weights, too.{% if demo %} This is the demo: a small instruct model trained for
a few steps, no evidence for anything.{% endif %}
"""
NAMES = {"mean": "mean over benchmarks", "text": "all held-out texts"}
SHOWN = (  # fields of the configuration that the card lists
    *("method", "rank", "alpha", "target_modules", "learning_rate", "epochs", "max_steps"),
    *("batch_size", "max_length", "mixing", "loss_weighting", "weight_decay", "schedule"),
    *("dtype", "seed"),
)


@dataclass(frozen=True)
class Published:
    """A checkpoint of a run of the study, with what is known about it."""

    settings: Settings
    checkpoint: Checkpoint

    @cached_property
    def record(self) -> dict[str, Any]:
        """The run.json of the checkpoint's run, without absolute paths."""
        folder = self.checkpoint.folder.parent
        return without_paths(read_run(folder, "config", "base", "steps", "data"))

    @cached_property
    def base(self) -> str | None:
        """The base's name on the Hub; None for a folder of the user's."""
        model = self.record["config"]["model"]
        if model == EMBEDDED_MODEL:
            return EMBEDDED_ON_THE_HUB
        # of a folder, which may be typed as a/b, the source is an absolute path
        is_hub = "/" in model and self.record["base"].get("source") == model
        return model if is_hub else None

    @property
    def command(self) -> str:
        """The command that trains such a run."""
        known = {f.name for f in dataclasses.fields(TrainingConfig)}
        values = {k: v for k, v in self.record["config"].items() if k in known}
        config = TrainingConfig(**values | {"tasks": tuple(values["tasks"])})
        arm = config.tasks, config.method, config.rank, config.seed
        # the hidden size decides the default learning rate alone, which the record has
        default = dataclasses.replace(
            default_config(self.settings, *arm, hidden_size=2048),
            learning_rate=self.record.get("default_learning_rate", config.learning_rate),
        )
        run = Run(self.checkpoint.run, config, self.checkpoint.folder.parent, default)
        preset = self.settings.preset.name
        options = {"preset": preset, "model": config.model, "data": config.data}
        options |= run_options(run) | {"seed": config.seed}
        return " ".join(["python multi_task_training.py", *flags(options)])

    def rows(self, analysis: str, choose: Callable[[DataFrame], Any]) -> list[Any]:
        """The chosen records of an analysis: of the checkpoint itself, asked as it was trained."""
        path, about = self.settings.document(analysis), (self.checkpoint.run, self.checkpoint.step)
        if not path.is_file():
            return []

        def is_of_checkpoint(record: dict[str, Any]) -> bool:
            return (record["run"], record["step"]) == about and not record.get("shrunk")

        frame = load_records(path, is_of_checkpoint)
        is_plain = (frame["update_scale"] == 1) & (frame["shots"] == 0) & (frame["prompt"] == 0)
        plain = frame[is_plain]
        return [] if plain.empty else list(plain[choose(plain)].itertuples(index=False))

    @cached_property
    def scores(self) -> list[Any]:
        """The tasks' metrics, on test where they were measured there, else on validation."""

        def is_metric(frame: DataFrame) -> list[bool]:
            pairs = zip(frame["task"], frame["metric"], strict=True)
            return [metric in describe(task).metrics for task, metric in pairs]

        rows = self.rows("adaptation", is_metric)
        tested = {row.task for row in rows if row.split == "test"}
        rows = [r for r in rows if r.split == ("test" if r.task in tested else "validation")]
        order = self.record["config"]["tasks"]
        return sorted(rows, key=lambda r: (r.task not in order, [*order, r.task].index(r.task)))


def model_card(published: Published, name: str, is_adapter: bool) -> ModelCard:
    """The card; its metadata parse back as huggingface_hub's ModelCardData."""
    from huggingface_hub import ModelCard, ModelCardData

    record = published.record
    config = record["config"]
    descriptions, results = [describe(t) for t in config["tasks"]], list(eval_results(published))
    is_hub = config["data"] == "hub"
    data = ModelCardData(
        base_model=published.base,
        datasets=list(dict.fromkeys(d.hub_id for d in descriptions)) if is_hub else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[config["method"], *config["tasks"]],
        model_name=name if results else None,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=name,
        method=str(ArmSpec(config["method"], config["rank"])),
        base=published.base or record["base"]["name"],
        lossy=record["base"].get("lossy", "").partition(";")[0],
        tasks=config["tasks"],
        step=published.checkpoint.step,
        steps=record["steps"],
        settings={field: config[field] for field in SHOWN if config.get(field)},
        command=published.command,
        descriptions=descriptions,
        rows="rows of" if is_hub else f"the rows of {config['data']}, in the schema of",
        tables=list(tables(published)),
        demo=published.settings.preset.name == "demo",
    )


def eval_results(published: Published) -> Iterator[EvalResult]:
    """The scores on tasks and benchmarks for the card's model-index."""
    from huggingface_hub import EvalResult

    def accuracy(frame: DataFrame) -> Any:
        return frame["task"].isin(BENCHMARKS) & (frame["metric"] == "acc")

    for row in [*published.scores, *published.rows("retention", accuracy)]:
        source = BENCHMARKS.get(row.task) or describe(row.task)
        is_task = row.task not in BENCHMARKS
        is_classification = is_task and source.is_classification
        yield EvalResult(
            task_type="text-classification" if is_classification else "text-generation",
            dataset_type=source.hub_id,
            dataset_name=source.title if is_task else row.task,
            dataset_config=source.hub_config,
            dataset_split=row.split,
            metric_type=row.metric,
            metric_value=round(row.value, 6),
            metric_args={"n": int(row.n), "low": round(row.low, 6), "high": round(row.high, 6)},
        )


def tables(published: Published) -> Iterator[tuple[str, str, str]]:
    """Title, explanation and table of what each analysis found."""
    import pandas as pd

    def interval(row: Any) -> dict[str, str]:
        return {"95 %": f"{row.low:.3f} to {row.high:.3f}", "n": f"{row.n:.0f}"}

    scores = [
        {"task": r.task, "split": r.split, "metric": r.metric, "value": f"{r.value:.3f}"}
        | interval(r)
        for r in published.scores
    ]
    lost = [
        {"on": NAMES.get(r.task, r.task), "base minus this": f"{r.value:+.3f}"} | interval(r)
        for r in published.rows("retention", lambda f: f["metric"] == "forgetting")
    ]
    moved = [
        {"matrices": r.module, "norm of the update / of the base's": f"{r.value:.3%}"}
        for r in published.rows(
            "drift", lambda f: (f["metric"] == "relative_frobenius") & (f["layer"] == -1)
        )
    ]
    for title, text, rows in (
        ("Adaptation", "With bootstrap intervals over the items.", scores),
        (
            "Forgetting",
            "What the base scores above this checkpoint on the same items: accuracy on benchmarks,"
            " nats a token on held-out text (n: its tokens; of all texts the documents).",
            lost,
        ),
        ("Drift", "How far the weights moved, over all layers.", moved),
    ):
        if rows:
            yield title, text, pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def without_paths(value: Any) -> Any:
    """A JSON value in which an absolute path is its last part."""
    if isinstance(value, dict):
        return {name: without_paths(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    for path in (PurePosixPath(value), PureWindowsPath(value)):
        if path.is_absolute() or value.startswith("~"):
            return path.name
    return ABSOLUTE.sub(lambda match: PurePosixPath(match[0]).name, value)
