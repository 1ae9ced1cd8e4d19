"""Shapes of JSON: which keys and types a file of ours has, compared with what it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

# A type or several, [the shape of a list's values], or {key: the shape of its value}, where "key?"
# may be missing and "*" stands for all other keys.
Shape = Any
NUMBER = (int, float)
MISSING = object()


def shape_problem(value: Any, shape: Shape, name: str = "it") -> str | None:
    """Where the value is not of the shape, in words; None if it is.

    >>> shape_problem({"step": 4, "sizes": [1, None]}, {"step": int, "sizes": [int]})
    'sizes.1 is null'
    """
    if value is MISSING:
        return f"{name} is missing"
    if isinstance(shape, (dict, list)):
        if type(value) is not type(shape):
            return f"{name} is {_named(value)}"
        prefix = "" if name == "it" else f"{name}."
        for key, part, inner in _parts(value, shape):
            if problem := shape_problem(part, inner, f"{prefix}{key}"):
                return problem
        return None
    types = shape if isinstance(shape, tuple) else (shape,)
    is_right = isinstance(value, types) and (type(value) is not bool or {bool, object} & {*types})
    is_finite = type(value) is not float or shape is object or math.isfinite(value)
    return None if is_right and is_finite else f"{name} is {_named(value)}"


def _parts(value: Any, shape: Shape) -> Iterator[tuple[Any, Any, Shape]]:
    """The key, value and shape of the parts of an object or a list that a shape speaks of."""
    if isinstance(shape, list):
        yield from ((i, item, shape[0]) for i, item in enumerate(value))
        return
    for key, inner in shape.items():
        if key == "*":
            yield from ((k, item, inner) for k, item in value.items() if k not in shape)
        elif not key.endswith("?"):
            yield key, value.get(key, MISSING), inner
        elif key[:-1] in value:
            yield key[:-1], value[key[:-1]], inner


def _named(value: Any) -> str:
    """A value of JSON in an error message."""
    names = {dict: "an object", list: "a list", str: f"{value!r:.40}"}
    return names.get(type(value)) or json.dumps(value)
