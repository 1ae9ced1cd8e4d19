"""The report: one page that needs nothing else, in a real browser."""

import re
import shutil
import subprocess

import pytest
from conftest import assert_one_line_error
from synthetic_drift import write_drift
from synthetic_records import retention_study, study, write_study

import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="module")
def page(workspace, tmp_path_factory):
    """The report of a made-up study, and the folder that it lies in."""
    folder = tmp_path_factory.mktemp("report")
    grid = [("lora", 8), ("full", 0)]
    write_study(folder, study(grid=grid, points=2, families=("similar",)))
    write_study(
        folder, retention_study(grid=grid, points=2, families=("similar",)), script="retention"
    )
    write_drift(folder, grid, families=("similar",), points=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTPUT_DIR", str(folder))
        patch.setenv("PRESET", "demo")
        assert report.main(["--preset", "demo", "--study", "demo"]) == 0
    path = folder / "outputs" / "demo" / "report.html"
    return path.read_text(encoding="utf-8"), path


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


def test_a_browser_shows_every_figure_without_an_error(page, tmp_path):
    if BROWSER is None:
        pytest.skip("no Chromium")
    text, _ = page
    count = (
        "<script>window.onload = () => { const all = [...document.images];"
        " document.title = `${all.filter(i => i.naturalWidth > 100).length} of ${all.length}"
        " wide ${document.documentElement.scrollWidth <= window.innerWidth}`; }</script>"
    )
    counted = tmp_path / "report.html"
    counted.write_text(text.replace("</body>", count + "</body>"), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}")
    found = subprocess.run(
        [BROWSER, *options, *offline, "--window-size=390,800", "--dump-dom", counted.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(\d+) of (\d+) wide (\w+)</title>", found.stdout)
    assert title and title[1] == title[2] == str(text.count("<img ")), found.stderr[-2000:]
    assert title[3] == "true"  # nothing is wider than a phone
    assert "CONSOLE" not in found.stderr


def test_a_study_without_results_still_has_a_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    assert report.main(["--preset", "demo", "--study", "empty"]) == 0
    text = (tmp_path / "outputs" / "empty" / "report.html").read_text(encoding="utf-8")
    assert "python eval.py --study empty" in text and "<img " not in text


def test_a_missing_kernel_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "KERNEL", "no-such-kernel")
    assert report.main(["--preset", "demo", "--study", "kernelless"]) == 2
    assert "pip install ipykernel" in capsys.readouterr().err


def test_wrong_arguments_are_one_line(script):
    assert_one_line_error(script("report.py", "--study", "../up"), "study", "allowed")
