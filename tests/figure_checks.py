"""What the tests of figures read from them."""

from __future__ import annotations

from itertools import combinations

from lora_tradeoffs.figures.study_records import StudyRecords


def drawn(figure, **frames):
    """A figure of a study of which there are these records."""
    return figure(StudyRecords(**frames))


def panel(figure, task):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == task)


def lines(ax, label):
    return [line for line in ax.lines if line.get_label() == str(label)]


def bars(ax, label, vertical=True):
    """The ends of an arm's error bars, from low to high."""
    container = next(c for c in ax.containers if c.get_label() == str(label))
    segments = container.lines[2][-1 if vertical else 0].get_segments()
    return [tuple(segment[:, int(vertical)]) for segment in segments]


def content(figure):
    """The labels of the lines that have points, by the panel's title; without marks of chance."""
    return {
        ax.get_title(loc="left").removesuffix(" †"): sorted(
            label
            for label in (str(line.get_label()) for line in ax.lines if len(line.get_xdata()))
            if label != "chance" and not label.startswith("_")
        )
        for ax in figure.axes
    }


def says_nothing(figure):
    """Whether the figure is only a sentence on what is missing."""
    return [t.get_text()[:16] for ax in figure.axes for t in ax.texts] == ["Nothing to draw:"]


def notes(figure):
    return " ".join(figure.get_supxlabel().split())  # line ends and no-break spaces as spaces


def assert_texts_are_apart(figure):
    """No text overlaps another or leaves the figure."""
    figure.draw_without_rendering()
    texts = [*figure.legends, figure._supxlabel]
    texts += [t for ax in figure.axes for t in (ax._left_title, ax._right_title, ax.xaxis.label)]
    for ax in figure.axes:
        low, high = ax.get_xlim()
        inside = [low <= x <= high for x in ax.get_xticks()]
        texts += [t for t, shown in zip(ax.get_xticklabels(), inside) if shown]
    boxes = [t.get_window_extent() for t in texts if not hasattr(t, "get_text") or t.get_text()]
    for a, b in combinations(boxes, 2):
        assert not a.padded(-0.5).overlaps(b.padded(-0.5))
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 <= box.y1 <= figure.bbox.y1
