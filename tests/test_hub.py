"""Models and data sets come over HTTP from a Hub of our own, to scripts in their own processes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import TOKEN, hub

from config import BENCHMARKS, UserError
from lora_tradeoffs.hub import fetch_checkpoints

ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
WORDS = ("a", "good", "film", "negative", "positive")


# ------------------------------------------------------------------------ what the Hub holds


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The running Hub, with models of study/ and the data set nyu-mll/glue."""
    root = tmp_path_factory.mktemp("hub")
    models = root / "models" / "study"
    make_tiny_llama(models / "tiny-llama")
    (models / "tiny-llama" / "pytorch_model.bin").write_bytes(b"a pickle that nobody may load")
    shutil.copytree(models / "tiny-llama", models / "gated")
    shutil.copytree(models / "tiny-llama", models / "pickled")
    (models / "pickled" / "model.safetensors").unlink()
    shutil.copytree(models / "tiny-llama", models / "gpt2")
    gpt2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_layer": 2}
    (models / "gpt2" / "config.json").write_text(json.dumps(gpt2 | {"n_head": 2}))
    make_adapters(models / "tiny-llama", models / "adapters")
    make_glue(root / "datasets" / "nyu-mll" / "glue")
    shutil.copytree(root / "datasets" / "nyu-mll" / "glue", root / "datasets" / "study" / "gated")
    with hub(root, gated={"study/gated"}) as running:
        yield running


def make_tiny_llama(folder):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    words = {word: number for number, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def glue_rows():
    """SST-2's train and official validation: sentences with phrases of theirs, and some faults."""
    phrases = []
    for number in range(50):
        words = f"after {number} minutes film {number} has lost every one of its viewers".split()
        phrases += [words, words[:6], words[3:10], words[:2]]
    train = [" ".join(words) + " " for words in phrases]
    test = [f"critic {number} liked what the others did not" for number in range(30)]
    train += ["  ", ""]  # broken
    train += [test[0] + " ", test[1], test[1]]  # also in test
    labels = [*(number % 2 for number in range(len(test))), -1]  # the last one's is hidden
    return (
        [{"sentence": text, "label": len(text) % 2, "idx": i} for i, text in enumerate(train)],
        [
            {"sentence": text, "label": label, "idx": i}
            for i, (text, label) in enumerate(zip([*test, "whose label is hidden"], labels))
        ],
    )


def make_glue(folder):
    """Laid out as nyu-mll/glue is: a card that names each configuration's parquet files."""
    import pyarrow
    from pyarrow import parquet

    train, validation = glue_rows()
    for name, rows in {
        "cola/train": train[:1],
        "sst2/train": train,
        "sst2/validation": validation,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(
            pyarrow.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet"
        )
    (folder / "README.md").write_text(GLUE_CARD)


GLUE_CARD = """\
---
dataset_info:
- config_name: sst2
  features:
  - name: sentence
    dtype: string
  - name: label
    dtype:
      class_label:
        names:
          '0': negative
          '1': positive
  - name: idx
    dtype: int32
configs:
- config_name: cola
  data_files:
  - split: train
    path: cola/train-*
- config_name: sst2
  data_files:
  - split: train
    path: sst2/train-*
  - split: validation
    path: sst2/validation-*
---
# GLUE
"""


# ------------------------------------------------------------------------------ processes


def python(code, folder, endpoint, **variables):
    """Run code in a process of its own, which writes below `folder` and sees that Hub alone."""
    environment = {k: os.environ[k] for k in ("PATH", "HOME", "LD_LIBRARY_PATH") if k in os.environ}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "OUTPUT_DIR": str(folder / "out"),
        "DATA_DIR": str(folder / "data"),
        "OMP_NUM_THREADS": "1",
        "PRESET": "demo",
    }
    return subprocess.run(
        [sys.executable, "-c", "import config; config._env_file = dict\n" + code],
        env=environment | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def train(command):
    """Code that does `python multi_task_training.py --similar --lora 2 --model <command>`."""
    flags = ["--similar", "--lora", "2", "--model", *command.split()]
    return f"import sys, multi_task_training; sys.exit(multi_task_training.main({flags}))"


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


# --------------------------------------------------------------------------------- models


PREPARE = """
import argparse, json
from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base
base = prepare_base(config.resolve_settings(argparse.Namespace(model="study/tiny-llama")))
"""
COMPARE = """
import torch
from safetensors.torch import load_file
weights = load_base(base).state_dict()
original = load_file({path!r})
assert all(torch.equal(weights.pop(name), tensor) for name, tensor in original.items())
assert not weights
assert load_tokenizer(base)("a good film </s>").input_ids == {ids!r}
"""


def test_a_model_is_planned_from_its_config_downloaded_once_and_then_needs_no_hub(served, tmp_path):
    """A bare model name is a repository of HF_USERNAME; pickles stay on the Hub."""
    repository = served.root / "models" / "study" / "tiny-llama"
    begin = len(served.requests)
    planned = python(train("tiny-llama --dry-run"), tmp_path, served.url, HF_USERNAME="study")
    assert planned.returncode == 0, planned.stderr
    assert "model study/tiny-llama (--model)" in planned.stdout
    fetched = {line.rpartition("/")[2] for line in served.requests[begin:] if "/resolve/" in line}
    assert fetched == {"config.json"}
    assert not files_below(tmp_path / "out")

    weights = repository / "model.safetensors"
    ids = [3, 4, 5, 2]
    code = PREPARE + COMPARE.format(path=str(weights), ids=ids)
    downloaded = python(code, tmp_path, served.url)
    assert downloaded.returncode == 0, downloaded.stderr
    base = tmp_path / "out" / "models" / "base" / "study--tiny-llama"
    assert (base / "model.safetensors").read_bytes() == weights.read_bytes()
    assert not [path for path in files_below(tmp_path / "out") if path.suffix == ".bin"]
    assert not [line for line in served.requests if "pytorch_model.bin" in line]
    record = json.loads((base / "base.json").read_text())
    assert record["source"] == "study/tiny-llama"
    assert record["revision"] == served.commit("models/study/tiny-llama")
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["files"]["model.safetensors"]["sha256"] == sha256
    assert {"config.json", "tokenizer.json"} < set(record["files"])
    hashes = "".join(record["files"][name]["sha256"] for name in sorted(record["files"]))
    assert record["digest"] == hashlib.sha256(hashes.encode()).hexdigest()

    before = list(served.requests)
    again = python(PREPARE + "print(base.digest)", tmp_path, served.url)
    assert again.stdout.strip() == record["digest"], again.stderr
    assert served.requests == before


def make_adapters(base, folder):
    """A repository with two checkpoints of an adapter, and a pickle."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    config.init_lora_weights = False
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for step in (4, 8):
        model.save_pretrained(folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"nobody may load it")


EVALUATE = """
import eval
flags = "--runs {run} --model study/tiny-llama --data sample --tasks sst2 --limit 4 --shots 0"
code = eval.main(flags.split())
assert code == 0, code
"""


@pytest.mark.slow
def test_checkpoints_in_a_repository_are_evaluated(served, tmp_path):
    done = python(EVALUATE.format(run="study/adapters"), tmp_path, served.url)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "out" / "performance_analysis" / "demo" / "adaptation.json"
    records = [r for r in json.loads(path.read_text())["records"] if r["method"] == "lora"]
    assert {r["run"] for r in records} == {"study--adapters"}
    assert {r["step"] for r in records} == {4, 8} and {r["rank"] for r in records} == {2}
    assert not [line for line in served.requests if "optimizer.pt" in line]
    missing = python(EVALUATE.format(run="study/nothing"), tmp_path, served.url)
    assert missing.stderr.count("error: run study/nothing (--runs) is not on the Hub") == 1


@pytest.mark.parametrize("name", ["é/é", f"study/{'x' * 200}", "study/a--b"])
def test_a_run_that_no_repository_can_be_called_is_one_line(name):
    with pytest.raises(UserError, match="neither a folder nor a Hub id"):
        fetch_checkpoints(name)


DRY_RUN_AND_DATA = """
import data_preprocessing, multi_task_training
assert multi_task_training.main("--similar --lora 2 --model study/gated --dry-run".split()) == 0
flags = "sst2 --data sample --limit 8 --model study/gated"
assert data_preprocessing.main(flags.split()) == 0
"""


def test_a_token_opens_a_gated_model_and_is_written_nowhere(served, tmp_path):
    done = python(DRY_RUN_AND_DATA, tmp_path, served.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    written = files_below(tmp_path / "out") + files_below(tmp_path / "data")
    assert {"base.json", "report.json"} <= {path.name for path in written}
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]


REFUSED = {
    "a gated model without a token": (
        "study/gated --dry-run",
        {},
        ("gated", "https://huggingface.co/study/gated ", "HF_TOKEN"),
    ),
    "a token that has expired": (
        "study/tiny-llama --dry-run",
        {"HF_TOKEN": "hf_expired"},
        ("does not know HF_TOKEN", "https://huggingface.co/settings/tokens"),
    ),
    "a token that is not ASCII": (
        "study/tiny-llama",
        {"HF_TOKEN": "hf_caf\u00e9"},
        ("cannot be fetched, HF_TOKEN has characters that no token has", "copy it again"),
    ),
    "an unknown model": (
        "study/delegated",
        {},
        ("study/delegated (--model) is not on the Hub", "check the name"),
    ),
    "a bare name": ("tiny-llama", {}, ("model tiny-llama (--model) is not on the Hub",)),
    "no name at all": ("study/tiny/llama", {}, ("neither a folder nor a Hub id",)),
    "no network": ("study/tiny-llama", {"HF_ENDPOINT": NOWHERE}, ("unreachable", "--model")),
    "offline mode": ("study/tiny-llama", {"HF_HUB_OFFLINE": "1"}, ("unreachable", "--model")),
    "pickled weights": ("study/pickled", {}, ("no *.safetensors", "pickled")),
    "another architecture": (
        "study/gpt2 --dry-run",
        {},
        ("study/gpt2", "GPT2LMHeadModel", "not supported", "--model"),
    ),
}


@pytest.mark.parametrize("command, variables, parts", REFUSED.values(), ids=REFUSED)
def test_a_model_that_cannot_be_used_is_one_line_and_leaves_nothing(
    served, tmp_path, command, variables, parts
):
    refused = python(train(command), tmp_path, served.url, **variables)
    lines = refused.stderr.splitlines()
    assert (refused.returncode, len(lines)) == (2, 1), refused.stderr
    assert lines[0].startswith("error: ")
    assert all(part in lines[0] for part in parts), lines[0]
    assert not files_below(tmp_path / "out")


# ------------------------------------------------------------------------------ data sets


READ = """
import dataclasses, json
from lora_tradeoffs.data.sources import read_hub
from dataset_descriptions import describe
sst2, answers = describe("sst2"), []
for hub_id in {hub_ids!r}:
    try:
        answers.append(read_hub(dataclasses.replace(sst2, hub_id=hub_id)))
    except config.UserError as error:
        answers.append(str(error))
print(json.dumps(answers))
"""


def read_from_hub(folder, endpoint, *hub_ids, **variables):
    """What read_hub gives for SST-2 in each repository: splits and report, or a UserError."""
    done = python(READ.format(hub_ids=hub_ids), folder, endpoint, **variables)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def read(served, tmp_path_factory):
    """SST-2 from nyu-mll/glue, the errors for an unknown and a gated repository, SST-2 offline."""
    folder, glue = tmp_path_factory.mktemp("read"), "nyu-mll/glue"
    answers = read_from_hub(folder, served.url, glue, "nyu-mll/delegated", "study/gated")
    return answers + read_from_hub(folder, NOWHERE, glue, HF_HUB_OFFLINE="1")


def sentences(rows):
    return [" ".join(row["sentence"].split()) for row in rows]


def test_hub_rows_are_all_kept_but_the_broken_and_the_recurring_which_are_counted(read):
    splits, made = read[0]
    train, official_validation = glue_rows()
    kept = sentences(splits["train"] + splits["validation"])
    assert sorted(kept) == sorted(sentences(train[:200]))
    assert sentences(splits["test"]) == sentences(official_validation[:30])
    assert made["dropped"]["train"] == {
        "field 'sentence' is empty": 2,
        "recurs in a held-out split": 3,
    }
    assert made["dropped"]["test"] == {"label -1 is outside the set": 1}


def test_validation_is_carved_from_train_so_that_no_sentence_shares_a_phrase_with_it(read):
    splits = read[0][0]
    train, validation = sentences(splits["train"]), sentences(splits["validation"])
    assert 0 < len(validation) <= 20
    assert all(len(text.split()) >= 5 for text in validation)
    for held_out in validation:
        for text in train:
            assert f" {held_out} " not in f" {text} "
            assert len(text.split()) < 5 or f" {text} " not in f" {held_out} "


def test_the_report_names_the_commit_that_the_rows_come_from(read, served):
    assert read[0][1]["revision"] == served.commit("datasets/nyu-mll/glue")


def test_offline_the_same_rows_and_commit_come_from_the_cache(read):
    assert read[3] == read[0]


def test_only_the_configuration_that_is_asked_for_is_fetched(read, served):
    assert [line for line in served.requests if "sst2/train-00000" in line]
    assert not [line for line in served.requests if "cola/train-00000" in line]


def test_a_data_set_that_cannot_be_had_is_an_error_of_one_line(read, served, tmp_path):
    (unreachable,) = read_from_hub(tmp_path, NOWHERE, "nyu-mll/glue")
    for line, parts in (
        (read[1], ("data set nyu-mll/delegated (task sst2) is not on the Hub", "--data")),
        (read[2], ("gated", "https://huggingface.co/datasets/study/gated ", "HF_TOKEN")),
        (unreachable, ("unreachable", "--data")),
    ):
        assert "\n" not in line
        assert all(part in line for part in parts), line


REVIEW = """\
dataset_path: nyu-mll/glue
dataset_name: sst2
training_split: train
test_split: validation
doc_to_text: "{{sentence | trim}}"
doc_to_target: label
doc_to_choice: [negative, positive]
"""
OWN_TASK = """
import argparse, json
from lora_tradeoffs.data.preparation import prepare
from lora_tradeoffs.models.base import load_tokenizer, prepare_base
answers = []
for data in ("hub", {folder!r}):
    settings = config.resolve_settings(argparse.Namespace(model="study/tiny-llama", data=data))
    tokenizer = load_tokenizer(prepare_base(settings), settings)
    task = prepare(settings, tokenizer, ["review"], 64, 1000)["review"]
    rows = {{split: task.split(split).to_list() for split in task.splits}}
    answers.append([task.report, rows])
print(json.dumps(answers))
import multi_task_training
flags = "--tasks review --lora 2 --max-steps 1 --model study/tiny-llama --data hub --dtype fp32"
assert multi_task_training.main([*flags.split(), "--set", "checkpoints=1", "report_to=none"]) == 0
"""


def serve_benchmarks(datasets):
    """The sample's benchmarks, with which training rows are checked for overlap."""
    for name, benchmark in BENCHMARKS.items():
        files = sorted((ROOT / "data" / "sample").glob(f"{name.replace('wikitext', 'prose')}/*"))
        (folder := datasets / benchmark.hub_id).mkdir(parents=True)
        shutil.copy(files[0], folder / "rows.jsonl")
        file = {"split": benchmark.split, "path": "rows.jsonl"}
        config = {"config_name": benchmark.hub_config or "default", "data_files": [file]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': [config]})}---\n")


@pytest.mark.slow
def test_rows_of_a_task_of_ones_own_come_from_the_hub_as_from_files(served, tmp_path):
    """The task file names the data set; beside it the same rows lie in a folder."""
    serve_benchmarks(served.root / "datasets")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "review.yaml").write_text(REVIEW)
    (tmp_path / "rows" / "review").mkdir(parents=True)
    train, validation = glue_rows()  # without what the Hub's rows are rid of
    for split, rows in {"train": train[:200], "validation": validation[:30]}.items():
        path = tmp_path / "rows" / "review" / f"{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = OWN_TASK.format(folder=str(tmp_path / "rows"))
    done = python(code, tmp_path, served.url, TASKS_DIR=str(tmp_path / "tasks"))
    assert done.returncode == 0, done.stderr
    (report, rows), (of_folder, expected) = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("[["))
    )
    assert report["revision"] == served.commit("datasets/nyu-mll/glue")
    assert of_folder["revision"] is None and report["splits"].keys() == of_folder["splits"].keys()
    for split in ("train", "validation", "test"):
        assert len(rows[split]) == len(expected[split]) > 0
        columns = ("prompt", "completion", "label", "input_ids")
        kept = [sorted([r[c] for c in columns] for r in of[split]) for of in (rows, expected)]
        assert kept[0] == kept[1], split
    run = next((tmp_path / "out" / "models" / "demo").glob("review_lora_r2_*"))
    made = json.loads((run / "run.json").read_text())["data"]["review"]
    assert made["revision"] == report["revision"] and (run / "training.json").is_file()
