"""Conflict between the gradients of several tasks' losses, on the same micro-batches of any model.

For every batch the gradient of each task's loss is computed in turn. Only inner products by layer
and module are stored: the cosine, conflict and magnitude of any group of layers follow from their
sums. Memory holds at most one gradient per task, and one parameter's gradient beside them.

With g and h the gradients of two tasks (PCGrad, Yu et al. 2020, arXiv:2001.06782): cosine
g.h / (|g| |h|), in conflict where it is negative; magnitude similarity 2 |g| |h| / (|g|^2 + |h|^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement
from typing import TYPE_CHECKING, Any

import numpy as np

from config import TARGET_MODULES, UserError
from lora_tradeoffs.hardware import widest_float
from lora_tradeoffs.records import BOTH, MEAN, OVERALL
from lora_tradeoffs.statistics.comparisons import LEVEL

if TYPE_CHECKING:
    import torch

# Within which a metric's values lie.
RANGES = {
    "gradient_cosine": (-1.0, 1.0),
    "within_cosine": (-1.0, 1.0),
    "gradient_conflict": (0.0, 1.0),
    "magnitude_similarity": (0.0, 1.0),
    "gradient_norm": (0.0, math.inf),
}

LayerModule = tuple[int, str]  # layer, OVERALL for a parameter outside the layers; module


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the tasks' gradients.

    `between`, shape (batches, tasks, tasks, layer_modules), has those of every two tasks, and the
    squared norms on its diagonal. `halves`, shape (batches, tasks, 3, layer_modules), has |g1|^2,
    g1.g2 and |g2|^2, where g1 and g2 are the parts of a task's gradient from each half of its rows.
    """

    tasks: tuple[str, ...]
    layer_modules: tuple[LayerModule, ...]
    between: np.ndarray
    halves: np.ndarray


def micro_batches(rows: int, batches: int, size: int, seed: int) -> np.ndarray:
    """The rows of each batch, shape (batches, size); no row is used twice.

    With too few rows there are fewer batches: batches that share rows would not be independent, so
    intervals over them would be too narrow. Raises ValueError if the rows do not fill two.
    """
    count = min(batches, rows // size)
    if count < 2:
        raise ValueError(f"{rows} rows do not fill two batches of {size}")
    return np.random.default_rng(seed).permutation(rows)[: count * size].reshape(count, size)


def measured_parameters(model: Any) -> tuple[str, dict[str, torch.nn.Parameter]]:
    """The parameters whose gradients are compared: the set's label, and the parameters by name.

    "adapter": all parameters of the model's adapter; "qv": the weights of q_proj and v_proj.
    """
    named = dict(model.named_parameters())
    adapter = {
        name: parameter
        for name, parameter in named.items()
        if _adapter_part(name) >= 0 and parameter.is_floating_point()
    }
    if adapter:
        return "adapter", adapter
    weights = tuple(f".{module}.weight" for module in TARGET_MODULES["qv"])
    return "qv", {name: p for name, p in named.items() if name.endswith(weights)}


def layer_module_of(name: str) -> LayerModule:
    """A parameter's layer and module: (3, "q_proj") of "...layers.3.self_attn.q_proj.weight"."""
    parts = name.split(".")
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else OVERALL
    return layer, parts[_adapter_part(name) - 1]


def _adapter_part(name: str) -> int:
    """Which part of a parameter's name PEFT has put there ("lora_A", "oft_R"); -1 if none."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING.values())
    parts = enumerate(name.split("."))
    return next((i for i, part in parts if part.startswith(prefixes)), -1)


# ---------------------------------------------------------------------------------- measuring


def gradient_products(
    model: Any,
    batches: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    bf16: bool = False,
    progress: Callable[[], Any] = lambda: None,
    trained_rank: int = 0,
) -> Products:
    """The products of the tasks' gradients on each batch.

    `batches` maps every task to its batches, the same number for all, each of at least two prepared
    rows. `trained_rank` is that of an adapter that was converted to more (PiSSA's, to A over A0 and
    B beside -B0): gradients are of the part that was trained. The loss is the one that is trained
    by default: the mean over the rows of each row's mean token loss. No parameter requires a
    gradient afterwards. Raises UserError if a gradient is not finite.
    """
    _, parameters = measured_parameters(model)
    layer_modules = tuple(sorted({layer_module_of(name) for name in parameters}))
    columns = {name: layer_modules.index(layer_module_of(name)) for name in parameters}
    tasks, between, halves = tuple(batches), [], []
    with _requiring_gradients(model, parameters):
        for rows_by_task in zip(*batches.values(), strict=True):
            gradients: list[dict[str, torch.Tensor]] = []
            by_pair = _zeros(model, len(tasks), len(tasks), len(layer_modules))
            by_half = _zeros(model, len(tasks), 3, len(layer_modules))
            for i, rows in enumerate(rows_by_task):
                losses = _half_losses(model, rows, collate, bf16)
                gradients.append(_gradient(parameters, columns, losses, by_half[i], trained_rank))
            for name in gradients[0]:
                vectors = [_vector(gradient[name]) for gradient in gradients]
                for (i, a), (j, b) in combinations_with_replacement(enumerate(vectors), 2):
                    by_pair[i, j, columns[name]] += a.dot(b)
                    by_pair[j, i, columns[name]] = by_pair[i, j, columns[name]]
            if not (by_pair.isfinite().all() and by_half.isfinite().all()):
                raise UserError("the gradients are not finite")
            between.append(by_pair.cpu().numpy())
            halves.append(by_half.cpu().numpy())
            progress()
    return Products(tasks, layer_modules, np.stack(between), np.stack(halves))


def _half_losses(
    model: Any, rows: Sequence[dict[str, Any]], collate: Any, bf16: bool
) -> Iterator[torch.Tensor]:
    """The loss as two terms, one for each half of the rows."""
    import torch

    from lora_tradeoffs.scoring.log_likelihoods import completion_losses, mean_by_row

    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]):
        batch = {name: tensor.to(model.device) for name, tensor in collate(half).items()}
        labels = batch.pop("labels")
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            logits = model(**batch, use_cache=False).logits
        losses, row = completion_losses(logits, labels)
        yield mean_by_row(losses, row, len(half)).sum() / len(rows)


def _gradient(
    parameters: Mapping[str, torch.nn.Parameter],
    columns: Mapping[str, int],
    losses: Iterator[torch.Tensor],
    products: torch.Tensor,
    rank: int,
) -> dict[str, torch.Tensor]:
    """The gradient of the sum of two losses; fills `products` (3, layer_modules), see `halves`.

    The second loss's gradient is used parameter by parameter as autograd computes it, so it is
    never whole in memory.
    """
    first: dict[str, torch.Tensor] = {}

    def hook_for(name: str) -> Callable[[torch.nn.Parameter], None]:
        def hook(parameter: torch.nn.Parameter) -> None:
            # a weight stored in bf16 has the same gradient, but sums need fp32
            gradient, parameter.grad = parameter.grad.float(), None
            if rank:
                gradient = gradient[:rank] if ".lora_A." in name else gradient[:, :rank]
            if name not in first:
                first[name] = gradient
                return
            vectors = _vector(first[name]), _vector(gradient)
            for i, (a, b) in enumerate(combinations_with_replacement(vectors, 2)):
                products[i, columns[name]] += a.dot(b)
            first[name] += gradient

        return hook

    hooks = [p.register_post_accumulate_grad_hook(hook_for(name)) for name, p in parameters.items()]
    try:
        for loss in losses:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return first


@contextmanager
def _requiring_gradients(model: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Let these parameters alone require gradients; afterwards none does."""
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        model.requires_grad_(False)
        for parameter in parameters.values():
            parameter.grad = None


def _zeros(model: Any, *shape: int) -> torch.Tensor:
    import torch

    return torch.zeros(shape, dtype=widest_float(model.device), device=model.device)


def _vector(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, flat, for inner products: in fp64, since small squares underflow in fp32."""
    return gradient.flatten().to(widest_float(gradient.device))


# ---------------------------------------------------------------------------------- statistics


def cosine(dot: np.ndarray, g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The cosine from the inner product and the squared norms; nan where a gradient is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(dot / np.sqrt(np.asarray(g) * h))


def magnitude_similarity(g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """2 |g| |h| / (|g|^2 + |h|^2) from the squared norms; nan if both are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(2 * np.sqrt(np.asarray(g) * h) / (np.asarray(g) + h))


def mean_over_batches(values: np.ndarray, metric: str) -> dict[str, Any]:
    """Mean, standard error and 95 % t interval over the batches, without those that are nan.

    The interval is cut at the ends of the metric's range: a few batches may have a wider one.
    """
    from scipy.stats import t

    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stderr if n > 1 else math.nan
    least, most = RANGES[metric]
    low, high = max(mean - half, least), min(mean + half, most)  # nan stays: it comes first
    return {"value": mean, "stderr": stderr, "low": low, "high": high, "n": n}


def share_over_batches(values: np.ndarray) -> dict[str, Any]:
    """The share of batches with 1 among those that are not nan, and Wilson's 95 % interval."""
    from scipy.stats import binomtest

    values = values[np.isfinite(values)]
    n = len(values)
    if not n:
        return mean_over_batches(values, "gradient_conflict")
    share = float(values.mean())
    low, high = binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
    stderr = math.sqrt(share * (1 - share) / n)
    return {"value": share, "stderr": stderr, "low": float(low), "high": float(high), "n": n}


def conflict_records(products: Products) -> Iterator[dict[str, Any]]:
    """Flat records of every pair of tasks, of the mean over pairs, and of each task.

    Every layer, every module and all together have their own. A pair has gradient_cosine,
    gradient_conflict (the share of batches with a negative cosine) and magnitude_similarity. With
    task and other `mean`, each batch counts with its mean over the pairs (for the conflict: the
    share of pairs in conflict, with a t interval). A task has gradient_norm and within_cosine, the
    cosine between the gradients of the two halves of a batch, of which `mean` has the mean over the
    tasks. This is a reference for noise: two tasks from one distribution would have a cosine no
    lower than it, and where it is near 0, half of all cosines are negative by chance.
    """
    for layer, module, indices in _groups(products.layer_modules):
        group = {"layer": layer, "module": module}
        between = products.between[..., indices].sum(-1)
        halves = products.halves[..., indices].sum(-1)
        by_pair: dict[str, list[np.ndarray]] = {}
        for i, j in combinations(range(len(products.tasks)), 2):
            pair = {"task": products.tasks[i], "other": products.tasks[j], **group}
            for metric, values in _pair_values(between, i, j).items():
                by_pair.setdefault(metric, []).append(values)
                is_share = metric == "gradient_conflict"
                over = share_over_batches(values) if is_share else mean_over_batches(values, metric)
                yield {**pair, "metric": metric, **over}
        for metric, pairs in by_pair.items():
            interval = mean_over_batches(np.mean(pairs, axis=0), metric)
            yield {"task": MEAN, "other": MEAN, **group, "metric": metric, **interval}
        first, dot, second = np.moveaxis(halves, -1, 0)
        within = cosine(dot, first, second)
        itself = {"task": MEAN, "other": MEAN, "metric": "within_cosine", **group}
        yield {**itself, **mean_over_batches(within.mean(axis=1), "within_cosine")}
        for i, task in enumerate(products.tasks):
            of_task = {"within_cosine": within[:, i], "gradient_norm": np.sqrt(between[:, i, i])}
            for metric, values in of_task.items():
                itself = {"task": task, "other": task, **group, "metric": metric}
                yield {**itself, **mean_over_batches(values, metric)}


def _pair_values(between: np.ndarray, i: int, j: int) -> dict[str, np.ndarray]:
    """The three metrics of a pair, shape (batches,) each."""
    dot, g, h = between[:, i, j], between[:, i, i], between[:, j, j]
    cosines = cosine(dot, g, h)
    return {
        "gradient_cosine": cosines,
        "gradient_conflict": np.where(np.isnan(cosines), np.nan, cosines < 0),
        "magnitude_similarity": magnitude_similarity(g, h),
    }


def _groups(layer_modules: Sequence[LayerModule]) -> Iterator[tuple[int, str, list[int]]]:
    """Layer, module and indices: every layer, every module over all layers, then all."""
    layers = sorted({layer for layer, _ in layer_modules} - {OVERALL})
    modules = sorted({module for _, module in layer_modules})
    groups = [(layer, BOTH) for layer in layers] + [(OVERALL, name) for name in (*modules, BOTH)]
    for layer, module in groups:
        indices = [
            index
            for index, (its_layer, its_module) in enumerate(layer_modules)
            if layer in (its_layer, OVERALL) and module in (its_module, BOTH)
        ]
        yield layer, module, indices
