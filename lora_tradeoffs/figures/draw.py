"""All figures of an analysis from its joined document, as the script that measured draws them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from config import Settings

# whose FIGURES an analysis has
MODULES = {
    "adaptation": ("lora_tradeoffs.figures.adaptation",),
    "retention": ("lora_tradeoffs.figures.retention",),
    "drift": ("lora_tradeoffs.figures.drift", "lora_tradeoffs.figures.spectra"),
    "gradients": ("lora_tradeoffs.figures.gradients",),
}


def draw(analysis: str, settings: Settings, pdf: bool) -> Path:
    """Draw them into `figures/` beside the document, as PNG and with `pdf` as PDF; that folder.

    A swept arm is shown at its chosen learning rate, and what all runs share is said once.
    """
    from lora_tradeoffs.figures.style import save
    from lora_tradeoffs.tables.arms import with_plain_arms
    from lora_tradeoffs.tables.frames import load_records
    from lora_tradeoffs.tables.learning_rates import at_chosen_rates
    from lora_tradeoffs.training.learning_rates import read_rates

    document = settings.document(analysis)
    frame, folder = load_records(document), document.parent / "figures"
    if frame.empty:  # every checkpoint was broken
        return folder
    more = []
    if analysis == "retention":  # against what was learned, where that is measured
        adapted = settings.document("adaptation")
        more = [load_records(adapted) if adapted.is_file() else None]
    elif analysis == "drift":
        more = [document.parent]  # with the tables of all layers, k and epsilons
    frames = with_plain_arms(at_chosen_rates(frame, read_rates(settings.runs_dir)), *more)
    for module in MODULES[analysis]:
        for figure in import_module(module).FIGURES:
            save(figure(*frames), folder / f"{figure.__name__}.png", pdf)
    return folder
