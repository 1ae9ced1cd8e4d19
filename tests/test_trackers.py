"""What trackers hold of a run, read back from their files: training curves and every checkpoint's
scores, by step; never a secret."""

import pytest
from support import assert_one_line_error, settings_for
from synthetic_effects import CONFIG, write_run
from synthetic_records import record, write_study

import eval as evaluate
import multi_task_training
import svd_analysis
from config import UserError
from lora_tradeoffs import trackers
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.reported import curve_name, report_scores

RUN = "sst2_lora_r4_steps2_bs2_limit16_fp32_checkpoints2_evalexamplespertask2_seed42"
TRAIN = ["--tasks", "sst2", "--lora", "4", "--limit", "16", "--max-steps", "2", "--dtype", "fp32"]
SMALL = ["checkpoints=2", "eval_examples_per_task=2", "batch_size=2", "logging_steps=1"]
SECRET = "hf_planted_secret"


def of_tensorboard(folder, study):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(settings_for(study=study).logs_dir / RUN)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def of_trackio(folder, study):
    from trackio.sqlite_storage import SQLiteStorage

    curves = {}
    for logged in SQLiteStorage.get_logs(study, RUN):
        for name, value in logged.items():
            curves.setdefault(name, {})[logged["train/global_step"]] = value
    return curves


def of_mlflow(folder, study):
    from mlflow import MlflowClient

    client, curves = MlflowClient(), {}
    experiment = client.get_experiment_by_name(study)
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.run_name == RUN and run.data.tags["arm"] == RUN.removesuffix("_seed42")
        for name in run.data.metrics:
            points = curves.setdefault(name.replace("eval_", "eval/", 1), {})
            points |= {p.step: p.value for p in client.get_metric_history(run.info.run_id, name)}
    return curves | {"train/loss": curves["loss"]}


READERS = {"tensorboard": of_tensorboard, "trackio": of_trackio, "mlflow": of_mlflow}


@pytest.mark.parametrize("report_to", ["tensorboard", "tensorboard,trackio", "mlflow"])
def test_a_tracker_has_the_curves_and_every_checkpoints_scores(
    workspace, tiny, tmp_path, monkeypatch, report_to
):
    names, study = report_to.split(","), report_to.replace(",", "-")
    for name in names:
        pytest.importorskip(name)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    shared = ["--model", str(tiny), "--study", study]
    values = [*SMALL, f"report_to={report_to}"]
    assert multi_task_training.main([*shared, *TRAIN, "--set", *values]) == 0
    few = ["--limit", "4", "--dtype", "fp32", "--tasks", "sst2", "--shots", "0", "--no-figures"]
    assert evaluate.main([*shared, *few, "--splits", "validation"]) == 0
    assert svd_analysis.main([*shared, "--no-figures"]) == 0

    settings = settings_for(study=study)
    expected = {}
    for analysis in ("adaptation", "drift"):
        for r in read_json(settings.document(analysis))["records"]:
            if r["run"] == RUN and (name := curve_name(analysis, r)):
                expected.setdefault(name.replace("_", "/", 1), {})[r["step"]] = r["value"]
    assert len(expected) > 20
    assert {*expected["eval/adaptation/validation/sst2/accuracy"]} == {1, 2}
    training = read_json(settings.runs_dir / RUN / "training.json")
    for name in names:
        curves = READERS[name](tmp_path, study)
        losses = [entry["loss"] for entry in training["loss_curve"]]
        assert [*curves["train/loss"].values()] == pytest.approx(losses)
        for curve, points in expected.items():
            assert curves[curve] == pytest.approx(points), curve
    folders = settings.logs_dir, tmp_path
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert files and not [p for p in files if SECRET.encode() in p.read_bytes()]
    assert not [
        p for p in files if str(workspace).encode() in p.read_bytes() and "events" in p.name
    ]


@pytest.mark.parametrize(
    "report_to, part",
    [
        ("clearml", "clearml is not installed; pip install clearml"),
        ("tensorboard,clearml", "clearml is not installed"),
        ("tensorbord", "'tensorbord' is none of azure_ml"),
    ],
)
def test_a_tracker_that_is_missing_or_unknown_is_one_line(inside, tiny, report_to, part):
    argv = ["--model", str(tiny), "--study", "missing", *TRAIN, "--set", f"report_to={report_to}"]
    assert_one_line_error(inside(multi_task_training.main, *argv), "report_to: ", part)
    assert not settings_for(study="missing").runs_dir.exists()


def test_what_a_tracker_did_not_take_is_sent_by_the_next_start(workspace, monkeypatch, capsys):
    settings = settings_for(study="refused")
    config = CONFIG | {"report_to": "tensorboard", "tasks": ["sst2"]}
    write_run(settings.runs_dir, RUN, config, checkpoints=(1, 2))
    points = [record(RUN, "sst2", value, step=step) for step, value in ((1, 0.25), (2, 0.5))]
    points.append(record("from elsewhere", "sst2", 0.1))
    path = write_study(settings.output_dir, points, study="refused")

    def refuse(*_, **__):
        raise ConnectionError("no network\nat all")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.integrations.TensorBoardCallback.on_log", refuse)
        report_scores(settings, "adaptation", path)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and f"warning: {RUN}: adaptation was not sent" in warning
    assert "ConnectionError: no network" in warning
    for values in (points, points, [*points, record(RUN, "mnli", 0.75, step=2)]):
        write_study(settings.output_dir, values, study="refused")
        report_scores(settings, "adaptation", path)
        curves = of_tensorboard(None, "refused")
        assert curves["eval/adaptation/validation/sst2/accuracy"] == {1: 0.25, 2: 0.5}
        events = [*settings.logs_dir.glob("*/events*")]
        assert {path.parent.name for path in events} == {RUN}
        assert len(events) == (2 if len(values) > len(points) else 1)  # nothing is sent twice
    assert curves["eval/adaptation/validation/mnli/accuracy"] == {2: 0.75}
    assert capsys.readouterr().err == ""


def test_without_tensorboard_the_default_is_no_tracker(monkeypatch):
    monkeypatch.setattr(trackers, "get_available_reporting_integrations", lambda: ["mlflow"])
    assert trackers.tracker_names("tensorboard") == []
    assert trackers.tracker_names("mlflow") == ["mlflow"]
    for asked_for in ("trackio", "tensorboard,mlflow"):
        with pytest.raises(UserError, match="is not installed; pip install"):
            trackers.tracker_names(asked_for)
