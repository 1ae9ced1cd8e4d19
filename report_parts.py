"""What plot_results.ipynb is made of: a study's records, and where its figures and tables go."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError, resolve_settings
from learning_rate_tables import at_chosen_rates
from learning_rates import read_rates
from result_tables import load_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

# what was measured: its folder below OUTPUT_DIR, what stands below the study's, and the command
PLACES = {
    "adaptation": ("performance_analysis", "", "eval.py"),
    "retention": ("outputs", "", "retention_eval.py"),
    "drift": ("drift_analysis_plots", "", "svd_analysis.py"),
    "gradients": ("performance_analysis", "gradients", "gradient_conflict.py"),
}


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
        self.all_rates = {name: self._load(name) for name in PLACES}
        shown = {
            name: None if frame is None else at_chosen_rates(frame, self.rates)
            for name, frame in self.all_rates.items()
        }
        self.adaptation, self.retention = shown["adaptation"], shown["retention"]
        self.drift, self.gradients = shown["drift"], shown["gradients"]

    def folder(self, name: str) -> Path:
        """Where the script that measured it has its records."""
        place, below, _ = PLACES[name]
        return self.settings.output_dir / place / self.study / below

    def _load(self, name: str) -> DataFrame | None:
        path = self.folder(name) / f"{name}.json"
        if not path.is_file():
            print(f"missing: {name} (python {PLACES[name][2]} --study {self.study})")
            return None
        try:
            frame = load_records(path)
        except UserError as error:
            print(error)
            return None
        meta = frame.attrs["meta"]
        print(f"{name}: study {meta['study']}, base {meta['base_model']}, preset {meta['preset']}")
        return frame if len(frame) else None

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
        from IPython.display import Image, display

        from plotting import save

        if first is None:
            print("not drawn: its records are missing")
            return
        path = self.place / "figures" / f"{name or figure.__name__}.png"
        told = (figure.__doc__ or name).strip().splitlines()[0]
        display(Image(save(figure(first, *more), path, pdf=True), width=860, alt=told))

    def save_table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        path = self.place / "tables" / f"{name}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.to_csv(path, index=index)

    def table(self, name: str, frame: DataFrame, index: bool = False) -> None:
        """Save and display a table."""
        from IPython.display import display

        self.save_table(name, frame, index)
        if frame.empty:
            print(f"{name}: nothing to show")
        else:
            display(frame if index else frame.style.hide(axis="index").format(precision=4))
