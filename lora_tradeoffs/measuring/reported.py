"""What the analyses tell the trackers of the study's runs: every checkpoint's scores, by step."""

from __future__ import annotations

import sys
from pathlib import Path

from config import INTRUDER_EPSILON, INTRUDER_K, Settings, UserError
from lora_tradeoffs.command_line import reason_of
from lora_tradeoffs.files import json_digest, locked, read_json, read_records, write_json
from lora_tradeoffs.records import OVERALL, Record, run_configs


def curve_name(analysis: str, r: Record) -> str:
    """The name of the curve that a record is a point of; "" of what is none.

    A curve is over the steps of a run: of the checkpoint as it is, not of a layer, of drift at the
    published k and epsilon. Trackers show what begins with eval_ beside Trainer's validation.
    """
    is_point = (
        r["value"] is not None
        and r["step"] > 0
        and r.get("layer", OVERALL) == OVERALL
        and r.get("k") in (None, INTRUDER_K)
        and r.get("eps") in (None, INTRUDER_EPSILON)
        and r.get("update_scale", 1) == 1
        and not {"shrunk", "other_run", "other_step"} & r.keys()
    )
    if not is_point:
        return ""
    pair = "+".join(dict.fromkeys(filter(None, (r.get("task"), r.get("other")))))
    parts = [analysis, r.get("split"), pair, *map(r.get, ("module", "of", "side", "metric"))]
    parts += [f"{word}{r[word]}" for word in ("shots", "prompt") if r.get(word)]
    return "eval_" + "/".join(filter(None, parts))


def report_scores(settings: Settings, analysis: str, document: Path) -> None:
    """Send what is new of the runs to the trackers that their training reported to.

    `logs/<study>/<run>/sent_<analysis>.json` has the digests, by step, of what was sent. A tracker
    that fails is a warning: the next start of the analysis tries again.
    """
    configs = run_configs(settings.runs_dir)
    trackers = {run: config.get("report_to", "none") for run, config in configs.items()}
    trackers = {run: report_to for run, report_to in trackers.items() if report_to != "none"}
    of_runs: dict[str, dict[int, dict[str, float]]] = {}
    for record in read_records(document) if trackers else ():
        if record["run"] in trackers and (name := curve_name(analysis, record)):
            by_step = of_runs.setdefault(record["run"], {})
            by_step.setdefault(record["step"], {})[name] = record["value"]
    if of_runs:
        with locked(settings.logs_dir / f".{analysis}.lock"):
            for run, by_step in of_runs.items():
                _report_run(settings, analysis, run, trackers[run], by_step)


def _report_run(
    settings: Settings,
    analysis: str,
    run: str,
    report_to: str,
    by_step: dict[int, dict[str, float]],
) -> None:
    logs = settings.logs_dir / run
    path = logs / f"sent_{analysis}.json"
    sent = read_json(path, {"*": str}) if path.is_file() else {}
    digests = {str(step): json_digest(values) for step, values in by_step.items()}
    news = {step: v for step, v in by_step.items() if digests[str(step)] != sent.get(str(step))}
    if not news:
        return
    from lora_tradeoffs.trackers import send, tracker_names

    try:
        if not tracker_names(report_to):
            return
        send(report_to, settings.study, run, logs, news)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else reason_of(error)
        print(f"warning: {run}: {analysis} was not sent to its trackers: {reason}", file=sys.stderr)
    else:
        write_json(path, sent | digests)
