"""A study in a few megabytes: what its report is made of, to be published or attached to a paper.

    python -m lora_tradeoffs.report.html --study NAME --pack FOLDER
    python -m lora_tradeoffs.report.html --from FOLDER

The folder is laid out as an OUTPUT_DIR. It holds the documents (of drift and gradients the records
that are shown; large ones as .json.gz), what each run recorded of itself, the study's file, the
per-item outcomes of the last checkpoints in one Parquet file for each analysis, and the spectra
that are drawn. Absolute paths are cut to their last part.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, Settings, UserError, resolve_settings
from lora_tradeoffs.checkpoints import MANIFEST
from lora_tradeoffs.figures.spectra import (
    contrasted_runs,
    shown_similarities,
    similarities_file,
    spectra_file,
)
from lora_tradeoffs.figures.study_records import SHOWN, StudyRecords
from lora_tradeoffs.files import (
    PARTIAL,
    read_head,
    read_json,
    read_records,
    write_json,
    write_records,
)
from lora_tradeoffs.measuring.results import PACKED_ITEMS, Results, adaptation_unit, retention_unit
from lora_tradeoffs.records import DOCUMENT
from lora_tradeoffs.report.findings import findings
from lora_tradeoffs.report.model_card import without_paths
from lora_tradeoffs.study.study_file import file_text, read_study_file
from lora_tradeoffs.tables.frames import is_trained, last_checkpoints

if TYPE_CHECKING:
    from pandas import DataFrame

OF_RUNS = ("learning_rates.json", "*/run.json", "*/training.json", f"*/checkpoint-*/{MANIFEST}")
LARGE = 1_000_000  # bytes of a document from which on it is compressed, to about a twentieth
ITEM_COLUMNS = ("metric", "aggregate", "item", "statistics", "unit")


def packed_settings(folder: Path, study: str | None = None) -> list[Settings]:
    """The settings of each study, or of one, in a folder that `pack` wrote: its OUTPUT_DIR.

    Raises UserError if there is none.
    """
    documents = {}
    for pattern in DOCUMENTS.values():
        for path in folder.glob(f"{pattern.format(study=study or '*')}*"):  # also .json.gz
            documents[path.relative_to(folder).parts[1]] = path
    if not documents:
        raise UserError(f"{folder} holds no such study: pack one with --pack FOLDER")
    resolved = []
    for name, path in sorted(documents.items()):
        preset = read_head(path, {"meta": DOCUMENT["meta"]})["meta"].get("preset")
        where = {"study": name, "preset": preset, "output_dir": str(folder)}
        where |= {"tasks_dir": str(folder / "tasks"), "data": "sample"}  # no task file is read
        resolved.append(resolve_settings(argparse.Namespace(**where)))
    return resolved


def pack(settings: Settings, folder: Path) -> None:
    """Copy what the study's report is made of to the folder, whole or not at all.

    Raises UserError if it holds a study of this name, or if the copy gives other findings.
    """
    study = StudyRecords.load(settings)
    if study.first_frame is None:
        raise UserError(f"study {settings.study} has no results in {settings.output_dir}")
    if there := sorted(map(str, folder.glob(f"*/{settings.study}"))):
        raise UserError(f"nothing was packed: remove {' and '.join(there)}, or choose another")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=PARTIAL, dir=folder) as temporary:
        copy = dataclasses.replace(settings, output_dir=Path(temporary))
        _pack_documents(settings, copy)
        for name, unit_of in (("adaptation", adaptation_unit), ("retention", retention_unit)):
            _pack_items(study.at_all_rates[name], settings.document(name), copy, unit_of)
        _pack_spectra(study.plain, copy.document("drift").parent)
        if repr(findings(study)) != repr(findings(StudyRecords.load(copy))):  # nan is not nan
            raise UserError("nothing was packed: the copy gives other findings, a fault of --pack")
        for path in Path(temporary).glob(f"*/{settings.study}"):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            os.rename(path, target)


def _pack_documents(settings: Settings, copy: Settings) -> None:
    """Documents, the runs' own records, and the study's files."""
    for name in DOCUMENTS:
        if (path := settings.document(name)).is_file():
            records, target = filter(SHOWN.get(name), read_records(path)), copy.document(name)
            write_records(target, without_paths(read_head(path)), records)
            if target.stat().st_size > LARGE:
                with target.open("rb") as source, gzip.open(f"{target}.gz", "wb") as packed:
                    shutil.copyfileobj(source, packed)
                target.unlink()
    for path in (path for pattern in OF_RUNS for path in settings.runs_dir.glob(pattern)):
        target = copy.runs_dir / path.relative_to(settings.runs_dir)
        write_json(target, without_paths(read_json(path)))
    source, target = (s.document("retention").parent for s in (settings, copy))
    for path in (path for name in ("study.json", "steps.json") for path in source.glob(name)):
        write_json(target / path.name, without_paths(read_json(path)))
    if (path := source / "study.yaml").is_file():
        text = file_text(without_paths(read_study_file(path)))
        (target / path.name).write_text(text, encoding="utf-8")


def _pack_items(
    frame: DataFrame | None, document: Path, copy: Settings, unit_of: Callable[[Any], str]
) -> None:
    """Per-item outcomes of the runs' last checkpoints, which are the ones that tests pair."""
    import pandas as pd

    if frame is None:
        return
    results = Results(document.parent)
    rows = last_checkpoints(frame[is_trained(frame)])
    rows = rows.drop_duplicates(["run", "task", "split", "shots"])
    units = dict.fromkeys(map(unit_of, rows.itertuples()))
    units = [u for u in units if results.unit_file(u).is_file() and results.items(u)]
    tables = [pd.read_parquet(results.items_file(unit)).assign(unit=unit) for unit in units]
    table = pd.concat([pd.DataFrame(columns=[*ITEM_COLUMNS]), *tables], ignore_index=True)
    path = copy.document(document.stem).parent / PACKED_ITEMS
    table.to_parquet(path, compression="zstd")


def _pack_spectra(study: StudyRecords, folder: Path) -> None:
    """The tables of drift from which figures are drawn; of similarities the layers shown."""
    from safetensors.numpy import save_file

    if study.drift is None:
        return
    for run in contrasted_runs(study.drift):
        source, target = (spectra_file(f, run) for f in (study.folder("drift"), folder))
        if source.is_file():
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
    for run, (_, matrices) in shown_similarities(study, study.drift)[0].items():
        target = similarities_file(folder, run)
        target.parent.mkdir(exist_ok=True)
        save_file({n: m.astype("float16") for n, m in matrices.items()}, target)
