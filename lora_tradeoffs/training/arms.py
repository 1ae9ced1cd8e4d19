"""Arms as users write them, NAME[:RANK][@MODULES][,field=value...]; the flags that name arms."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from config import PRESETS, TARGET_MODULES, UserError
from lora_tradeoffs.command_line import did_you_mean
from training_configs import (
    ADAPTER_FIELDS,
    METHODS,
    TrainingConfig,
    parse_assignments,
    settable_fields,
)

WORD = re.compile(r"(?P<name>\w*)(:(?P<number>[^@,]*))?(@(?P<modules>[^,]*))?(,(?P<fields>.+))?")
FORM = "NAME[:RANK][@MODULES][,field=value...]"


@dataclass(frozen=True)
class ArmSpec:
    """A method, its rank (of OFT the size of a block) and the fields that it sets by itself.

    >>> arm = ArmSpec.parse("lora:8@all,scaling=constant")
    >>> arm.method, arm.rank, arm.values
    ('lora', 8, {'target_modules': 'all', 'scaling': 'constant'})
    >>> str(arm)
    'lora:8@all,scaling=constant'
    """

    method: str
    rank: int = 0
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, word: str) -> ArmSpec:
        """The arm of a word. Raises UserError for one that names no arm."""
        match = WORD.fullmatch(word)
        name = match["name"] if match else re.split("[:@,]", word)[0]
        if match is None or name not in METHODS:
            hint, names = did_you_mean(name, METHODS), ", ".join(METHODS)
            raise UserError(f"arm {word!r:.80}: {hint}write {FORM}; names: {names}")
        number, what = match["number"], METHODS[name].number
        if what and not re.fullmatch("[0-9]{1,7}", number or ""):
            raise UserError(f"arm {word!r:.80}: {name} needs its {what}, as in {name}:8")
        if number is not None and not what:
            raise UserError(f"arm {word!r:.80}: {name} has no rank; write {name}")
        assignments = [] if match["modules"] is None else [f"target_modules={match['modules']}"]
        for part in (match["fields"] or "").split(",") if match["fields"] else ():
            # some values hold commas themselves
            is_more = part.partition("=")[0] not in settable_fields()
            if is_more and assignments and assignments[-1].startswith(("optim_", "mixing_")):
                assignments[-1] += f",{part}"
            else:
                assignments.append(part)
        values = parse_assignments(assignments, f"arm {word!r:.80}:")
        if len(values) < len(assignments):
            raise UserError(f"arm {word!r:.80} sets a field twice; keep one")
        for name_of_field in ADAPTER_FIELDS:
            if name_of_field in values and name_of_field not in METHODS[name].fields:
                raise UserError(f"arm {word!r:.80}: {name} has no {name_of_field}")
        modules = values.get("target_modules", "qv")
        if modules not in TARGET_MODULES:
            raise UserError(f"arm {word!r:.80}: modules are {', '.join(TARGET_MODULES)}")
        return cls(name, int(number or 0), values)

    @classmethod
    def of(cls, config: TrainingConfig, default: TrainingConfig) -> ArmSpec:
        """The arm of a run, with every field that differs from the default's."""
        values = {name: getattr(config, name) for name in settable_fields()}
        changed = {k: v for k, v in values.items() if v != getattr(default, k)}
        return cls(config.method, config.rank, changed)

    def __str__(self) -> str:
        values = dict(self.values)
        word = self.method + (f":{self.rank}" if METHODS[self.method].number else "")
        modules = values.pop("target_modules", None)
        return (
            word
            + (f"@{modules}" if modules else "")
            + "".join(
                f",{name}={str(value).lower() if isinstance(value, bool) else value}"
                for name, value in values.items()
            )
        )

    def own(self, values: Mapping[str, Any], arms: list[ArmSpec]) -> dict[str, Any]:
        """Values for all arms as they hold for this one, and its own, which beat them.

        What belongs to other arms among `arms` is left out.
        """
        others = {name for arm in arms for name in METHODS[arm.method].fields}
        foreign = others - set(METHODS[self.method].fields)
        return {k: v for k, v in values.items() if k not in foreign} | dict(self.values)


def add_adapter_argument(group: argparse._ArgumentGroup) -> None:
    """Add --adapter, which takes any arm."""
    text = f"""any arms, as {FORM}: lora:8, lora:8@all, lora:8@qv,scaling=constant, dora:4, pissa:8,
        loraplus:8, oft:32 (the size of a block), full, full_qv"""
    group.add_argument("--adapter", nargs="+", default=[], metavar="ARM", help=text)


def settable_help() -> str:
    """The fields that `--set` takes, one per line, with their defaults."""
    lines = ["fields for --set, with their defaults (similar / dissimilar where these differ):"]
    for name, f in settable_fields().items():
        lines.append(f"  {name:<25} {f.metadata['help']} ({_default_text(f)})")
    return "\n".join(lines)


def _default_text(f: Any) -> str:
    """A field's default, and that of every preset that has its own."""
    is_preset = hasattr(PRESETS["demo"], f.name)
    texts = [] if is_preset else [str(f.metadata.get("shown", f.default)).lower()]
    for preset in PRESETS.values():
        value = getattr(preset, f.name, preset.training.get(f.name))
        if value is None:
            continue
        by_family = value.values() if isinstance(value, dict) else [value]
        texts.append(f"{preset.name} {' / '.join(f'{v:g}' for v in dict.fromkeys(by_family))}")
    return ", ".join(texts)
