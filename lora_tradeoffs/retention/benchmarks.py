"""lm-evaluation-harness on this suite's engine: its tasks, prompts, filters, metrics and errors.

Only the scoring of tokenised requests is replaced: requests that begin alike share a row of the
batch. Besides benchmark_tasks.py and shared_prefix_lm.py no module imports lm_eval.

    benchmarks = Benchmarks(settings, tokenizer, ["hellaswag", "arc_challenge"])
    for model in models:
        results = benchmarks.measure(model)

Tasks are loaded, and prompts made and tokenised, once; measuring then only runs the model.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import numpy as np

from config import Settings, UserError
from lora_tradeoffs.chat import form_of
from lora_tradeoffs.data.encoding import text_ids
from lora_tradeoffs.retention.benchmark_tasks import LocalBenchmark, TaskLoader

SHOT_SEED = 1234  # that of lm-eval's command line, so that the same shots are drawn
# Fields that say where the rows come from, in which definitions of the same task may differ.
SOURCE_FIELDS = {
    *("dataset_path", "dataset_name", "dataset_kwargs", "custom_dataset", "training_split"),
    *("validation_split", "test_split", "fewshot_split", "metadata", "tag", "num_fewshot"),
    *("split", "task_alias"),
}


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark's figures for one model, as lm-eval computes them.

    `metrics` and `stderrs` (nan where lm-eval has none) are by metric; of several filters, by
    `metric,filter`. `items` has an array of shape (n,) by metric, in the order of the documents: 0
    or 1 for acc and acc_norm; for a perplexity task log_likelihood (in nats) with the counts
    tokens, words and bytes. `log_likelihoods` has those of each document's choices, `answers` the
    prompt, answer and target of each document that was answered in text. `chance` is the expected
    accuracy of guessing, 0 for such answers; nan where there is no score between 0 and 1.
    `truncated` counts the documents whose context was cut from the left to fit the model's window.
    `identity` is what makes a measurement the same one.
    """

    task: str
    metrics: dict[str, float]
    stderrs: dict[str, float]
    items: dict[str, np.ndarray]
    log_likelihoods: list[list[float]]
    answers: list[dict[str, str]]
    n: int
    chance: float
    truncated: int
    identity: dict[str, Any]


@dataclass(frozen=True)
class TextScores:
    """Log-likelihood in nats and tokens of every document, each of shape (documents,)."""

    log_likelihoods: np.ndarray
    tokens: np.ndarray


# ------------------------------------------------------------------------------- the model


def _quiet_lm(model: Any, tokenizer: Any, **options: Any) -> Any:
    with quiet_lm_eval():
        from lora_tradeoffs.retention.shared_prefix_lm import SharedPrefixLM

        return SharedPrefixLM(model, tokenizer, **options)


def text_log_likelihoods(
    model: Any, tokenizer: Any, texts: Sequence[str], **options: Any
) -> TextScores:
    """Log-likelihood of whole documents, in rolling windows: no token is scored twice.

    `options` are those of `SharedPrefixLM`; max_length is the window.
    """
    from lm_eval.api.instance import Instance

    lm = _quiet_lm(model, tokenizer, **options)
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    with quiet_lm_eval():
        log_likelihoods = lm.loglikelihood_rolling(requests)
    tokens = [len(text_ids(tokenizer, text)) for text in texts]
    return TextScores(np.array(log_likelihoods, dtype=float), np.array(tokens))


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """No progress bars or advice from lm-eval, datasets and NLTK inside the block."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


# ------------------------------------------------------------------------------- the tasks


class Benchmarks:
    """lm-eval tasks by name, loaded and tokenised once, measured on many models.

    Prompts have the form of the tokenizer: plain text, or turns of its chat template, examples too
    unless `fewshot_as_multiturn` is False. `num_fewshot` is the number of examples (None: what each
    definition says), `limit` (0: all) the first documents of each. Raises UserError for an unknown
    name, a task that this suite cannot ask, a missing package or data, and bad rows of a folder.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Any,
        names: Sequence[str],
        num_fewshot: int | None = None,
        limit: int = 0,
        fewshot_as_multiturn: bool | None = None,
    ):
        self.tokenizer, self.limit = tokenizer, limit or None
        self.form: dict[str, Any] = {}  # what identifies the form of the prompts
        self.chat_options: dict[str, Any] = {}  # of lm-eval's `build_all_requests`
        if form := form_of(tokenizer):
            self.form = form.request | {"fewshot_as_multiturn": fewshot_as_multiturn is not False}
            self.chat_options = {
                "apply_chat_template": True,
                "chat_template": functools.partial(_chat_text, tokenizer),
                "system_instruction": form.system or None,
                "fewshot_as_multiturn": self.form["fewshot_as_multiturn"],
            }
        self.encoded: dict[Any, Any] = {}  # tokens by context, and by context and continuation
        self.lengths: dict[str, int] = {}  # tokens of a perplexity task's document
        self.other_shots: dict[str, tuple[int, int]] = {}  # the definition's, and those shown
        with quiet_lm_eval():
            loader = TaskLoader(settings, names, num_fewshot)
            self.names, self.loaded = loader.names, loader.load()
        self.tasks: dict[str, Any] = self.loaded["tasks"]
        self.identities = {}
        for name, task in self.tasks.items():
            self._build_requests(name, task, num_fewshot)
            self.identities[name] = self._identity(name, task, loader.local.get(name))

    def _build_requests(self, name: str, task: Any, num_fewshot: int | None) -> None:
        """As lm-eval's `simple_evaluate` prepares a task, but once for all models."""
        defined = task.get_config("num_fewshot")
        num_fewshot = (defined or 0) if num_fewshot is None else num_fewshot
        shots = 0 if task.OUTPUT_TYPE == "loglikelihood_rolling" else num_fewshot
        if defined not in (None, num_fewshot):
            self.other_shots[name] = defined, shots if defined else 0
        if defined != 0:
            task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(SHOT_SEED)
        try:
            with quiet_lm_eval():
                task.build_all_requests(limit=self.limit, **self.chat_options)
        except (AssertionError, ValueError) as error:
            if not shots:
                raise
            raise UserError(f"benchmark {name} has no {shots} shots to show: {error}") from None
        task.build_all_requests = functools.partial(_forget_responses, task)

    def _identity(self, name: str, task: Any, local: LocalBenchmark | None) -> dict[str, Any]:
        in_text = getattr(task, "multiple_input", 0)
        gold = task.doc_to_text if in_text else task.doc_to_target
        texts = json.dumps([(i.args, gold(i.doc)) for i in task.instances], default=str)
        definition = json.dumps(
            _without_source_fields(task.dump_config()), sort_keys=True, default=_source
        )
        return {
            "lm_eval": version("lm_eval"),
            "version": task.VERSION,
            "definition": hashlib.sha256(definition.encode()).hexdigest()[:16],
            "requests": hashlib.sha256(texts.encode()).hexdigest()[:16],
            "items": len({i.doc_id for i in task.instances}),
            "num_fewshot": task.get_config("num_fewshot"),
            "shots_from": local.shots_from if local else None,
            **self.form,
        }

    @property
    def num_fewshot(self) -> int:
        """Examples in the prompts; of tasks that differ, the most."""
        return max(task.get_config("num_fewshot") for task in self.tasks.values())

    def measure(self, model: Any, **options: Any) -> list[BenchmarkResult]:
        """Every benchmark's result, in the order of the names.

        A group that lm-eval makes a mean of is one benchmark, its tasks' items in the order of
        `tasks`; of another group or a tag every task is. `options` are those of `SharedPrefixLM`.
        """
        from lm_eval.evaluator import evaluate

        lm = _quiet_lm(model, self.tokenizer, encoded=self.encoded, **options)
        with quiet_lm_eval():
            report = evaluate(lm, self.loaded, limit=self.limit)
        groups = self.loaded.get("groups", {})
        wanted = []
        for name in self.names:
            if name in groups and groups[name].has_aggregation:
                members = {task.task_name for task in groups[name].get_all_tasks()}
                wanted.append((name, [task for task in self.tasks if task in members]))
            elif name in self.tasks:
                wanted.append((name, [name]))
        covered = {task for _, tasks in wanted for task in tasks}
        wanted += [(task, [task]) for task in self.tasks if task not in covered]
        return [self._result(lm, report, name, tasks) for name, tasks in wanted]

    def _result(self, lm: Any, report: Any, name: str, tasks: list[str]) -> BenchmarkResult:
        metrics, stderrs = figures_by_metric(report["results"][name])
        samples = [_by_filter(report["samples"][task]) for task in tasks]
        parts = [self._items(task, own) for task, own in zip(tasks, samples, strict=True)]
        shared = set.intersection(*(set(items) for items, _, _ in parts))
        items = {
            key: np.concatenate([part[key] for part, _, _ in parts])
            for key in parts[0][0]
            if key in shared
        }
        guesses = np.concatenate([guess for _, _, guess in parts])
        cut = {
            (task, i.doc_id)
            for task in tasks
            for i in self.tasks[task].instances
            if i.args[0] in lm.truncated
        }
        return BenchmarkResult(
            task=name,
            metrics=metrics,
            stderrs=stderrs,
            items=items,
            log_likelihoods=[row for _, rows, _ in parts for row in rows],
            answers=[answer for task in tasks for answer in texts_of(report["samples"][task])],
            n=len(guesses),
            chance=float(guesses.mean()),
            truncated=len(cut),
            identity=self.identities[name] if len(tasks) == 1 else _joined(self.identities, tasks),
        )

    def _items(self, name: str, samples: dict[str, list[dict]]) -> tuple[dict, list, np.ndarray]:
        """Values by metric, log-likelihoods of the choices, and chance, of every document."""
        task, rows = self.tasks[name], next(iter(samples.values()))
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            log_likelihoods = [[float(s["filtered_resps"][0])] for s in rows]
            counts = [self._counts(s["arguments"][0][0], s) for s in rows]
            items = {"log_likelihood": np.array(log_likelihoods)[:, 0]}
            items |= {key: np.array([c[key] for c in counts]) for key in counts[0]}
            return items, log_likelihoods, np.full(len(rows), np.nan)
        items = {
            _label(metric, name, len(samples)): np.array([s[metric] for s in own], dtype=float)
            for name, own in samples.items()
            for metric in own[0]["metrics"]
            if isinstance(own[0][metric], (bool, int, float, np.number))
        }
        if task.OUTPUT_TYPE == "generate_until":
            is_share = all(v.min() >= 0 and v.max() <= 1 for v in items.values())
            return items, [], np.full(len(rows), 0.0 if items and is_share else np.nan)
        log_likelihoods = [[float(ll) for ll, _ in s["filtered_resps"]] for s in rows]
        if task.OUTPUT_TYPE != "multiple_choice":
            return items, log_likelihoods, np.full(len(rows), np.nan)
        right = [len(s["target"]) if isinstance(s["target"], list) else 1 for s in rows]
        choices = [len(task.doc_to_choice(s["doc"])) for s in rows]
        return items, log_likelihoods, np.array(right) / np.array(choices)

    def _counts(self, text: str, sample: dict) -> dict[str, int]:
        """Tokens of a document, and words and bytes as its definition counts them."""
        if text not in self.lengths:
            self.lengths[text] = len(text_ids(self.tokenizer, text))
        counts = {"tokens": self.lengths[text]}
        for key, metric in (("words", "word_perplexity"), ("bytes", "byte_perplexity")):
            if metric in sample:
                counts[key] = sample[metric][1]
        return counts


def _chat_text(tokenizer: Any, history: list[dict], **options: Any) -> str:
    """The chat template's text, as HFLM has it: without a system message that it refuses."""
    from lm_eval.models.huggingface import HFLM

    lm = SimpleNamespace(tokenizer=tokenizer, chat_template_args={})
    return HFLM.apply_chat_template(lm, history, **options)


def _by_filter(samples: list[dict]) -> dict[str, list[dict]]:
    """lm-eval's samples by the filter that the answers passed, in the order of the documents."""
    by_filter: dict[str, list[dict]] = {}
    for sample in sorted(samples, key=lambda s: s["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    return by_filter


def texts_of(samples: list[dict]) -> list[dict[str, str]]:
    """What was asked, answered and expected, of documents that were answered in text."""
    return [
        {"prompt": s["arguments"][0][0], "output": s["resps"][0][0], "target": str(s["target"])}
        for s in next(iter(_by_filter(samples).values()))
        if isinstance(s["resps"][0][0], str)
    ]


def _label(metric: str, name: str, filters: int) -> str:
    """A metric's name, with that of its filter where a task has several."""
    return metric if filters == 1 else f"{metric},{name}"


def _forget_responses(task: Any, **_: Any) -> None:
    """Stands in for `build_all_requests` of a task whose requests are built."""
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}


def figures_by_metric(results: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """lm-eval's figures and standard errors by `_label`."""
    keys = [key for key in results if "," in key]
    filters = {key.partition(",")[2] for key in keys}
    metrics, stderrs = {}, {}
    for key in keys:
        metric, _, name = key.partition(",")
        target, metric = (
            (stderrs, metric.removesuffix("_stderr"))
            if metric.endswith("_stderr")
            else (metrics, metric)
        )
        value = results[key]
        label = _label(metric, name, len(filters))
        target[label] = float(value) if isinstance(value, (int, float)) else float("nan")
    return metrics, stderrs


def _joined(identities: dict[str, dict], tasks: list[str]) -> dict[str, Any]:
    """The identity of a group of tasks."""
    text = json.dumps([identities[task] for task in tasks], sort_keys=True)
    first = identities[tasks[0]]
    same = {k: v for k, v in first.items() if all(identities[t][k] == v for t in tasks)}
    return {**same, "requests": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _without_source_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_source_fields(v) for k, v in value.items() if k not in SOURCE_FIELDS}
    return value


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value) if callable(value) else str(value)
    except (OSError, TypeError):
        return getattr(value, "__qualname__", str(type(value)))
