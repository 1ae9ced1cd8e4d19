"""What the cells of plot_results.ipynb call: a study's findings, tables and figures."""

from __future__ import annotations

import argparse
import html
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, PRESETS, UserError, resolve_settings
from lora_tradeoffs.figures.draw import FIGURES, draw_one
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.files import read_json
from lora_tradeoffs.records import TRAINED
from lora_tradeoffs.report.findings import as_markdown, as_table, findings
from lora_tradeoffs.tables.arms import Arm
from lora_tradeoffs.tables.frames import NUMBERS, OPTIONAL, SCRIPTS, TEXT, gaps
from lora_tradeoffs.tables.retention import retention_gaps

if TYPE_CHECKING:
    from pandas import DataFrame

METHODS = ("base", "baseline", "lora", "full", "full_qv")
META = ("study", "base_model", "preset")
NUMERIC = {*NUMBERS, *OPTIONAL, "layer", "k", "eps"}
WORDS = {*TEXT, "target_modules", "scaling", "module", "side"}
OUTCOME = {"value", "stderr", "low", "high"}  # all else in a record says what was measured
NEVER_NULL = {"run", "method", "metric", "rank", "seed", "step"}


class StudyReport:
    """A study's records (`study`, a StudyRecords), displayed and saved part by part.

    Tables go to outputs/<study>/tables/ as CSV. Figures go to figures/ beside the records that they
    show, those of several analyses to outputs/<study>/figures/, as PNG and with `pdf` also as PDF.
    """

    def __init__(self, study: str, pdf: bool = False) -> None:
        self.settings, self.pdf = resolve_settings(argparse.Namespace(study=study)), pdf
        for path in map(self.settings.document, DOCUMENTS):
            if path.is_file():
                script = SCRIPTS[path.name]
                check(path, f"python {script} --study {study}")
        self.study = StudyRecords.load(self.settings)

    def sources(self) -> None:
        """Print which records there are, and the commands that make those that are missing."""
        for name in filter(self.has, DOCUMENTS):
            meta = getattr(self.study, name).attrs["meta"]
            text = f"study {meta['study']}, base {meta['base_model']}, preset {meta['preset']}"
            print(f"{name}: {text}")

    def has(self, analysis: str) -> bool:
        """Whether there are records of the analysis; if not, print the command that makes them."""
        is_measured = getattr(self.study, analysis) is not None
        if not is_measured:
            print(f"missing: {analysis} ({self.study.command(analysis)})")
        return is_measured

    def findings(self) -> None:
        """Display the findings, or why there are none."""
        from IPython.display import Markdown, display

        sentences = findings(self.study)
        self._save_table("findings", as_table(sentences))
        display(Markdown(as_markdown(sentences)))

    def figures(self, group: str) -> None:
        """Draw, save and display the figures of a group of figures.draw.FIGURES."""
        from IPython.display import HTML, Image, display

        for figure in FIGURES[group]:
            path = draw_one(self.study, group, figure, self.pdf)
            caption = figure.__doc__.strip().splitlines()[0]
            display(Image(path, width=860, alt=caption))
            display(HTML(f'<p class="caption">{html.escape(caption)}</p>'))

    def table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        """Save and display a table; what all runs share is shown once, below it."""
        from IPython.display import HTML, display

        self._save_table(name, frame, index)
        if frame.empty:
            print(f"{name}: nothing to show")
            return
        words = self.study.shared_words

        def plain(arm: Any) -> Any:
            return arm.without(words) if isinstance(arm, Arm) else arm

        shown = frame.rename(index=plain) if index else frame
        if "arm" in frame:
            shown = shown.assign(arm=frame["arm"].map(plain))
        styled = shown.style.format(_number, na_rep="", escape="html")
        display(styled if index else styled.hide(axis="index"))
        if words and not shown.equals(frame):
            display(HTML(f"<p>All runs: {html.escape(' '.join(sorted(words)))}.</p>"))

    def _save_table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        path: Path = self.study.folder("study") / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(path, index=index)

    def gaps(self) -> None:
        """Print what the study's grid lacks in the records of each analysis."""
        study = self.study
        for name in filter(self.has, DOCUMENTS):
            if name == "gradients":
                continue
            if name == "retention":
                sentences = retention_gaps(study.retention, study.adaptation)
            else:
                sentences = gaps(getattr(study, name), tested=name == "adaptation")
            print(f"{name}:", *(sentences or ["nothing, the grid is complete"]), sep="\n  ")


def check(path: Path, command: str) -> None:
    """Raise UserError, naming the file, if a results document holds what no script writes.

    A file that was edited by hand would else be drawn with gaps, or end in a foreign error.
    `command` writes the document anew.
    """
    document = read_json(path)
    meta, records = map(document.get, ("meta", "records")) if _is_object(document) else (None, None)
    mend = f"edited by hand? {command} writes it anew"
    if not isinstance(records, list) or not _is_object(meta):
        raise UserError(f"{path} has no meta and records; {mend}")
    wrong = [name for name in META if not isinstance(meta.get(name), str)]
    if wrong or meta["preset"] not in PRESETS:
        name = (wrong or ["preset"])[0]
        raise UserError(f"{path}: {name} is {reprlib.repr(meta.get(name))}; {mend}")
    for number, record in enumerate(records):
        if not _is_object(record):
            raise UserError(f"{path}: record {number} is {reprlib.repr(record)}; {mend}")
        for name, value in record.items():
            expected = _expected(name, value)
            if expected:
                said = f"{name} of record {number} is {reprlib.repr(value)}, no {expected}"
                raise UserError(f"{path}: {said}; {mend}")
    arms: dict[str, Any] = {}
    measured: dict[Any, int] = {}
    for number, record in enumerate(records):
        arm = tuple(map(record.get, TRAINED))
        if arms.setdefault(record.get("run"), arm) != arm:
            name = record.get("run")
            said = f"record {number} gives {name} another arm or seed than those before it"
            raise UserError(f"{path}: {said}; {mend}")
        what = frozenset((k, repr(v)) for k, v in record.items() if k not in OUTCOME)
        if measured.setdefault(what, number) != number:
            said = f"records {measured[what]} and {number} are of the same measurement"
            raise UserError(f"{path}: {said}; {mend}")


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _expected(name: str, value: Any) -> str:
    """What a field of a record ought to be, if it is not."""
    if value is None:
        return "value" if name in NEVER_NULL else ""
    if name == "method":
        return "" if value in METHODS else "method"
    if name in WORDS:
        return "" if isinstance(value, str) else "text"
    if name in NUMERIC:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return "" if is_number and math.isfinite(value) else "finite number"
    return ""


def _number(value: Any) -> str:
    """A table's number with four figures, however small: learning rates and p-values are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
