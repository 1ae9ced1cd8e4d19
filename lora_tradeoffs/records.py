"""Names and fields of records that the part that measures and the part that reports share."""

from __future__ import annotations

import json
from pathlib import Path

from config import DOCUMENTS, Settings
from lora_tradeoffs.files import write_json

# -------------------------------------------------------------------------------- retention

TEXT = "text_"  # before a source of held-out text

# ------------------------------------------------------------------------------- gradients

OVERALL, BOTH = -1, "both"  # the layer, and the module, of records over all of them
MEAN = "mean"  # the task of records over all pairs


def metric_scale(metric: str) -> int:
    """The upper end of a metric's scale: 100 for BLEU, 1 for every other."""
    return 100 if "bleu" in metric else 1


def forget(settings: Settings, run: str) -> int:
    """Remove what a study's analyses measured of a run of this name; the number of units.

    For a run that is trained anew: what was measured of the one before would stand beside what is
    measured of it, as if it were its own.
    """
    units = 0
    for document in map(settings.document, DOCUMENTS):
        for path in document.parent.glob(f"*/{run}-*"):
            units += path.parent.name == "records"
            path.unlink()
        _leave_out(run, document)
    return units


def _leave_out(run: str, document: Path) -> None:
    """Take a run's records out of a joined document, those of two runs too, as phi's are."""
    try:
        whole = json.loads(document.read_text(encoding="utf-8"))
        kept = [record for record in whole["records"] if run not in record.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # not there; or not as written, and the next join writes it anew
    if len(kept) < len(whole["records"]):
        write_json(document, {**whole, "records": kept})
