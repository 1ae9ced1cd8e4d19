"""The report: plot_results.ipynb executed on a study, as a single self-contained HTML page.

    python -m lora_tradeoffs.report.html --study NAME
    python -m lora_tradeoffs.report.html --from FOLDER      # of a study that --pack has packed

Writes outputs/<study>/report.html and the tables and figures that it shows. run_study.py ends with
it.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from config import ROOT, Settings, UserError, resolve_settings, typed_path
from lora_tradeoffs.command_line import Parser, add_common_arguments, guarded
from lora_tradeoffs.files import write_text

NOTEBOOK = ROOT / "plot_results.ipynb"
KERNEL = "python3"
# A browser then runs no script and loads nothing, whatever names and values the page shows.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 0 auto; max-width: 60rem;
  padding: 1rem; overflow-wrap: break-word; }}
h1 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
a {{ color: #1a5fb4; }}
.anchor-link, .jp-InputPrompt, .jp-OutputPrompt, .prompt {{ display: none; }}
img {{ max-width: 100%; height: auto; }}
body {{ counter-reset: figure; }}
.caption {{ font-size: .9rem; color: #444; margin: .2rem 0 1.5rem; counter-increment: figure; }}
.caption::before {{ content: "Figure " counter(figure) ". "; font-weight: bold; }}
pre {{ white-space: pre-wrap; font-size: .8rem; background: #f6f6f6; padding: .6rem; }}
.jp-OutputArea-output, .output_area {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }}
td, th {{ padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eee; }}
nav ol {{ columns: 18rem; column-gap: 3rem; font-size: .9rem; }}
@media (max-width: 40rem) {{
  img {{ max-width: none; width: 42rem; }}  /* its text stays legible: the figure scrolls */
}}
@media print {{
  body {{ max-width: none; font-size: 10pt; }}
  .jp-OutputArea-output, .output_area {{ overflow: visible; }}
  h2 {{ break-after: avoid; }}
  .caption {{ break-before: avoid; }}
  img, tr {{ break-inside: avoid; }}
  pre, table {{ font-size: 7pt; }}
}}
</style>
</head>
<body>
{contents}
{body}
</body>
</html>
"""


def execute(settings: Settings, pdf: bool = False) -> Any:
    """The notebook with its outputs. Raises UserError where a cell or the kernel fails.

    With `pdf` it saves its figures as PDF, too.
    """
    import nbformat
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, DeadKernelError

    try:  # the client itself would end in a second error, when the process does
        KernelSpecManager().get_kernel_spec(KERNEL)
    except NoSuchKernel:
        raise UserError(
            f"there is no Jupyter kernel {KERNEL!r} for {NOTEBOOK.name}; pip install ipykernel"
        ) from None
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = f"STUDY, PDF = {settings.study!r}, {pdf}"
    # the kernel looks up everything else as a script does
    variables = {"OUTPUT_DIR": str(settings.output_dir), "PRESET": settings.preset.name}
    variables |= {"TASKS_DIR": str(settings.tasks_dir), "DATA_SOURCE": settings.data}
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name=KERNEL,
        coalesce_streams=True,  # what a cell prints is one output, however it arrived
        extra_arguments=["--IPKernelApp.log_level=40"],
        resources={"metadata": {"path": str(ROOT)}},
    )
    try:
        client.execute(env={**os.environ, **variables})
    except CellExecutionError as error:
        message = (str(error.evalue).strip().splitlines() or [""])[0]
        if error.ename == UserError.__name__:
            raise UserError(message) from None
        raise UserError(f"{NOTEBOOK.name}: {error.ename}: {message}") from None
    except DeadKernelError:
        raise UserError(f"{NOTEBOOK.name}: its kernel died, perhaps for lack of memory") from None
    except (OSError, RuntimeError) as error:
        client.km = client.create_kernel_manager()  # without one its cleaning up at exit fails
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the Jupyter kernel {KERNEL!r} does not start ({message}); see jupyter kernelspec"
            " list, or pip install --force-reinstall ipykernel"
        ) from None
    return notebook


def page(notebook: Any, study: str) -> str:
    """The executed notebook as a page with contents and without code, which loads nothing."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        template_name="basic",
        exclude_input=True,
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    body, _ = exporter.from_notebook_node(notebook)
    headings = re.findall(r'<h2 id="([^"]*)">(.*?)(?:<a class="anchor-link".*?)?</h2>', body, re.S)
    items = (f'<li><a href="#{name}">{text}</a></li>' for name, text in headings)
    contents = f'<nav aria-label="Contents"><ol>{"".join(items)}</ol></nav>'
    heading, rest = body.partition("</h1>")[::2]
    if rest:  # the contents stand below the title
        body, contents = f"{heading}</h1>{contents}{rest}", ""
    title = html.escape(f"{study}: LoRA against full fine-tuning")
    return PAGE.format(policy=POLICY, title=title, contents=contents, body=body)


def write_report(settings: Settings, pdf: bool = False) -> Path:
    """Execute the notebook on the study and write report.html; its path."""
    path = settings.output_dir / "outputs" / settings.study / "report.html"
    write_text(path, page(execute(settings, pdf), settings.study))
    return path


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Write the report of a study from what the scripts measured.")
    add_common_arguments(parser)
    text = "report on the packed studies in FOLDER, and read nothing else (--study NAME: on one)"
    parser.add_argument("--from", dest="packed", metavar="FOLDER", help=text)
    text = "copy what the report is made of to FOLDER, a few MB, and write the report there"
    parser.add_argument("--pack", metavar="FOLDER", help=text)
    parser.add_argument("--pdf", action="store_true", help="also save figures as PDF")
    return parser


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    from lora_tradeoffs.report.pack import pack, packed_settings

    if args.packed:
        studies = packed_settings(typed_path(args.packed, "--from").resolve(), args.study)
    else:
        studies = [resolve_settings(args)]  # the preset and model of a study stand in its records
        print(f"study {studies[0].study} in {studies[0].output_dir}", flush=True)
    if args.pack:
        folder = typed_path(args.pack, "--pack").resolve()
        for settings in studies:
            pack(settings, folder)
        studies = [packed_settings(folder, settings.study)[0] for settings in studies]
        print(f"packed: {folder}", flush=True)
    for settings in studies:
        print(f"report: {write_report(settings, args.pdf)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
