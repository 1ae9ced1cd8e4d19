"""The report: one page that needs nothing else, in a real browser."""

import html
import json
import math
import re
import shutil
import subprocess
from unittest.mock import Mock

import nbformat
import pandas as pd
import pytest
from support import assert_one_line_error
from synthetic_drift import write_drift
from synthetic_effects import write_run
from synthetic_records import retention_study, study, write_study

from lora_tradeoffs.report import html as report
from lora_tradeoffs.report.findings import as_markdown
from lora_tradeoffs.report.notebook import StudyReport
from lora_tradeoffs.report.wording import MISSING, Finding

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

REPORT = ("-m", "lora_tradeoffs.report.html")


RAN = "document.documentElement.dataset.ran=1"
IMAGE, SVG, SCRIPT = f"<img src=x onerror={RAN}>", f"<svg onload={RAN}>", f"<script>{RAN}</script>"
HOSTILE = {  # in run.json: every text, and a list and an object where any value may stand
    "base": {"name": SCRIPT, "digest": SVG},
    "config": {
        **{"family": SVG, "tasks": [IMAGE], "method": IMAGE, "rank": 4, "alpha": 8},
        **{"scaling": SVG, "target_modules": SCRIPT, "learning_rate": 1e-3, "seed": 42},
        "lora_dropout": {IMAGE: [SCRIPT]},
    },
    "environment": {"device_name": SCRIPT, "versions": {"torch": [[IMAGE]]}},
    "own": {"families": {SVG: ["sst2"]}, "tasks": {}},
    "note": SVG,
}


@pytest.fixture(scope="module")
def page(workspace, tmp_path_factory):
    """The report of a made-up study with hostile names and values, and where it is."""
    folder = tmp_path_factory.mktemp("report")
    grid, families, seeds = [("lora", 8), ("full", 0)], ("similar",), (42, 43, 44)
    for script, make in (("adaptation", study), ("retention", retention_study)):
        records = make(grid=grid, points=2, families=families, seeds=seeds)
        for r in records:
            r["run"] = r["run"].replace("_seed", f"_{SVG}$x^$_seed")
            if r["seed"] == 44 and r["method"] == "lora":
                r |= {"run": IMAGE, "target_modules": SVG}  # as of an adapter from elsewhere
            r["base_model"] = SCRIPT
        write_study(folder, records, script=script, preset="study")
    write_drift(folder, grid, families=families, points=2)
    config = {"family": "similar", "method": "lora", "rank": 8, "seed": 42}
    write_run(folder / "models" / "demo", f"similar_lora_r8_{SVG}$x^$_seed42", config)
    (run := folder / "models" / "demo" / IMAGE).mkdir()
    (run / "run.json").write_text(json.dumps(HOSTILE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUT_DIR", str(folder))
        patch.setenv("PRESET", "demo")
        # the report of the packed study has all figures of the study itself
        packed = folder / "packed"
        assert report.main(["--preset", "demo", "--study", "demo", "--pack", str(packed)]) == 0
    path = packed / "outputs" / "demo" / "report.html"
    return path.read_text(encoding="utf-8"), path


def in_browser(text, folder, *options):
    """The page's DOM, and what the browser printed. Skips without a browser."""
    if BROWSER is None:
        pytest.skip("no Chromium")
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *options)
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}")
    process = subprocess.run(
        [BROWSER, *options, *offline, "--window-size=390,800", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.stdout, process.stderr


def test_the_page_fetches_nothing_and_hides_the_code(page):
    text, _ = page
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert "STUDY =" not in text and "resolve_settings" not in text
    assert text.count("data:image/png;base64,") >= 12


def test_the_contents_lead_to_every_heading(page):
    text, _ = page
    listed = re.findall(r'<li><a href="#([^"]+)">', text)
    assert listed == re.findall(r'<h2 id="([^"]+)"', text) and len(listed) > 8
    assert text.index("<h1") < text.index("<nav") < text.index("<h2")


def test_every_figure_says_what_it_is(page):
    text, _ = page
    images = re.findall(r"<img [^>]*>", text)
    alternatives = [re.search(r'alt="([^"]*)"', image) for image in images]
    assert all(found and len(found[1]) > 10 for found in alternatives)
    assert not any("No description" in found[1] for found in alternatives)
    captions = re.findall(r'<p class="caption">(.*?)</p>', text)
    assert captions == [found[1] for found in alternatives]


def test_a_browser_shows_every_figure_without_an_error(page, tmp_path):
    text, _ = page
    count = (
        "<script>window.onload = () => { const all = [...document.images];"
        " document.title = `${all.filter(i => i.naturalWidth > 100).length} of ${all.length}"
        " wide ${document.documentElement.scrollWidth <= window.innerWidth}`; }</script>"
    )
    dom, log = in_browser(without_policy(text).replace("</body>", count + "</body>"), tmp_path)
    title = re.search(r"<title>(\d+) of (\d+) wide (\w+)</title>", dom)
    assert title and title[1] == title[2] == str(text.count("<img ")), log[-2000:]
    assert title[3] == "true"  # nothing is wider than a phone
    assert "CONSOLE" not in log


def without_policy(text):
    return re.sub(r"<meta http-equiv[^>]*>", "", text)


def test_a_browser_runs_nothing_of_hostile_names_and_values(page, tmp_path):
    text, _ = page
    for payload in (IMAGE, SVG, SCRIPT):
        assert html.escape(payload) in text and payload not in text
    ran = re.compile(r"<html[^>]*data-ran")
    assert not ran.search(in_browser(without_policy(text), tmp_path)[0])  # escaped: shown as text
    attacked = text.replace("<nav", f"{SCRIPT}{IMAGE}<nav")
    assert ran.search(in_browser(without_policy(attacked), tmp_path)[0])
    dom, log = in_browser(attacked, tmp_path)  # what would not be escaped may not run
    assert not ran.search(dom) and "Content Security Policy" in log


def test_markdown_takes_no_markup_from_a_sentence():
    sentence = f"LoRA r=8 ({IMAGE}) {SCRIPT} [a](javascript:{RAN}) `b` **c** $x^$ &lt; p < .05"
    markdown = as_markdown([Finding(MISSING, "", sentence)])
    output = nbformat.v4.new_output("display_data", {"text/markdown": markdown})
    cell = nbformat.v4.new_code_cell(outputs=[output])
    text = report.page(nbformat.v4.new_notebook(cells=[cell]), "demo")
    assert f"<li>{html.escape(sentence)}</li>" in text


def test_a_study_without_results_still_has_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    assert report.main(["--preset", "demo", "--study", "empty"]) == 0
    text = (tmp_path / "outputs" / "empty" / "report.html").read_text(encoding="utf-8")
    assert "python eval.py --study empty" in text and "<img " not in text


BROKEN_KERNEL = (
    "import sys; from lora_tradeoffs.report import html as report;"
    " report.KERNEL = sys.argv[1]; sys.exit(report.main(sys.argv[2:]))"
)


@pytest.mark.parametrize("kernel, said", [("no-such", "no Jupyter kernel"), ("dead", "not start")])
def test_a_kernel_that_is_missing_or_broken_is_one_line(script, tmp_path, kernel, said):
    folder = tmp_path / "kernels" / "dead"
    folder.mkdir(parents=True)
    spec = {"argv": ["false", "{connection_file}"], "display_name": "dead", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    command = ("-c", BROKEN_KERNEL, kernel, "--preset", "demo", "--study", "kernelless")
    process = script(*command, JUPYTER_PATH=str(tmp_path))
    assert_one_line_error(process, said, "ipykernel")


def test_a_results_file_that_was_edited_is_one_line_that_names_it(script, tmp_path):
    path = write_study(tmp_path, study(grid=[("lora", 8)], points=1, families=("similar",)))
    document = json.loads(path.read_text())
    document["records"][5]["value"] = "NaN"
    path.write_text(json.dumps(document))
    process = script(
        "-m", "lora_tradeoffs.report.html", "--study", "demo", OUTPUT_DIR=str(tmp_path)
    )
    assert_one_line_error(process, str(path), "records.5.value is 'NaN'", "eval.py --study demo")


def test_small_and_large_numbers_of_a_table_keep_their_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr("IPython.display.display", shown := Mock())
    rows = pd.DataFrame({"rate": [4.9e-5] * 100, "n": 7, "x": [math.nan, 123456.0] * 50})
    StudyReport("demo").table("rates", rows)
    text = shown.call_args.args[0].to_html()
    assert text.count(">4.9e-05<") == 100 and text.count(">123,456<") == 50 and "nan" not in text
    assert len((tmp_path / "outputs/demo/tables/rates.csv").read_text().splitlines()) == 101


def test_a_table_says_once_what_all_runs_share(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr("IPython.display.display", display := Mock())
    records = study(grid=[("lora", 8), ("full", 0)], points=1, families=("similar",))
    for r in records:
        r["run"] = r["run"].replace("_seed", "_steps40_seed")
    write_study(tmp_path, records)
    report = StudyReport("demo")
    means = report.study.adaptation.groupby("arm")["value"].mean()
    for name, rows, index in (("by", means.to_frame(), True), ("in", means.reset_index(), False)):
        display.reset_mock()
        report.table(name, rows, index)
        shown, note = (call.args[0] for call in display.call_args_list)
        assert "steps40" not in shown.to_html() and ">LoRA r=8<" in shown.to_html()
        assert "All runs: steps40 (" in note.data
        saved = (tmp_path / f"outputs/demo/tables/{name}.csv").read_text()
        assert "LoRA r=8 (steps40)" in saved


def test_wrong_arguments_are_one_line(script):
    assert_one_line_error(script(*REPORT, "--study", "../up"), "study", "allowed")
