"""The one shape of a result: units on disk, written whole, and the document that joins them.

A unit is what one script measured of one checkpoint on one thing. Its file
`records/<unit>.json` holds what was asked and the flat records that came out; per-item statistics
lie beside it in `items/<unit>.parquet`, for paired tests.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from config import UserError

if TYPE_CHECKING:
    from metrics import Scores

RECORD_VERSION = 1


class Results:
    """The results of one script for one study, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def unit_file(self, unit: str) -> Path:
        return self.folder / "records" / f"{unit}.json"

    def is_done(self, unit: str, request: dict[str, Any]) -> bool:
        """Whether the unit was measured just as it is asked for now.

        Raises UserError for a file that another version of the suite wrote.
        """
        path = self.unit_file(unit)
        return path.is_file() and _read(path)["request"] == json.loads(json.dumps(request))

    def write(
        self,
        unit: str,
        request: dict[str, Any],
        records: list[dict[str, Any]],
        scores: Sequence[Scores] = (),
    ) -> None:
        """Write a unit, its items first, so that a record without items cannot be."""
        from checkpoint_utils import write_json

        if scores:
            self._write_items(unit, scores)
        records = [_strict(record) for record in records]
        document = {"record_version": RECORD_VERSION, "request": request, "records": records}
        write_json(self.unit_file(unit), document)

    def _write_items(self, unit: str, scores: Sequence[Scores]) -> None:
        import os

        import pandas as pd

        tables = [
            pd.DataFrame(
                {
                    "metric": s.name,
                    "aggregate": s.aggregate.__name__,
                    "item": np.arange(len(s.statistics)),
                    "statistics": list(s.statistics),
                }
            )
            for s in scores
        ]
        path = self.folder / "items" / f"{unit}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        pd.concat(tables, ignore_index=True).to_parquet(partial)
        os.replace(partial, path)

    def items(self, unit: str) -> dict[str, Scores]:
        """The unit's per-item statistics by metric; none where all its figures are a corpus's."""
        import pandas as pd

        from metrics import AGGREGATES, Scores

        path = self.folder / "items" / f"{unit}.parquet"
        if not path.is_file():
            return {}
        table = pd.read_parquet(path)
        return {
            name: Scores(name, np.stack(part["statistics"]), AGGREGATES[part["aggregate"].iloc[0]])
            for name, part in table.groupby("metric", sort=False)
        }

    def units(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every unit's name and document, by name."""
        for path in sorted((self.folder / "records").glob("*.json")):
            yield path.stem, _read(path)

    @contextlib.contextmanager
    def joining(self) -> Iterator[None]:
        """Hold the others off: of scripts side by side, the last to join has all units."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield

    def join(self, name: str, meta: dict[str, Any], derived: Sequence[dict[str, Any]] = ()) -> Path:
        """Write all units' records into one document, `<folder>/<name>.json`; its path.

        `derived` are records that compare units, and come after theirs.
        """
        from checkpoint_utils import write_json

        records = [record for _, unit in self.units() for record in unit["records"]]
        records += [_strict(record) for record in derived]
        path = self.folder / f"{name}.json"
        meta = {**meta, "record_version": RECORD_VERSION}
        write_json(path, {"meta": meta, "records": records})
        return path


def _strict(record: dict[str, Any]) -> dict[str, Any]:
    """The record with null for what is not a finite number: JSON has no other word for it."""
    return {
        k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()
    }


def _read(path: Path) -> dict[str, Any]:
    from checkpoint_utils import read_json

    unit = read_json(path)
    version = unit.get("record_version") if isinstance(unit, dict) else None
    if version != RECORD_VERSION:
        raise UserError(
            f"{path} is of record version {version}, this suite writes {RECORD_VERSION}: move"
            f" {path.parent.parent} away, or use the version that wrote it"
        )
    records = unit.get("records")
    if "request" not in unit or not isinstance(records, list) or not all(map(_is_record, records)):
        raise UserError(f"{path} is not as it was written; delete it, and it is measured again")
    return unit


def _is_record(record: Any) -> bool:
    """Whether it says what was measured of which checkpoint, and a number that came out."""
    return (
        isinstance(record, dict)
        and {"run", "step", "metric", "value"} <= record.keys()
        and isinstance(record["value"], (int, float, type(None)))
    )
