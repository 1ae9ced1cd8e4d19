"""How far the gradients of several tasks' losses agree, on matched micro-batches of one model.

For every batch the gradient of each task's loss is taken in turn, and only inner products by layer
and module are kept: cosines, conflicts and magnitudes of any group of layers are sums of these. At
no time is there more than one gradient a task in memory, and one parameter's beside them.

With g and h the gradients of two tasks (PCGrad, Yu et al. 2020, arXiv:2001.06782): cosine
g.h / (|g| |h|), in conflict where it is negative; magnitude similarity 2 |g| |h| / (|g|^2 + |h|^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from config import TARGET_MODULES, UserError
from lora_tradeoffs.records import BOTH, MEAN, OVERALL

if TYPE_CHECKING:
    import torch

LEVEL = 0.95

Place = tuple[int, str]  # layer and module; OVERALL for what lies in no layer


@dataclass(frozen=True, eq=False)
class Products:
    """Inner products of the tasks' gradients.

    `between`, shape (batches, tasks, tasks, places): of every two tasks; on the diagonal the
    squared norms. `halves`, shape (batches, tasks, 3, places): of the two parts of a task's
    gradient that the halves of its rows give, |g1|^2, g1.g2 and |g2|^2.
    """

    tasks: tuple[str, ...]
    places: tuple[Place, ...]
    between: np.ndarray
    halves: np.ndarray


def micro_batches(rows: int, batches: int, size: int, seed: int) -> np.ndarray:
    """Which rows each batch holds, shape (batches, size); no row twice.

    Fewer batches where the rows are fewer: batches that shared rows would not be independent, and
    intervals over them too narrow. Raises ValueError if the rows do not fill two.
    """
    count = min(batches, rows // size)
    if count < 2:
        raise ValueError(f"{rows} rows do not fill two batches of {size}")
    return np.random.default_rng(seed).permutation(rows)[: count * size].reshape(count, size)


def measured_parameters(model: Any) -> tuple[str, dict[str, torch.nn.Parameter]]:
    """What the gradients are taken of, and those parameters by name.

    "adapter": all of the adapter that is in the model; "qv": the weights of q_proj and v_proj.
    """
    named = dict(model.named_parameters())
    adapter = {name: p for name, p in named.items() if ".lora_" in name}
    if adapter:
        return "adapter", adapter
    weights = tuple(f".{module}.weight" for module in TARGET_MODULES["qv"])
    return "qv", {name: p for name, p in named.items() if name.endswith(weights)}


def place_of(name: str) -> Place:
    """Layer and module of a parameter: (3, "q_proj") of "...layers.3.self_attn.q_proj.weight"."""
    parts = name.split(".")
    adapter = next((i for i, part in enumerate(parts) if part.startswith("lora_")), -1)
    layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else OVERALL
    return layer, parts[adapter - 1]


# ---------------------------------------------------------------------------------- measuring


def gradient_products(
    model: Any,
    batches: Mapping[str, Sequence[Sequence[dict[str, Any]]]],
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, torch.Tensor]],
    bf16: bool = False,
    progress: Callable[[], Any] = lambda: None,
) -> Products:
    """The products of the tasks' gradients on the rows of each batch.

    `batches` maps a task to its batches, equally many for all, each of at least two prepared rows.
    The loss is training's: the mean over the rows of each row's mean token loss. No parameter
    requires a gradient afterwards. Raises UserError if a gradient is not finite.
    """
    _, parameters = measured_parameters(model)
    places = tuple(sorted({place_of(name) for name in parameters}))
    slots = {name: places.index(place_of(name)) for name in parameters}
    tasks, between, halves = tuple(batches), [], []
    with _requiring_gradients(model, parameters):
        for rows_by_task in zip(*batches.values(), strict=True):
            gradients: list[dict[str, torch.Tensor]] = []
            own = _zeros(model, len(tasks), len(tasks), len(places))
            parts = _zeros(model, len(tasks), 3, len(places))
            for i, rows in enumerate(rows_by_task):
                losses = _half_losses(model, rows, collate, bf16)
                gradients.append(_gradient(parameters, slots, losses, parts[i]))
                for j, other in enumerate(gradients):
                    for name in gradients[i].keys() & other.keys():
                        own[i, j, slots[name]] += _dot(gradients[i][name], other[name])
                    own[j, i] = own[i, j]
            if not (own.isfinite().all() and parts.isfinite().all()):
                raise UserError("the gradients are not finite")
            between.append(own.cpu().numpy())
            halves.append(parts.cpu().numpy())
            progress()
    return Products(tasks, places, np.stack(between), np.stack(halves))


def _half_losses(
    model: Any, rows: Sequence[dict[str, Any]], collate: Any, bf16: bool
) -> Iterator[torch.Tensor]:
    """The loss in two terms, of the rows' halves; their sum is the mean over all rows."""
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
    slots: Mapping[str, int],
    losses: Iterator[torch.Tensor],
    products: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The gradient of the sum of two losses; `products` (3, places) is filled with their parts'.

    The second part is met parameter by parameter while autograd makes it, and never whole.
    """
    first: dict[str, torch.Tensor] = {}

    def taker(name: str) -> Callable[[torch.nn.Parameter], None]:
        def take(parameter: torch.nn.Parameter) -> None:
            part, parameter.grad = parameter.grad, None
            if name not in first:
                first[name] = part
                return
            kept = first[name]
            for i, (a, b) in enumerate(((kept, kept), (kept, part), (part, part))):
                products[i, slots[name]] += _dot(a, b)
            kept += part

        return take

    hooks = [p.register_post_accumulate_grad_hook(taker(name)) for name, p in parameters.items()]
    try:
        for loss in losses:
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return first


@contextmanager
def _requiring_gradients(model: Any, parameters: Mapping[str, Any]) -> Iterator[None]:
    """Of the model these parameters alone take gradients; afterwards none does."""
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

    dtype = torch.float32 if model.device.type == "mps" else torch.float64  # mps has no other
    return torch.zeros(shape, dtype=dtype, device=model.device)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner product; in fp64, since squares of small gradients leave fp32's range."""
    import torch

    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    return torch.dot(a.flatten().to(dtype), b.flatten().to(dtype))


# ---------------------------------------------------------------------------------- statistics


def cosine(dot: np.ndarray, g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """From the inner product and the squared norms; nan where a gradient is zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(dot / np.sqrt(np.asarray(g) * h))


def magnitude_similarity(g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """2 |g| |h| / (|g|^2 + |h|^2) of the squared norms: 1 for equal ones; nan if both are zero."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(2 * np.sqrt(np.asarray(g) * h) / (np.asarray(g) + h))


def mean_over_batches(values: np.ndarray) -> dict[str, Any]:
    """Mean, standard error and 95 % t interval over the batches; those that are nan left out."""
    from scipy.stats import t

    values = values[np.isfinite(values)]
    n = len(values)
    mean = float(values.mean()) if n else math.nan
    stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = float(t.ppf((1 + LEVEL) / 2, n - 1)) * stderr if n > 1 else math.nan
    return {"value": mean, "stderr": stderr, "low": mean - half, "high": mean + half, "n": n}


def share_over_batches(values: np.ndarray) -> dict[str, Any]:
    """The share of true ones over the batches (nan left out) and Wilson's 95 % interval."""
    from scipy.stats import binomtest

    values = values[np.isfinite(values)]
    n = len(values)
    if not n:
        return mean_over_batches(values)
    share = float(values.mean())
    low, high = binomtest(int(values.sum()), n).proportion_ci(LEVEL, method="wilson")
    stderr = math.sqrt(share * (1 - share) / n)
    return {"value": share, "stderr": stderr, "low": float(low), "high": float(high), "n": n}


def conflict_records(products: Products) -> Iterator[dict[str, Any]]:
    """Flat records of every pair of tasks, of their mean, and of each task, by layer and overall.

    Of pairs: gradient_cosine, gradient_conflict (the share of batches with a negative cosine) and
    magnitude_similarity. With task and other `mean` they are of each batch's mean over the pairs
    (the conflict's: the share of the batches' pairs, its interval from the batches by t). Of a
    task: gradient_norm, and within_cosine, of the gradients of two halves of a batch. Were all
    tasks one, their cosine would be no lower than that: what is below is not only sampling noise.
    """
    for layer, module, chosen in _groups(products.places):
        where = {"layer": layer, "module": module}
        between = products.between[..., chosen].sum(-1)
        halves = products.halves[..., chosen].sum(-1)
        by_pair: dict[str, list[np.ndarray]] = {}
        for i, j in combinations(range(len(products.tasks)), 2):
            pair = {"task": products.tasks[i], "other": products.tasks[j], **where}
            for metric, values in _pair_values(between, i, j).items():
                by_pair.setdefault(metric, []).append(values)
                is_share = metric == "gradient_conflict"
                found = share_over_batches(values) if is_share else mean_over_batches(values)
                yield {**pair, "metric": metric, **found}
        for metric, pairs in by_pair.items():
            found = mean_over_batches(np.mean(pairs, axis=0))
            if metric == "gradient_conflict":
                found |= {"low": max(found["low"], 0.0), "high": min(found["high"], 1.0)}
            yield {"task": MEAN, "other": MEAN, **where, "metric": metric, **found}
        for i, task in enumerate(products.tasks):
            first, dot, second = halves[:, i].T
            alone = {"task": task, "other": task, **where}
            found = mean_over_batches(cosine(dot, first, second))
            yield {**alone, "metric": "within_cosine", **found}
            found = mean_over_batches(np.sqrt(between[:, i, i]))
            yield {**alone, "metric": "gradient_norm", **found}


def _pair_values(between: np.ndarray, i: int, j: int) -> dict[str, np.ndarray]:
    """A pair's figures, shape (batches,) each."""
    dot, g, h = between[:, i, j], between[:, i, i], between[:, j, j]
    cosines = cosine(dot, g, h)
    return {
        "gradient_cosine": cosines,
        "gradient_conflict": np.where(np.isnan(cosines), np.nan, cosines < 0),
        "magnitude_similarity": magnitude_similarity(g, h),
    }


def _groups(places: Sequence[Place]) -> Iterator[tuple[int, str, list[int]]]:
    """Layer, module and the places summed: every layer, every module over all layers, then all."""
    layers = sorted({layer for layer, _ in places} - {OVERALL})
    modules = sorted({module for _, module in places})
    wanted = [(layer, BOTH) for layer in layers] + [(OVERALL, name) for name in (*modules, BOTH)]
    for layer, module in wanted:
        chosen = [
            index
            for index, (own, name) in enumerate(places)
            if layer in (own, OVERALL) and module in (name, BOTH)
        ]
        yield layer, module, chosen
