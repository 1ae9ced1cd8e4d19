"""Results documents that were edited or cut: read, or refused in one line that names them."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ends_or_refuses
from synthetic_records import retention_study, study

from lora_tradeoffs.tables.frames import gaps, load_records, score_table
from lora_tradeoffs.tables.retention import retention_gaps

GRID = [("lora", 8), ("full", 0)]
META = {"study": "demo", "base_model": "made-up", "preset": "demo"}
DOCUMENTS = {
    "adaptation": {"meta": META, "records": study(grid=GRID, points=1, families=("similar",))},
    "retention": {
        "meta": META,
        "records": retention_study(grid=GRID, points=1, families=("similar",))[:40],
    },
}
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [10**400, -(2**63) - 1, math.inf, "", "NaN", "lora", "similar", "mnli", "$^$"]
    )
    | st.text(st.characters(exclude_categories=()), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def damaged(draw):
    """The name of an analysis, and its document with a few values changed or bytes lost."""
    name = draw(st.sampled_from([*DOCUMENTS]))
    document = json.loads(json.dumps(DOCUMENTS[name]))
    for _ in range(draw(st.integers(0, 3))):
        part = draw(st.sampled_from([document["meta"], *document["records"]]))
        key = draw(st.sampled_from([*part, "preset", "record_version"]))
        if draw(st.booleans()):
            part.pop(key, None)
        else:
            part[key] = draw(VALUES)
    text = json.dumps(document).encode()
    if draw(st.integers(0, 9)) == 0:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.binary(max_size=2)) + text[at + draw(st.integers(0, 2)) :]
    return name, text


@pytest.mark.fuzz
@given(damaged())
def test_any_document_is_read_or_named(workspace, example):
    name, content = example
    path = workspace / f"{name}.json"
    path.write_bytes(content)
    with ends_or_refuses() as lines:
        frame = load_records(path)
        score_table(frame)
        gaps(frame) if name == "adaptation" else retention_gaps(frame, None)
    if lines:
        assert str(path) in lines[0]


@pytest.mark.parametrize(
    "damage",
    [{"meta": META | {"preset": []}}, {"records": [{"tasks": {}}]}, {"records": [{"variant": {}}]}]
    + [{"records": [{name: 10**400}]} for name in ("learning_rate", "step", "value")]
    + [{"records": [{"task": None}]}],
    ids=str,
)
def test_what_no_script_writes_is_one_line(workspace, damage):
    document = json.loads(json.dumps(DOCUMENTS["adaptation"]))
    document["meta"] = damage.get("meta", META)
    for record, changes in zip(document["records"], damage.get("records", ())):
        record.update(changes)
    path = workspace / "adaptation.json"
    path.write_text(json.dumps(document))
    with ends_or_refuses() as lines:
        load_records(path)
    assert lines and str(path) in lines[0]
