"""Results on disk: a file for each unit, and the document that joins them.

A unit is one measurement of one checkpoint by one script. `records/<unit>.json` holds its request
(what identifies the measurement) and its flat records; `items/<unit>.parquet` holds the per-item
statistics behind them, for paired tests. A study that was packed (report/pack.py) has the items of
several units in one `items.parquet`, and no records but the document's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import UserError
from lora_tradeoffs.files import (
    check_shape,
    file_record,
    intact,
    locked,
    read_head,
    read_json,
    remove_partial,
    write_records,
    written_whole,
)
from lora_tradeoffs.records import OLD_VERSIONS, RECORD_VERSION, UNIT, unit_name, units_of, updated

if TYPE_CHECKING:
    from lora_tradeoffs.statistics.contrasts import Items
    from lora_tradeoffs.statistics.scores import Scores


PACKED_ITEMS = "items.parquet"
MEASURED = ("value", "stderr", "low", "high", "n")  # columns of the outcome; the others say of what


class Results:
    """The results of one script for one study, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unit_file(self, unit: str) -> Path:
        return self.folder / "records" / f"{unit}.json"

    def items_file(self, unit: str) -> Path:
        return self.folder / "items" / f"{unit}.parquet"

    def is_done(self, unit: str, request: dict[str, Any]) -> bool:
        """Whether the unit has results of the same request, and its items are whole.

        Raises UserError for a file that another version of the suite wrote.
        """
        path, items = self.unit_file(unit), self.items_file(unit)
        if not path.is_file():
            return False
        head = _head(path)
        if head["request"] != json.loads(json.dumps(request)):
            return False
        listed = head.get("items")
        if listed and not (items.is_file() and file_record(items) == listed):
            print(f"{items} is damaged or missing: {unit} is measured again", flush=True)
            return False
        return True

    def read(self, unit: str) -> dict[str, Any]:
        """The unit's document. Raises UserError if it is damaged or of another version."""
        return _read(self.unit_file(unit))

    def write(
        self,
        unit: str,
        request: dict[str, Any],
        records: list[dict[str, Any]],
        scores: Sequence[Scores] = (),
        groups: np.ndarray | None = None,
        batch_tokens: int = 0,
    ) -> None:
        """Write a unit; its items first, so that records never lack their items.

        `groups`, shape (items,), numbers the groups of items that are resampled together.
        `batch_tokens`, the size of its batches, is recorded and identifies nothing. Raises
        UserError rather than overwrite a file of another version of the suite.
        """
        if self.unit_file(unit).is_file():
            _head(self.unit_file(unit))
        head = {"record_version": RECORD_VERSION, "request": request}
        if scores:
            self._write_items(unit, scores, groups)
            head["items"] = file_record(self.items_file(unit))
        head |= {"batch_tokens": batch_tokens} if batch_tokens else {}
        write_records(self.unit_file(unit), head, map(_strict, records))

    def _write_items(self, unit: str, scores: Sequence[Scores], groups: np.ndarray | None) -> None:
        import pandas as pd

        group_column = {} if groups is None else {"group": groups}
        tables = [
            pd.DataFrame(
                {
                    "metric": s.name,
                    "aggregate": s.aggregate.__name__,
                    "item": np.arange(len(s.statistics)),
                    "statistics": list(s.statistics),
                    **group_column,
                }
            )
            for s in scores
        ]
        with written_whole(self.items_file(unit)) as temporary:
            pd.concat(tables, ignore_index=True).to_parquet(temporary)

    def items(self, unit: str) -> dict[str, Scores]:
        """The unit's per-item statistics by metric; empty for metrics of a whole corpus.

        Those of a group of items, which are resampled together, are joined. Raises UserError for a
        broken file.
        """
        import pandas as pd

        from lora_tradeoffs.statistics.comparisons import grouped
        from lora_tradeoffs.statistics.scores import AGGREGATES, Scores

        path, packed = self.items_file(unit), self.folder / PACKED_ITEMS
        of_unit = None
        if packed.is_file():
            path, of_unit = packed, [("unit", "==", unit)]
        elif not path.is_file():
            if "items" in _read(self.unit_file(unit)):
                raise UserError(f"{path} is missing; measure {unit} again")
            return {}
        scores = {}
        with intact(path, f"measure {unit} again"):
            table = pd.read_parquet(path, filters=of_unit)
            for name, rows in table.groupby("metric", sort=False):
                aggregate = AGGREGATES[rows["aggregate"].iloc[0]]
                values = Scores(name, np.stack(rows["statistics"]), aggregate)
                has_groups = "group" in rows and rows["group"].notna().all()
                scores[name] = grouped(values, rows["group"]) if has_groups else values
        return scores

    def units(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every unit's name and document, by name. Raises UserError for a copy of another unit."""
        known: dict[str, Path] = {}
        for path in self._unit_files():
            unit = _read(path)
            for record in unit["records"][:1]:
                about = {k: v for k, v in record.items() if k not in MEASURED}
                other = known.setdefault(json.dumps(about, sort_keys=True), path)
                if other != path:  # as a synchronised folder makes them: "X (1).json"
                    raise UserError(f"{path} and {other} hold the same measurement: remove one")
            yield path.stem, unit

    def _unit_files(self) -> list[Path]:
        return sorted((self.folder / "records").glob("*.json"))

    def check(self, name: str) -> None:
        """Raise UserError if a unit or the document is of another version; before measuring."""
        _check_document(self.folder / f"{name}.json")
        for path in self._unit_files():
            _head(path)

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """Hold a lock: of scripts that run side by side, the last to join has all units."""
        with locked(self.folder / ".lock"):
            remove_partial(self.folder)
            yield

    def join(self, name: str, meta: dict[str, Any], derived: Iterable[dict[str, Any]] = ()) -> Path:
        """Write the records of all units to one document, `<folder>/<name>.json`; its path.

        `derived` are records that compare units; they come last. Raises UserError rather than
        overwrite a document of another version.
        """
        path = self.folder / f"{name}.json"
        _check_document(path)
        records = (record for _, unit in self.units() for record in unit["records"])
        meta = {**meta, "record_version": RECORD_VERSION}
        write_records(path, {"meta": meta}, itertools.chain(records, map(_strict, derived)))
        return path


def _strict(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for nan and infinity, which JSON does not have."""
    return {
        k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()
    }


def _head(path: Path) -> dict[str, Any]:
    """A unit's document without its records, which stand last. Raises UserError as `_read` does."""
    head = read_head(path)
    _check_version(path, head.get("record_version"), path.parent.parent)
    check_shape(path, head, {"request": dict})
    return head


def _read(path: Path) -> dict[str, Any]:
    """A unit's document. Raises UserError if it is damaged or of another version."""
    unit = read_json(path)
    version = unit.get("record_version")
    _check_version(path, version, path.parent.parent)
    check_shape(path, unit, UNIT)
    if version in OLD_VERSIONS:
        unit["records"] = [updated(record) for record in unit["records"]]
    return unit


def of_other_weights(folder: Path, weights: dict[tuple[str, int], Any]) -> list[str]:
    """The units in a folder of results that were not measured on the weights of their run and step.

    They were measured before an edit, or on another folder of the run's name.
    """
    names = []
    for name in units_of({run for run, _ in weights}, folder / "records"):
        with contextlib.suppress(UserError):  # the next command names what is damaged
            unit = _read(folder / "records" / f"{name}.json")
            known = [weights.get((record["run"], record["step"])) for record in unit["records"]]
            if any(known) and unit["request"].get("weights") not in known:
                names.append(name)
    return names


def _check_document(path: Path) -> None:
    """Raise UserError if the joined document is of another version; a damaged one is replaced."""
    with contextlib.suppress(FileNotFoundError):
        try:
            version = read_head(path, {"meta": dict})["meta"].get("record_version")
        except UserError:
            return
        _check_version(path, version, path.parent)


def _check_version(path: Path, version: Any, folder: Path) -> None:
    if version not in (RECORD_VERSION, *OLD_VERSIONS):
        raise UserError(
            f"{path} is of record version {version}, this suite writes {RECORD_VERSION}: move"
            f" {folder} away, or use the version that wrote it"
        )


# ---------------------------------------------------------------------------- per-item readers


def adaptation_unit(row: Any) -> str:
    """The unit of a record of adaptation, as a row of its frame."""
    return unit_name(row.run, row.step, row.task, row.split)


def retention_unit(row: Any) -> str:
    """The unit of a benchmark's record, as a row of its frame."""
    shots = f"{row.shots:.0f}shot" if row.shots else ""
    return unit_name(row.run, row.step, row.task, shots)


def item_reader(results: Results, unit_of: Callable[[Any], str]) -> Items:
    """A reader of the per-item statistics of a record, whose unit `unit_of` names."""
    items = functools.cache(results.items)
    return lambda row: items(unit_of(row)).get(row.metric)
