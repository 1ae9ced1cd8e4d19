"""What the cells of plot_results.ipynb call: a study's findings, tables and figures."""

from __future__ import annotations

import argparse
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, resolve_settings
from lora_tradeoffs.figures.draw import FIGURES, draw_one
from lora_tradeoffs.figures.study_records import StudyRecords
from lora_tradeoffs.report.findings import as_markdown, as_table, findings
from lora_tradeoffs.tables.arms import Arm, shared_sentence
from lora_tradeoffs.tables.frames import gaps
from lora_tradeoffs.tables.retention import retention_gaps

if TYPE_CHECKING:
    from pandas import DataFrame


class StudyReport:
    """A study's records (`study`, a StudyRecords), displayed and saved part by part.

    Tables go to outputs/<study>/tables/ as CSV. Figures go to figures/ beside the records that they
    show, those of several analyses to outputs/<study>/figures/, as PNG and with `pdf` also as PDF.
    """

    def __init__(self, study: str, pdf: bool = False) -> None:
        self.settings, self.pdf = resolve_settings(argparse.Namespace(study=study)), pdf
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
        styled = shown.style.set_uuid(name).format(_cell, na_rep="")
        styled.format_index(_cell).format_index(_cell, axis="columns")
        display(styled if index else styled.hide(axis="index"))
        if words and not shown.equals(frame):
            display(HTML(f"<p>{html.escape(shared_sentence(words))}</p>"))

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


def _cell(value: Any) -> str:
    """A cell or label as HTML; numbers have four figures, however small: learning rates are."""
    if not isinstance(value, float):
        return html.escape(str(value))  # also of a list or dict, which pandas would not escape
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
