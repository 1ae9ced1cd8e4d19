"""What plot_results.ipynb is made of: a study's records, and where its figures and tables go."""

from __future__ import annotations

import argparse
import html
import math
import reprlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import DOCUMENTS, PRESETS, UserError, resolve_settings
from lora_tradeoffs.figures.draw import MODULES
from lora_tradeoffs.files import read_json
from lora_tradeoffs.records import TRAINED
from lora_tradeoffs.tables.arms import Arm, shared_words, with_plain_arms
from lora_tradeoffs.tables.frames import NUMBERS, OPTIONAL, SCRIPTS, TEXT, load_records
from lora_tradeoffs.tables.learning_rates import at_chosen_rates
from lora_tradeoffs.training.learning_rates import read_rates

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

ANALYSIS_OF = {module: name for name, modules in MODULES.items() for module in modules}
METHODS = ("base", "baseline", "lora", "full", "full_qv")
META = ("study", "base_model", "preset")
NUMERIC = {*NUMBERS, *OPTIONAL, "layer", "k", "eps"}
WORDS = {*TEXT, "target_modules", "scaling", "module", "side"}
OUTCOME = {"value", "stderr", "low", "high"}  # all else in a record says what was measured
NEVER_NULL = {"run", "method", "metric", "rank", "seed", "step"}


class Report:
    """A study's records as data frames, None where they are missing.

    `adaptation`, `retention`, `drift` and `gradients` show a swept arm at its chosen learning rate;
    `all_rates` has them at every rate. Figures go to outputs/<study>/figures/ as PNG and PDF,
    tables to outputs/<study>/tables/ as CSV.
    """

    def __init__(self, study: str) -> None:
        self.settings = resolve_settings(argparse.Namespace(study=study))
        self.study, self.runs_dir = study, self.settings.runs_dir
        self.place = self.settings.output_dir / "outputs" / study
        self.rates = read_rates(self.runs_dir)
        self.all_rates = {name: self._load(name) for name in DOCUMENTS}
        shown = {
            name: None if frame is None else at_chosen_rates(frame, self.rates)
            for name, frame in self.all_rates.items()
        }
        self.adaptation, self.retention = shown["adaptation"], shown["retention"]
        self.drift, self.gradients = shown["drift"], shown["gradients"]

    def folder(self, name: str) -> Path:
        """Where the script that measured it has its records."""
        return self.settings.document(name).parent

    def _load(self, name: str) -> DataFrame | None:
        path = self.settings.document(name)
        if not path.is_file():
            print(f"missing: {name} ({self._command(name)})")
            return None
        check(path, self._command(name))
        frame = load_records(path)
        meta = frame.attrs["meta"]
        print(f"{name}: study {meta['study']}, base {meta['base_model']}, preset {meta['preset']}")
        return frame if len(frame) else None

    def _command(self, name: str) -> str:
        return f"python {SCRIPTS[f'{name}.json']} --study {self.study}"

    def has(self, name: str) -> bool:
        """Whether there are records of the stage; if not it is said, with the command."""
        is_there = self.all_rates[name] is not None
        if not is_there:
            print(f"missing: {name} ({self._command(name)})")
        return is_there

    @property
    def any(self) -> DataFrame | None:
        """Whichever records there are: they say which preset made them."""
        frames = (self.retention, self.adaptation, self.drift, self.gradients)
        return next((frame for frame in frames if frame is not None), None)

    @property
    def preset(self) -> str:
        found = self.any
        return self.settings.preset.name if found is None else found.attrs["meta"]["preset"]

    def draw(self, figure: Callable[..., Figure], first: Any, *more: Any, name: str = "") -> None:
        """Draw, save and display a figure of the records; what is missing is said instead."""
        from IPython.display import HTML, Image, display

        from lora_tradeoffs.figures.style import save

        if first is None:
            print("not drawn: its records are missing")
            return
        path = self.place / "figures" / f"{name or figure.__name__}.png"
        told = (figure.__doc__ or name).strip().splitlines()[0]
        analysis = ANALYSIS_OF.get(figure.__module__)
        frames = with_plain_arms(first, *more) if analysis else [first, *more]
        display(Image(save(figure(*frames), path, pdf=True), width=860, alt=told))
        if analysis:
            self._file(path, analysis, figure.__name__)
        display(HTML(f'<p class="caption">{html.escape(told)}</p>'))

    def _file(self, drawn: Path, analysis: str, name: str) -> None:
        """Put the figure beside the records that it shows, too, as the analysis itself does."""
        folder = self.folder(analysis) / "figures"
        folder.mkdir(exist_ok=True)
        for kind in (".png", ".pdf"):
            target = folder / f"{name}{kind}"
            if target != drawn.with_suffix(kind):
                shutil.copyfile(drawn.with_suffix(kind), target)

    def save_table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        path = self.place / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(path, index=index)

    def table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        """Save and display a table; in what is shown, what all runs share stands once, below."""
        from IPython.display import HTML, display

        self.save_table(name, frame, index)
        if frame.empty:
            print(f"{name}: nothing to show")
            return
        words = shared_words(f for f in self.all_rates.values() if f is not None)

        def plain(arm: Any) -> Any:
            return arm.without(words) if isinstance(arm, Arm) else arm

        shown = frame.rename(index=plain) if index else frame
        if "arm" in frame:
            shown = shown.assign(arm=frame["arm"].map(plain))
        styled = shown.style.format(_cell, na_rep="", escape="html")
        display(styled if index else styled.hide(axis="index"))
        if words and not shown.equals(frame):
            display(HTML(f"<p>All runs: {html.escape(' '.join(sorted(words)))}.</p>"))


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


def _cell(value: Any) -> str:
    """A table's number with four figures, however small: learning rates and p-values are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
