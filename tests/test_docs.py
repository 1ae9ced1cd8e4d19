"""README keeps the user's headings and commands; every link in the docs leads somewhere."""

import re

import pytest
from support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HEADINGS = (
    *("Project Overview", "Key Features", "Project Structure", "Tasks and Metrics"),
    *("Similar Tasks (Classification)", "Dissimilar Tasks (Generation)", "Analysis Components"),
    *("Performance Analysis", "SVD Analysis", "Setup and Installation", "Usage", "Training"),
    *("Analysis", "Model Configurations", "Acknowledgments", "License"),
)
COMMANDS = (
    "python multi_task_training.py --similar --lora 8  # Use LoRA with rank 8",
    "python multi_task_training.py --similar --full-finetune  # Use full fine-tuning",
    "python multi_task_training.py --dissimilar --lora 8",
    "python multi_task_training.py --dissimilar --full-finetune",
    "python eval.py",
    "python svd_analysis.py",
)


def text_of(page):
    return page.read_text(encoding="utf-8")


def anchors(page):
    """The anchors that a page's headings make, as GitHub and Jupyter do."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}


def test_readme_has_the_headings_in_their_order_and_the_commands():
    text = text_of(ROOT / "README.md")
    headings = [h for h in re.findall(r"^#+ (.*)$", text, re.M) if h in HEADINGS]
    assert tuple(headings) == HEADINGS
    assert all(command in text for command in COMMANDS)
    assert len(text.splitlines()) <= 240


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_prose_is_at_most_120_characters_wide(page):
    wide = [line for line in text_of(page).splitlines() if len(line) > 120]
    assert all(line.startswith("|") for line in wide), wide
