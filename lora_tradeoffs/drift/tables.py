"""What is written about one checkpoint's drift: its records, and four tables beside them.

`layers/` has every row of every matrix (Parquet), `spectra/` singular values and largest cosines,
`similarities/` the cosines between leading vectors of base and tuned matrix and, for a run's last
checkpoint, `directions/` the update's singular vectors.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import INTRUDER_EPSILON, INTRUDER_K
from lora_tradeoffs.files import intact, written_whole
from lora_tradeoffs.measuring.subjects import Subject
from lora_tradeoffs.models.weights import Matrix
from lora_tradeoffs.records import unit_name

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from lora_tradeoffs.drift.matrix import MatrixDrift


@dataclass(frozen=True)
class CheckpointDrift:
    """The drift of every matrix, and ||dW||_F^2 and ||W0||_F^2 of every tensor."""

    matrices: dict[Matrix, MatrixDrift]
    squares: dict[str, tuple[float, float]]
    is_low_rank: bool  # all directions of an update are stored, not the leading ones alone


# ---------------------------------------------------------------------------------- tables


def table_files(folder: Path, subject: Subject) -> list[Path]:
    """The checkpoint's tables in the results' folder: layers, spectra, similarities, directions."""
    unit = unit_name(subject.run, subject.step)
    files = [folder / "layers" / f"{unit}.parquet", folder / "spectra" / f"{unit}.parquet"]
    files.append(folder / "similarities" / f"{unit}.safetensors")
    if subject.is_last:
        files.append(folder / "directions" / f"{unit}.safetensors")
    return files


def write_tables(folder: Path, subject: Subject, drift: CheckpointDrift) -> None:
    """Write the checkpoint's tables below the results' folder."""
    from lora_tradeoffs.drift.svd import digest

    layers, spectra, similarities, *directions = table_files(folder, subject)
    _write_table(layers, _layer_table(drift))
    _write_table(spectra, _spectrum_table(drift))
    _save_tensors(
        similarities, {m.name: d.similarity.half() for m, d in drift.matrices.items()}, {}
    )
    for path in directions:
        vectors = {
            f"{matrix.name}.{side}": basis.float()
            for matrix, d in drift.matrices.items()
            for side, basis in zip(("left", "right"), d.directions)
            if basis.shape[1]
        }
        content = digest([vectors[name] for name in sorted(vectors)])
        metadata = {"fields": json.dumps(common_fields(subject)), "content": content}
        metadata["update"] = "low rank" if drift.is_low_rank else "dense"
        _save_tensors(path, vectors, metadata)


def _layer_table(drift: CheckpointDrift) -> pd.DataFrame:
    """Every row of every matrix: layer, module, decomposition (see Triplets.method), metric, k,
    eps, side, value."""
    import pandas as pd

    rows = [
        {"layer": matrix.layer, "module": matrix.module, "decomposition": d.method, **row}
        for matrix, d in drift.matrices.items()
        for row in d.rows
    ]
    table = pd.DataFrame(rows)
    table["k"] = table["k"].astype("Int32")
    return table.astype({"eps": float, "value": float})


def _spectrum_table(drift: CheckpointDrift) -> pd.DataFrame:
    """Singular values by matrix and index, from 1: base, tuned, update; max_cosine of u_j."""
    import pandas as pd

    parts = []
    for matrix, d in drift.matrices.items():
        columns = (d.base_values, d.tuned_values, d.update_values, d.max_cosines)
        columns = [pd.Series(column.float().numpy()) for column in columns]
        part = pd.DataFrame(dict(zip(("base", "tuned", "update", "max_cosine"), columns)))
        part = part.assign(layer=matrix.layer, module=matrix.module, index=part.index + 1)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def layers_file(folder: Path) -> Path:
    """Where the rows of all checkpoints are joined."""
    return folder / "drift_layers.parquet"


def join_layers(folder: Path) -> None:
    """Join the rows of all checkpoints in `layers_file`, unless it is of the tables as they are.

    Its time is that of the folder of tables, which changes when a table is written or deleted.
    """
    from pyarrow.parquet import ParquetWriter

    joined, tables = layers_file(folder), folder / "layers"
    paths = sorted(tables.glob("*.parquet"))
    time = tables.stat().st_mtime_ns if paths else 0
    if not paths or (joined.is_file() and joined.stat().st_mtime_ns == time):
        return
    schema = _read_layers(paths[0]).schema
    with written_whole(joined) as temporary:
        with ParquetWriter(temporary, schema) as writer:
            for path in paths:
                writer.write_table(_read_layers(path).cast(schema))
        os.utime(temporary, ns=(time, time))


def _read_layers(path: Path) -> pa.Table:
    """The rows of one checkpoint with its run and step; words as categories.

    Raises UserError for a broken file.
    """
    import pyarrow as pa
    from pyarrow.parquet import read_table

    run, _, step = path.stem.rpartition("-")
    with intact(path):
        table = read_table(path)
    table = table.append_column("run", pa.array([run] * len(table)))
    table = table.append_column("step", pa.array([int(step)] * len(table)))
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            words = table[field.name].cast(pa.string()).dictionary_encode()
            table = table.set_column(i, field.name, words)
    return table


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with written_whole(path) as temporary:
        table.to_parquet(temporary)


def _save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


# --------------------------------------------------------------------------------- records


def records_of(subject: Subject, drift: CheckpointDrift) -> list[dict[str, Any]]:
    """Flat records. Over the layers (layer -1): every k, and every epsilon at the published k. Of
    each layer: the published k and epsilon alone. The whole grid is in `layers/`."""
    from lora_tradeoffs.drift.matrix import aggregate, whole_model

    common = common_fields(subject)
    rows = [
        row
        for row in aggregate(drift.matrices)
        if row["k"] in (None, INTRUDER_K) or row["eps"] in (None, INTRUDER_EPSILON)
    ]
    rows += whole_model(drift.squares) if drift.squares else []
    records = [{**common, "layer": -1, **row} for row in rows]
    for matrix, d in drift.matrices.items():
        about = {"layer": matrix.layer, "module": matrix.module, "n": 1, "decomposition": d.method}
        records += [
            {**common, **about, **row}
            for row in d.rows
            if row["k"] in (None, INTRUDER_K) and row["eps"] in (None, INTRUDER_EPSILON)
        ]
    return records


def common_fields(subject: Subject) -> dict[str, Any]:
    """The columns that all records of a checkpoint share; drift has no task and no split."""
    about = {"run": subject.run, "family": subject.family or "", "step": subject.step}
    return {**subject.fields, **about, "split": "", "task": ""}
