"""Metrics and filters of generated text as lm-eval defines them, out of its own registries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from config import UserError
from lora_tradeoffs.command_line import reason_of

Filters = Sequence[tuple[str, Mapping[str, Any]]]  # each one's name and arguments


def metric_values(
    name: str,
    arguments: Mapping[str, Any],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
) -> list[float]:
    """A metric of each item by itself, of several references the best, as lm-eval computes it.

    Raises UserError for a metric that lm-eval does not have for single texts, for arguments that it
    refuses, and for a value outside [0, 1].
    """
    import lm_eval.api.metrics  # registers them
    from lm_eval.api.registry import METRIC_AGGREGATION_REGISTRY, METRIC_REGISTRY

    # the registry alone: get_metric would ask the Hub for a name that it does not have
    metric = METRIC_REGISTRY.get(name) if name in METRIC_REGISTRY else None
    by_item = METRIC_AGGREGATION_REGISTRY.get(name) is lm_eval.api.metrics.mean if metric else False

    def value(prediction: str, reference: str) -> float:
        result = metric(predictions=[prediction], references=[reference], **arguments)
        return float(result[name] if isinstance(result, dict) else result)

    try:
        if not by_item:
            raise TypeError("lm-eval has no such metric of single texts")
        items = zip(predictions, references, strict=True)
        values = [max(value(text, gold) for gold in golds) for text, golds in items]
    except Exception as error:  # a metric may raise anything
        raise _failed("metric", name, error) from None
    if not all(0 <= v <= 1 for v in values):
        raise UserError(f"metric {name} gives {max(values, key=abs):g}, outside 0 to 1")
    return values


def filtered(filters: Filters, texts: Sequence[str]) -> list[str]:
    """The texts after lm-eval's filters, one after another. Raises UserError for a bad filter."""
    import lm_eval.filters  # noqa: F401  registers them
    from lm_eval.api.registry import FILTER_REGISTRY

    responses: Any = [[text] for text in texts]
    for name, arguments in filters:
        try:
            if name not in FILTER_REGISTRY:
                raise ValueError(f"lm-eval's are {', '.join(sorted(FILTER_REGISTRY))}")
            responses = list(
                FILTER_REGISTRY.get(name)(**arguments).apply(responses, [{}] * len(texts))
            )
        except Exception as error:
            raise _failed("filter", name, error) from None
    return [r if isinstance(r, str) else str(next(iter(r), "")) for r in responses]


def _failed(what: str, name: str, error: Exception) -> UserError:
    return UserError(f"{what} {name} failed ({reason_of(error):.200})")
