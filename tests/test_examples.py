"""The study in examples/ can be read and drawn by the code beside it."""

import pytest
from figure_checks import drawn
from support import ROOT

from lora_tradeoffs.figures.adaptation import learning_curves
from lora_tradeoffs.figures.retention import learning_forgetting_plane
from lora_tradeoffs.figures.style import save
from lora_tradeoffs.tables.frames import is_trained, load_records

EXAMPLE = ROOT / "examples" / "real_rows"
KINDS = {"LoRA r=4", "LoRA r=8", "LoRA r=64", "full", "full qv"}


@pytest.mark.parametrize("name", ["adaptation", "retention", "drift", "gradients"])
def test_the_example_holds_every_arm(name):
    records = load_records(EXAMPLE / f"{name}.json")
    assert {arm.kind for arm in records["arm"][is_trained(records)]} == KINDS


def test_the_example_names_no_place_of_the_machine_that_made_it():
    for path in EXAMPLE.rglob("*.json"):
        assert '"/' not in path.read_text(encoding="utf-8"), path


def test_the_example_is_drawn(tmp_path):
    adaptation, retention = (
        load_records(EXAMPLE / f"{name}.json") for name in ("adaptation", "retention")
    )
    study = {"adaptation": adaptation, "retention": retention}
    figures = drawn(learning_curves, **study), drawn(learning_forgetting_plane, **study)
    for number, figure in enumerate(figures):
        assert save(figure, tmp_path / f"{number}.png").stat().st_size > 4000
