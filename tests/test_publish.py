"""Runs are published to a Hub of our own: what arrives there, what never does, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub_server import TOKEN, hub
from support import ROOT, assert_one_line_error, settings_for
from synthetic_records import kept, write_study

import eval as evaluate
import multi_task_training
import retention_eval
import svd_analysis
from config import EMBEDDED_MODEL
from lora_tradeoffs import publish
from lora_tradeoffs.checkpoints import Checkpoint
from lora_tradeoffs.command_line import reason_of
from lora_tradeoffs.files import read_json
from lora_tradeoffs.report.model_card import Published, without_paths
from lora_tradeoffs.tables.scores import drift_table

STUDY = "publish"
RUN = "similar_lora_r4_steps2_limit16_checkpoints1_seed42"


@pytest.fixture(scope="module")
def shared(workspace, tiny):
    """Flags of a study with one run, measured by three analyses; planted: a token, a folder."""
    shared = ["--model", str(tiny), "--study", STUDY]
    train = ["--similar", "--lora", "4", "--limit", "16", "--max-steps", "2"]
    assert multi_task_training.main([*shared, *train, "--set", "checkpoints=1"]) == 0
    few = ["--limit", "4", "--dtype", "fp32"]
    tasks = ["--tasks", "sst2", "--shots", "0", "--splits", "test"]
    assert evaluate.main([*shared, *few, *tasks]) == 0
    retain = ["--tasks", "hellaswag", "--documents", "2"]
    assert retention_eval.main([*shared, *few, *retain]) == 0
    assert svd_analysis.main([*shared, "--no-figures"]) == 0
    return shared


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An empty Hub; huggingface_hub reads its address when it is imported."""
    with hub(tmp_path / "hub") as running:
        template = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 17, 400, 23]])).logits


def test_what_is_published_loads_says_what_was_measured_and_tells_nothing_else(
    shared, served, inside, tiny, tmp_path
):
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    argv = [*shared, "--runs", RUN, "--to", "me/adapter", "--yes"]
    done = inside(publish.main, *argv)
    assert done.returncode == 0, done.stderr
    arrived = served.root / "models" / "me" / "adapter"
    names = {"README.md", "run.json", "adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in arrived.iterdir()} == names
    assert served.private == {"me/adapter"}
    for path in arrived.iterdir():
        content = path.read_bytes()
        for secret in (TOKEN, os.environ["OUTPUT_DIR"], str(tiny), str(Path.home()) + "/"):
            assert secret.encode() not in content, (path.name, secret)

    card = ModelCard.load(arrived / "README.md")
    measured = json.loads(settings_for(study=STUDY).document("adaptation").read_text())["records"]
    expected = {r["metric"]: round(r["value"], 6) for r in measured if r["run"] == RUN}
    found = {r.metric_type: r.metric_value for r in card.data.eval_results if "sst2" in str(r)}
    assert found and found == {metric: expected[metric] for metric in found}
    assert {r.dataset_type for r in card.data.eval_results} == {"nyu-mll/glue", "Rowan/hellaswag"}
    assert card.data.library_name == "peft" and "--similar --adapter lora:4" in card.text

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    folder = settings_for(study=STUDY).runs_dir / RUN / "checkpoint-2"
    expected = logits(PeftModel.from_pretrained(base, folder))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    assert torch.equal(logits(PeftModel.from_pretrained(base, arrived)), expected)

    # from the Hub, the analyses know how the run was trained
    drift = inside(svd_analysis.main, *shared[:2], "--study", "other", "--runs", "me/adapter")
    assert drift.returncode == 0, drift.stderr
    records = json.loads(settings_for(study="other").document("drift").read_text())["records"]
    about = {(r["run"], r["rank"], r["seed"], r["step"], r["fraction"]) for r in records}
    assert about == {("me--adapter", 4, 42, 2, 1.0)}

    merged = inside(publish.main, *argv[:-2], "me/merged", "--merge", "fp32", "--yes")
    assert merged.returncode == 0, merged.stderr
    model = AutoModelForCausalLM.from_pretrained(served.root / "models" / "me" / "merged")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_the_card_has_the_checkpoint_as_it_is(tmp_path):
    """Not with its update scaled, or singular directions shrunk."""
    lost = kept(RUN, "hellaswag", "forgetting", 0.1)
    others = lost | {"update_scale": 0.5}, lost | {"shrunk": "intruders", "shrink": 0.0}
    path = write_study(tmp_path, [*others, lost], "study", script="retention")
    settings = SimpleNamespace(document=lambda name: path)
    published = Published(settings, SimpleNamespace(run=RUN, step=lost["step"]))
    (row,) = published.rows("retention", lambda frame: frame["metric"] == "forgetting")
    assert row.update_scale == 1 and row.value == 0.1


def test_nothing_is_uploaded_without_a_yes_or_to_a_public_repository(shared, served, inside):
    argv = [*shared, "--runs", RUN, "--to", "me/adapter"]
    dry = inside(publish.main, *argv, "--dry-run")
    assert dry.returncode == 0 and "README.md" in dry.stdout and "(private)" in dry.stdout
    assert_one_line_error(inside(publish.main, *argv), "nothing was uploaded", "--yes")
    assert not served.requests
    (served.root / "models" / "me" / "adapter").mkdir(parents=True)
    assert_one_line_error(inside(publish.main, *argv, "--yes"), "me/adapter is public", "--public")
    assert not [line for line in served.requests if "commit" in line]


def test_what_would_tell_a_secret_is_refused(shared, served, inside, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "similar")  # it stands in the card
    argv = [*shared, "--runs", RUN, "--to", "me/adapter", "--yes"]
    refused = inside(publish.main, *argv)
    assert_one_line_error(refused, "would hold HF_TOKEN", "nothing was uploaded")
    assert not served.requests


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--runs", "nothing", "--to", "me/adapter"], ["no run 'nothing'"]),
        (["--runs", RUN, "--to", "adapter"], ["--to 'adapter'", "OWNER/NAME"]),
        (["--runs", RUN, "--to", "me/a", "--checkpoints", "7"], ["no checkpoint 7", "2"]),
        (["--runs", RUN, "--to", "me/a", "--yes"], ["HF_TOKEN"]),
    ],
    ids=["no such run", "no owner", "no such step", "a token that the Hub does not know"],
)
def test_a_wrong_request_is_one_line(shared, served, inside, monkeypatch, flags, parts):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    assert_one_line_error(inside(publish.main, *shared, *flags), *parts)


def test_a_damaged_checkpoint_is_not_published(shared, served, inside):
    runs = settings_for(study=STUDY).runs_dir
    shutil.copytree(runs / RUN, runs / "damaged")
    (runs / "damaged" / "checkpoint-2" / "adapter_model.safetensors").write_bytes(b"half")
    argv = [*shared, "--runs", "damaged", "--to", "me/adapter", "--yes"]
    assert_one_line_error(inside(publish.main, *argv), "adapter_model.safetensors is corrupt")
    assert not served.requests
    shutil.rmtree(runs / "damaged")


@pytest.mark.parametrize(
    ("model", "source", "base"),
    [
        ("me/llama", "me/llama", "me/llama"),
        ("models/mine", "/somewhere/models/mine", None),  # a folder, typed relative to another
        ("/somewhere/mine", "/somewhere/mine", None),
        (EMBEDDED_MODEL, "a file", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ],
)
def test_a_folder_is_not_taken_for_a_repository_of_the_hub(model, source, base):
    published = Published(settings_for(study=STUDY), Checkpoint("run", 2, Path("nowhere")))
    record = {"config": {"model": model}, "base": {"source": source}}
    vars(published)["record"] = without_paths(record)
    assert published.base == base


def test_memory_that_ran_out_is_no_fault_of_foreign_code():
    assert reason_of(ValueError("one\ntwo")) == "ValueError: one"
    with pytest.raises(MemoryError):
        reason_of(MemoryError())


def test_the_page_on_published_adapters_has_the_numbers_of_its_example():
    page = (ROOT / "docs" / "adapter_drift.md").read_text(encoding="utf-8")
    records = read_json(ROOT / "examples" / "published_adapter" / "drift.json")["records"]
    assert {r["run"] for r in records} == {"me--similar-lora-r8", "me--sst2-loraplus-r8"}
    for line in drift_table(records).splitlines():
        assert line.rstrip() in page
