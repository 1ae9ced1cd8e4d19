"""The main script, run as a user would: plan, train, stop, go on, refuse."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from support import assert_one_line_error, settings_for

import svd_analysis
from lora_tradeoffs.checkpoints import checkpoint_problem, checkpoints
from multi_task_training import build_parser, main, plan

SCRIPT = "multi_task_training.py"
DRIVER = Path(__file__).with_name("interrupted_run.py")
# 3 x 16 rows in batches of 16: three steps an epoch, four epochs, a checkpoint every two steps
SHORT = ["--similar", "--limit", "16", "--set", "epochs=4", "checkpoints=6", "micro_batch_size=8"]
LORA = [*SHORT, "lora_dropout=0.1", "--lora", "4", "--dtype", "bf16"]
FULL = [*SHORT, "--full-finetune", "--dtype", "bf16"]
NAMES = {
    "lora": "similar_lora_r4_epochs4_dropout0.1_limit16_bf16_checkpoints6_seed42",
    "full": "similar_full_epochs4_limit16_bf16_checkpoints6_seed42",
}


def planned(*argv):
    args = build_parser().parse_args(argv)
    settings = settings_for()
    return [run.name for run in plan(args, settings, 576)]


def runs_dir(study):
    return settings_for(study=study).runs_dir


def last_weights(run):
    (file,) = checkpoints(run)[-1].glob("*.safetensors")
    return load_file(file)


def assert_same_weights(run, other):
    ours, theirs = last_weights(run), last_weights(other)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# ------------------------------------------------------------------------------ the plan


def test_a_family_alone_means_all_its_arms_and_an_arm_alone_both_families():
    assert planned("--similar", "--lora", "8") == ["similar_lora_r8_seed42"]
    assert planned("--full-finetune") == ["similar_full_seed42", "dissimilar_full_seed42"]
    assert len(planned("--dissimilar")) == 6
    assert len(planned()) == 12
    union = planned("--similar", "--lora", "4", "64", "--full-qv", "--seed", "1", "2")
    assert union == [
        f"similar_{arm}_seed{seed}" for arm in ("full_qv", "lora_r4", "lora_r64") for seed in (1, 2)
    ]
    assert planned("--tasks", "sst2", "--lora", "8") == ["sst2_lora_r8_seed42"]


def test_what_is_loras_alone_is_not_asked_of_the_other_arms():
    names = planned("--similar", "--lora", "8", "--full-finetune", "--target-modules", "all")
    assert names == ["similar_full_seed42", "similar_lora_r8_all_seed42"]


def test_both_families_at_once_are_runs_of_their_own():
    names = planned("--similar", "--dissimilar", "--lora", "8")
    assert names == ["similar_lora_r8_seed42", "dissimilar_lora_r8_seed42"]


def test_dry_run_says_what_would_run_and_writes_nothing(inside, tiny):
    process = inside(main, "--model", tiny, "--study", "dry", "--dry-run", "--lora", "4", "8")
    assert process.returncode == 0, process.stderr
    for part in (
        "4 runs",
        "similar_lora_r4_seed42",
        "about 9",
        "trainable",
        "disk",
        "memory",
    ):
        assert part in process.stdout
    assert not runs_dir("dry").exists()


# ---------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def finished(tiny):
    """Uninterrupted runs of both arms in the study `whole`."""
    for argv in (LORA, FULL):
        assert main([*argv, "--model", str(tiny), "--study", "uninterrupted"]) == 0
    return runs_dir("uninterrupted")


@pytest.mark.parametrize("arm", NAMES)
def test_a_run_leaves_its_record_its_checkpoints_and_its_curves(finished, arm):
    run = finished / NAMES[arm]
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["lora_dropout"] == (0.1 if arm == "lora" else 0)
    assert record["environment"]["precision"] == "fp32 weights, bf16 autocast"
    assert set(record["data"]) == {"sst2", "mnli", "qqp"}
    weights = record["task_weights"].values()
    assert sum(w["examples"] for w in weights) == pytest.approx(1, abs=1e-3)

    found = checkpoints(run)
    assert [p.name for p in found] == [f"checkpoint-{step}" for step in range(2, 13, 2)]
    assert [checkpoint_problem(p) for p in found] == [None] * 6
    assert [(p / "optimizer.pt").exists() for p in found] == [False] * 4 + [True] * 2
    assert not [p for p in run.rglob("*") if p.name in ("training_args.bin", "tokenizer.json")]

    training = json.loads((run / "training.json").read_text())
    validation = training["validation"]
    assert [entry["step"] for entry in validation] == [0, 2, 4, 6, 8, 10, 12]
    assert {"eval_sst2_loss", "eval_mnli_accuracy", "eval_qqp_loss"} <= set(validation[0])
    assert training["trainable_parameters"] > 0 and training["peak_memory_bytes"] > 1e6
    clocks = [json.loads((p / "manifest.json").read_text()) for p in found] + [training]
    assert [c["seconds"] for c in clocks] == sorted(c["seconds"] for c in clocks)
    for clock in clocks:  # seven validations and six times saving are no training
        assert 0 < clock["seconds"] < clock["wall_seconds"]
    log = settings_for(study="uninterrupted").logs_dir / NAMES[arm]
    assert len((log / "log.jsonl").read_text().splitlines()) >= 7
    assert list(log.glob("events.out.tfevents.*"))


def test_a_full_checkpoint_is_a_whole_fp32_model(finished, tiny):
    from transformers import AutoModelForCausalLM

    checkpoint = checkpoints(finished / NAMES["full"])[-1]
    _, info = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {w.dtype for w in last_weights(finished / NAMES["full"]).values()} == {torch.float32}
    base = load_file(tiny / "model.safetensors")
    changed = [n for n, w in last_weights(finished / NAMES["full"]).items() if (w != base[n]).any()]
    assert sorted(changed) == sorted(base)


def test_a_run_that_is_done_is_skipped_with_one_line(finished, tiny, capsys):
    stamp = (finished / NAMES["lora"] / "training.json").stat().st_mtime_ns
    assert main([*LORA, "--model", str(tiny), "--study", "uninterrupted"]) == 0
    assert f"{NAMES['lora']} is done" in capsys.readouterr().out
    assert (finished / NAMES["lora"] / "training.json").stat().st_mtime_ns == stamp


def test_all_arms_of_a_seed_see_the_same_rows(finished):
    records = [json.loads((finished / name / "run.json").read_text()) for name in NAMES.values()]
    assert records[0]["data"] == records[1]["data"]
    tokens = [
        json.loads((finished / n / "training.json").read_text())["tokens"] for n in NAMES.values()
    ]
    assert tokens[0] == tokens[1]


# ------------------------------------------------------------------- stopped and resumed

slow = pytest.mark.slow
STOPPED = [
    ("lora", LORA, "killed-between-saves", 5),
    pytest.param("lora", LORA, "killed-before-the-optimizer-is-saved", 6, marks=slow),
    pytest.param("full", FULL, "killed-between-saves", 5, marks=slow),
    pytest.param("full", FULL, "killed-before-the-manifest", 6, marks=slow),
]


@pytest.mark.parametrize(("arm", "argv", "moment", "step"), STOPPED)
def test_a_killed_run_ends_with_the_weights_of_one_left_alone(
    script, finished, tiny, arm, argv, moment, step
):
    """Killed in its second epoch; dropout, bf16, accumulation over two micro-batches."""
    study = f"{arm}-{moment}"
    argv = [*argv, "--model", str(tiny), "--study", study]
    assert script(DRIVER, moment, step, *argv).returncode == -9
    run = runs_dir(study) / NAMES[arm]
    assert not (run / "training.json").exists()
    assert main(argv) == 0
    assert_same_weights(run, finished / NAMES[arm])
    ours, theirs = (
        json.loads((folder / "training.json").read_text())
        for folder in (run, finished / NAMES[arm])
    )
    keys = ("step", "eval_loss", "eval_mnli_accuracy")
    assert [[e[k] for k in keys] for e in ours["validation"]] == [
        [e[k] for k in keys] for e in theirs["validation"]
    ]


def test_a_run_killed_after_its_last_save_is_ended_without_training(finished, tiny):
    run = runs_dir("unsealed") / NAMES["lora"]
    shutil.copytree(finished / NAMES["lora"], run)
    (run / "training.json").unlink()
    assert main([*LORA, "--model", str(tiny), "--study", "unsealed"]) == 0
    assert_same_weights(run, finished / NAMES["lora"])
    ours, theirs = (
        json.loads((folder / NAMES["lora"] / "training.json").read_text())["validation"]
        for folder in (run.parent, finished)
    )
    assert ours == theirs


def test_sigterm_saves_a_whole_checkpoint_and_ends(script, finished, tiny):
    argv = [*LORA, "--model", str(tiny), "--study", "terminated"]
    process = script(DRIVER, "terminated", 5, *argv)
    assert process.returncode == 143, process.stderr
    assert "run the same command to resume" in process.stderr
    run = runs_dir("terminated") / NAMES["lora"]
    assert [p.name for p in checkpoints(run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert checkpoint_problem(run / "checkpoint-5") is None
    assert main(argv) == 0
    assert_same_weights(run, finished / NAMES["lora"])
    assert not (run / "checkpoint-5").exists()  # it is not on the grid


@pytest.mark.parametrize(("arm", "argv"), [("full", FULL), pytest.param("lora", LORA, marks=slow)])
def test_a_disk_that_fills_during_a_save_loses_nothing_before_it(script, finished, tiny, arm, argv):
    study = f"full-disk-{arm}"
    argv = [*argv, "--model", str(tiny), "--study", study, "--set", "report_to=none"]
    process = script(DRIVER, "disk-full", 6, *argv)
    assert process.returncode == 2, process.stderr
    assert "free disk space" in process.stderr and "Traceback" not in process.stderr
    run = runs_dir(study) / NAMES[arm]
    assert [p.name for p in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    assert main(argv) == 0
    assert_same_weights(run, finished / NAMES[arm])


@pytest.mark.slow
def test_two_processes_learn_what_one_does(script, tiny):
    argv = [*SHORT, "logging_steps=1", "--lora", "4", "--dtype", "fp32", "--model", str(tiny)]
    losses = []
    for study, launcher in (
        ("one", []),
        ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        process = script(*launcher, SCRIPT, *argv, "--study", study)
        assert process.returncode == 0, process.stderr[-2000:]
        (run,) = [p for p in runs_dir(study).iterdir() if p.name.startswith("similar")]
        training = json.loads((run / "training.json").read_text())
        losses.append([e["loss"] for e in training["loss_curve"]])
        losses[-1] += [e["eval_loss"] for e in training["validation"]]
    assert len(losses[0]) == 12 + 7
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# ------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("argv", [FULL, LORA])
def test_fsdp_on_a_cpu_is_refused(argv, tiny, inside, monkeypatch):
    # which Trainer would train with DDP, without a word
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    process = inside(main, *argv, "--model", tiny, "--study", "sharded")
    assert_one_line_error(process, "FSDP is for full fine-tuning on CUDA", "fsdp2.yaml")


def test_a_run_begun_with_other_settings_is_refused_with_what_differs(
    finished, tiny, capsys, monkeypatch
):
    copy = runs_dir("other") / NAMES["lora"]
    shutil.copytree(finished / NAMES["lora"], copy)
    (copy / "training.json").unlink()
    monkeypatch.setenv("EXAMPLES_PER_TASK", "10")
    assert main([*LORA, "--model", str(tiny), "--study", "other"]) == 2
    error = capsys.readouterr().err
    assert "examples_per_task 2000 -> 10" in error and "data of sst2" in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert len(checkpoints(copy)) == 6


def test_two_processes_on_one_run_are_refused(inside, tiny):
    folder = runs_dir("locked")
    folder.mkdir(parents=True)
    with FileLock(folder / f".{NAMES['lora']}.lock"):
        process = inside(main, *LORA, "--model", tiny, "--study", "locked")
    assert_one_line_error(process, "is being trained by another process")
    assert not (folder / NAMES["lora"]).exists()


def test_a_done_run_is_not_taken_for_one_on_other_data(finished, tiny, capsys, tmp_path):
    """Its name is the same, since a name does not say where the data lie."""
    sample = Path(__file__).parent.parent / "data" / "sample"
    shutil.copytree(sample, tmp_path, dirs_exist_ok=True)  # with the benchmarks: overlap is told
    argv = [*LORA, "--model", str(tiny), "--study", "uninterrupted", "--data", str(tmp_path)]
    assert main(argv) == 0  # the same rows elsewhere are the same data
    assert "is done" in capsys.readouterr().out
    lines = (tmp_path / "qqp" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "qqp" / "train.jsonl").write_text("".join(lines[1:]))
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "data of qqp" in error and "data of sst2" not in error and "--overwrite" in error


def test_a_run_that_is_trained_anew_has_no_results_of_the_one_before(tiny, capsys):
    """Its name is the same: they would be taken for its own at the steps not measured again."""
    shared = ["--model", str(tiny), "--study", "anew"]
    quick = [*shared, "--similar", "--limit", "16", "--max-steps", "2", "--lora", "4"]
    assert main([*quick, "--seed", "1", "2"]) == 0
    assert svd_analysis.main(shared) == 0
    path = settings_for(study="anew").document("drift")
    again, kept = sorted(
        json.loads(file.read_text())["run"] for file in runs_dir("anew").glob("*/run.json")
    )
    before = {file for file in path.parent.glob("*/*") if kept in file.name}
    capsys.readouterr()
    assert main([*quick, "--seed", "1", "--overwrite"]) == 0
    assert "removed 2 results of the previous run" in capsys.readouterr().out
    left = json.loads(path.read_text())["records"]
    assert left and not any(again in record.values() for record in left)
    assert {file for file in path.parent.glob("*/*") if "seed" in file.name} == before
    assert svd_analysis.main(shared) == 0
    assert again in {r["run"] for r in json.loads(path.read_text())["records"]}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--similar", "--lora", "0"], ["LoRA rank is 0", "at least 1"]),
        (["--similar", "--lora", "17"], ["LoRA rank is 17", "(16)"]),
        (["--tasks", "sst3", "--lora", "4"], ["unknown task 'sst3'", "sst2"]),
        (["--similar", "--tasks", "squad_v2"], ["--tasks is not allowed with --similar"]),
        (["--similar", "--set", "colour=red"], ["--set colour=red", "epochs"]),
        (["--similar", "--set", "epochs=-1"], ["epochs is -1.0"]),
        (["--similar", "--lora", "4", "--data", "nowhere"], ["data is 'nowhere' (--data)"]),
        (["--similar", "--lora", "4", "--study", "a/b"], ["study is 'a/b'"]),
        (["--full-finetune", "--scaling", "rslora"], ["scaling belongs to lora"]),
        (["--lora", "4", "--max-steps", "-1"], ["max_steps is -1"]),
        (["--lora", "4", "--seed", "-1"], ["--seed must be 0 or more, not -1"]),
        (["--lora", "4", "--seed", str(2**32)], ["--seed must be", "4294967295"]),
        (["--lora", "4", "--max-steps", str(10**9)], ["max_steps is 1000000000", "1,000,000"]),
        (["--lora", "4", "--set", f"checkpoints={10**9}"], ["checkpoints is 1000000000"]),
        (["--similar", "--lora", "4", "--set", "epochs=1e6"], ["epochs is 1000000.0", "10,000"]),
        (["--lora", "4", "--lr-sweep", "1", "0"], ["--lr-sweep 0", "above 0"]),
        (["--lora", "4", "--lr-sweep", "-2"], ["--lr-sweep -2", "above 0"]),
        (["--lora", "4", "--lr-sweep", "nan"], ["--lr-sweep must be a number", "not nan"]),
        (["--lora", "4", "--lr-sweep", "two"], ["invalid float value: 'two'"]),
        (
            ["--lora", "4", "--lr-sweep", "--set", "learning_rate=1e-3"],
            ["--lr-sweep and --set learning_rate", "use one of them"],
        ),
        (
            ["--lora", "4", "--swept-rates", "--set", "learning_rate=1e-3"],
            ["--swept-rates and --set learning_rate"],
        ),
        (["--lora", "4", "--swept-rates", "--lr-sweep"], ["not allowed with argument"]),
        (
            ["--similar", "--lora", "4", "--swept-rates"],
            ["no learning rate was chosen for similar_lora_r4", "--lr-sweep --study refused"],
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, capsys, argv, parts):
    study = [] if "--study" in argv else ["--study", "refused"]
    try:
        code = main([*argv, *study, "--model", str(tiny)])
    except SystemExit as exit:
        code = exit.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(part in lines[0] for part in parts), lines
    assert not runs_dir("refused").exists()


def test_a_loss_that_is_not_a_number_ends_the_run(tiny, capsys):
    argv = ["--tasks", "sst2", "--full-finetune", "--set", "learning_rate=1e12", "max_grad_norm=0"]
    argv += ["epochs=4", "logging_steps=1", "--limit", "16", "--dtype", "fp32", "--study", "nan"]
    assert main([*argv, "--model", str(tiny)]) == 2
    assert "try a lower rate" in capsys.readouterr().err


# ------------------------------------------------------------------- the sweep of the rates

# Four steps of a random model: the best rate is far above the default, so 32 times it is near.
FEW = ["--tasks", "sst2", "--limit", "16", "--max-steps", "4", "--dtype", "fp32"]
FEW += ["--set", "checkpoints=1", "warmup=0", "report_to=none"]
ARM = "sst2_full_steps4_warmup0_limit16_fp32_checkpoints1"


def rates_of(study):
    return json.loads((runs_dir(study) / "learning_rates.json").read_text())["records"]


def stamps(study):
    """When each run ended, or failed."""
    names = ("training.json", "error.json")
    files = [p for name in names for p in runs_dir(study).glob(f"*/{name}")]
    return {p: p.stat().st_mtime_ns for p in files}


@pytest.fixture(scope="module")
def swept(tiny):
    """A sweep of full fine-tuning that began with one rate; the flags of its study."""
    argv = [*FEW, "--model", str(tiny), "--study", "swept"]
    assert main([*argv, "--full-finetune", "--lr-sweep", "32"]) == 0
    return argv


def test_a_plan_of_a_sweep_is_its_grid_with_one_seed():
    names = planned("--similar", "--lora", "8", "--full-finetune", "--lr-sweep")
    # the demo's defaults at SmolLM2's width: 1.3e-4 and 3.3e-3
    assert names == [
        *("similar_full_lr6.5e-5_seed42", "similar_full_seed42", "similar_full_lr2.6e-4_seed42"),
        *("similar_lora_r8_lr1.65e-3_seed42", "similar_lora_r8_seed42"),
        "similar_lora_r8_lr6.6e-3_seed42",
    ]
    several = planned("--similar", "--full-finetune", "--seed", "1", "2", "--lr-sweep", "1", "4")
    assert [name.split("full_")[1] for name in several] == [
        *("seed1", "lr5.2e-4_seed1", "seed2", "lr5.2e-4_seed2")
    ]


def test_a_sweep_of_one_rate_is_widened_until_its_best_lies_inside(swept):
    records = rates_of("swept")
    losses = {r["learning_rate"]: r["loss"] for r in records}
    (chosen,) = [r for r in records if r["chosen"]]
    assert {r["arm"] for r in records} == {ARM} and chosen["factor"] > 16
    assert chosen["loss"] == min(losses.values())
    for factor in (0.5, 2):
        (neighbour,) = [
            v
            for r, v in losses.items()
            if r == pytest.approx(factor * chosen["learning_rate"], rel=0.01)
        ]
        assert neighbour > chosen["loss"]


def test_the_points_of_a_sweep_are_runs_whose_final_losses_it_compares(swept):
    by_rate = {}
    for path in runs_dir("swept").glob("*/training.json"):
        config = json.loads((path.parent / "run.json").read_text())["config"]
        if config["seed"] == 42:
            last = json.loads(path.read_text())["validation"][-1]
            assert last["step"] == 4
            by_rate[config["learning_rate"]] = last["eval_loss"]
    assert by_rate == {r["learning_rate"]: r["loss"] for r in rates_of("swept")}
    assert len(by_rate) >= 3


def test_a_sweep_that_is_done_trains_nothing(swept, capsys):
    before, records = stamps("swept"), rates_of("swept")
    assert main([*swept, "--full-finetune", "--lr-sweep", "32"]) == 0
    assert stamps("swept") == before and rates_of("swept") == records
    out = capsys.readouterr().out
    assert out.count("is done") == len(records)
    assert out.count(" chosen") == 1


def test_swept_rates_are_the_chosen_ones_for_other_seeds_too(swept):
    (chosen,) = [r["learning_rate"] for r in rates_of("swept") if r["chosen"]]
    before = stamps("swept")
    assert main([*swept, "--full-finetune", "--swept-rates", "--seed", "42", "43"]) == 0
    (new,) = stamps("swept").keys() - before.keys()
    assert json.loads((new.parent / "run.json").read_text())["config"]["learning_rate"] == chosen
    assert new.parent.name.endswith("_seed43") and "_lr" in new.parent.name


def test_without_the_flag_the_default_rate_stands(swept, capsys):
    assert main([*swept, "--full-finetune", "--dry-run", "--seed", "42", "44"]) == 0
    out = capsys.readouterr().out
    assert f"{ARM}_seed44" in out and "_lr" not in out


def test_a_rate_that_diverges_is_worse_than_all_and_is_not_trained_again(tiny, capsys):
    argv = [*FEW, "max_grad_norm=0", "--full-finetune", "--model", str(tiny), "--study", "diverged"]
    argv += ["--lr-sweep", "64", "1e12"]
    assert main(argv) == 0
    records = rates_of("diverged")
    assert [r["loss"] for r in records][-1] is None and records[-1]["factor"] == 1e12
    assert [r for r in records if r["chosen"]]
    (error,) = runs_dir("diverged").glob("*/error.json")
    assert json.loads(error.read_text())["diverged"] is True
    before = stamps("diverged")
    capsys.readouterr()
    assert main(argv) == 0
    assert stamps("diverged") == before
    assert f"{error.parent.name} diverged" in capsys.readouterr().out


def test_a_point_that_fails_otherwise_leaves_the_arm_without_a_choice(tiny, capsys):
    argv = [*FEW, "--model", str(tiny), "--study", "held", "--lr-sweep", "32", "64"]
    name = ARM.replace("full_", "full_lr4.16e-2_", 1)
    folder = runs_dir("held")
    folder.mkdir(parents=True)
    with FileLock(folder / f".{name}_seed42.lock"):
        assert main([*argv, "--full-finetune", "--full-qv"]) == 1
    error = capsys.readouterr().err
    assert f"error: {ARM}: no learning rate can be chosen, since {name}_seed42" in error
    assert {r["method"] for r in rates_of("held")} == {"full_qv"}


# -------------------------------------------------------------------- the real model, real rows


@pytest.mark.parametrize(
    "tasks", [["sst2"], pytest.param(["sst2", "mnli", "qqp"], marks=slow)], ids=len
)
def test_smollm2_learns_from_real_rows_and_loads_in_plain_peft(script, smollm2, real_data, tasks):
    study = f"real-{len(tasks)}"
    argv = [SCRIPT, "--tasks", *tasks, "--lora", "8", "--data", real_data, "--study", study]
    argv += ["--max-steps", "8", "--limit", "200", "--set", "checkpoints=2", "warmup=0"]
    process = script(*argv, EVAL_EXAMPLES_PER_TASK="16")
    assert process.returncode == 0, process.stderr[-2000:]
    assert "accuracy before -> after" in process.stdout
    (run,) = [p.parent for p in runs_dir(study).glob("*/training.json")]
    training = json.loads((run / "training.json").read_text())
    first, last = training["validation"][0], training["validation"][-1]
    for task in tasks:
        assert last[f"eval_{task}_loss"] < 0.5 * first[f"eval_{task}_loss"]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(smollm2.folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, run / "checkpoint-8").eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2.tokenizer_folder)
    prompt = tokenizer("Review: a joy from start to end\nSentiment:", return_tensors="pt")
    with torch.no_grad():
        answer = tokenizer.decode(model(**prompt).logits[0, -1].argmax())
    assert answer in (" positive", " negative")


def test_sources_hold_no_token_of_the_user(inside, tiny, monkeypatch):
    token = "hf_" + "x" * 30
    monkeypatch.setenv("HF_TOKEN", token)
    argv = ["--tasks", "sst2", "--lora", "2", "--limit", "16", "--max-steps", "1"]
    process = inside(main, *argv, "--model", tiny, "--study", "secret")
    assert process.returncode == 0, process.stderr
    assert token not in process.stdout + process.stderr
    folder = Path(os.environ["OUTPUT_DIR"])
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert files and not any(token.encode() in p.read_bytes() for p in files)
