"""The look of figures: an arm keeps its colour, marker and line style in all of them.

LoRA's ranks are a ramp from light to dark, and those of another adapter are shades of its colour;
full fine-tuning and full_qv have colours outside these;
the base is a dashed grey line with its interval as a band, baselines are dotted. Figures are
matplotlib's Figure objects, made without pyplot, so that they can be drawn on any machine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tradeoffs.files import written_whole
from lora_tradeoffs.tables.arms import Arm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC_LABELS = {
    "accuracy": "accuracy",
    "f1": "F1",
    "codexglue_bleu": "BLEU (0 to 100)",
    "rougeL": "ROUGE-L",
    "acc": "accuracy",
    "acc_norm": "accuracy (acc_norm)",
    "exact_match": "exact match",
    "exact_match,strict-match": "exact match (strict)",
    "retention": "mean accuracy",
    "log_likelihood": "nats per token",
    "cka": "CKA with the base",
}

# Colours by log2(rank), interpolated between and held beyond: YlGnBu's darker two thirds, whose
# neighbours can be distinguished under all three colour deficiencies (tests/figures/test_style.py).
RAMP = {
    0: "#d6efb3",
    2: "#a0dab8",
    3: "#46b8c3",
    4: "#1e83ba",
    5: "#24439b",
    6: "#081d58",
    9: "#000208",
}
DENSE = {"full_qv": "#f0a030", "full": "#b2182b", "adapter": "#01665e"}
# Of other adapters at the grid's middle rank: lighter below, darker above.
ADAPTERS = {"dora": "#8c06ff", "pissa": "#8c66ff", "loraplus": "#ac7742", "oft": "#8aacfc"}
GREY = "#6e6e6e"
ADAPTER_MARKERS = {"dora": "d", "pissa": "p", "loraplus": "<", "oft": ">"}
RANK_MARKERS = {4: "o", 8: "s", 16: "^", 32: "D", 64: "v"}
VARIANT_MARKERS = "os^Dv<>phd8"  # drawn open, for arms that are not of the grid
TARGET_LINES = {"qv": "-", "attention": (0, (5, 1)), "mlp": (0, (3, 1, 1, 1)), "all": (0, (2, 1))}
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "pdf.fonttype": 42,  # text stays text: journals refuse Type 3 fonts
}


def style_of(arm: Arm) -> dict[str, Any]:
    """Colour, marker and line style of an arm, whichever other arms a figure holds."""
    if arm.method == "base":
        return {"color": GREY, "marker": "*", "linestyle": "--"}
    if arm.method == "baseline":
        return {"color": GREY, "marker": "x", "linestyle": ":"}
    style = {"color": DENSE.get(arm.method), "marker": "X", "linestyle": "-"}
    if arm.is_adapter:
        style = {
            "color": rank_colour(arm.rank, arm.method),
            "marker": ADAPTER_MARKERS.get(arm.method) or RANK_MARKERS.get(arm.rank, "h"),
            "linestyle": TARGET_LINES.get(arm.target_modules, "-"),
        }
    elif arm.method == "full_qv":
        style |= {"marker": "P", "linestyle": (0, (4, 1, 1, 1))}
    if arm.details:
        shape = VARIANT_MARKERS[zlib.crc32(arm.details.encode()) % len(VARIANT_MARKERS)]
        style |= {"marker": shape, "markerfacecolor": "white"}
    return style


def rank_colour(rank: int, method: str = "lora") -> str:
    """The colour of an adapter at a rank: LoRA's from the ramp, others' between white and black."""
    import numpy as np
    from matplotlib.colors import to_hex, to_rgb

    ramp = RAMP if method == "lora" else {-2: "white", 4: ADAPTERS[method], 10: "black"}
    colours = np.array([to_rgb(colour) for colour in ramp.values()])
    return to_hex([np.interp(math.log2(max(rank, 1)), list(ramp), column) for column in colours.T])


def save(figure: Figure, path: Path, pdf: bool = False) -> Path:
    """Write the figure as PNG, and with `pdf` also as PDF beside it, each whole or not at all."""
    for kind in ("png", "pdf")[: 1 + pdf]:
        dates = {"CreationDate": None} if kind == "pdf" else None  # the same bytes every time
        with written_whole(path.with_suffix(f".{kind}")) as temporary, styled():
            figure.savefig(temporary, format=kind, dpi=200, metadata=dates)
    return path.with_suffix(".png")


@contextmanager
def styled() -> Iterator[None]:
    """The style in which figures are made and saved: seaborn's "ticks", and our sizes."""
    import matplotlib
    import seaborn

    with matplotlib.rc_context(seaborn.axes_style("ticks") | STYLE):
        yield
