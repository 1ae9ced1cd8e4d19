"""Arms as words, and every adapter trained: checkpoints in plain PEFT, resumed, refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from support import assert_one_line_error, settings_for
from transformers import TrainerCallback

from lora_tradeoffs.checkpoints import ADAPTER_FILE, UNCONVERTED, checkpoint_problem, checkpoints
from lora_tradeoffs.models.base import load_base, prepare_base
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.plan import plan_runs
from lora_tradeoffs.training.schedule import make_schedule
from lora_tradeoffs.training.trainer import training_arguments
from multi_task_training import build_model, build_parser, build_trainer, main, plan

FEW = ["--tasks", "sst2", "--limit", "32", "--max-steps", "4"]
FEW += ["--set", "checkpoints=2", "report_to=none", "warmup=0"]


# ------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("full", ("full", 0, {})),
        ("lora:8", ("lora", 8, {})),
        ("lora:8@all", ("lora", 8, {"target_modules": "all"})),
        (
            "lora:8@qv,scaling=constant,learning_rate=0.001",
            ("lora", 8, {"target_modules": "qv", "scaling": "constant", "learning_rate": 1e-3}),
        ),
        ("oft:32,activation_checkpointing=true", ("oft", 32, {"activation_checkpointing": True})),
    ],
)
def test_a_word_is_an_arm_and_its_text_the_word(word, expected):
    arm = ArmSpec.parse(word)
    assert (arm.method, arm.rank, arm.values) == expected
    assert str(arm) == word and ArmSpec.parse(str(arm)) == arm


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["lorra:8"], ["arm 'lorra:8': did you mean lora?", "NAME[:RANK][@MODULES]"]),
        (["lora"], ["lora needs its rank, as in lora:8"]),
        (["oft"], ["oft needs its block size"]),
        (["lora:eight"], ["arm 'lora:eight': lora needs its rank"]),
        (["full:8"], ["full has no rank"]),
        (["full@all"], ["full has no target_modules"]),
        (["oft:8,scaling=rslora"], ["oft has no scaling"]),
        (["lora:8@everything"], ["modules are qv, attention, mlp, all"]),
        (["lora:8@all,target_modules=qv"], ["sets a field twice"]),
        (["full,optim_target_modules=attn"], ["adamw_torch_fused takes no optim_target_modules"]),
        (["lora:8,rank=4"], ["rank=4: write field=value; fields: activation_checkpointing"]),
        (["lora:8,colour=red"], ["colour=red: write field=value"]),
        (["lora:8,epochs=many"], ["epochs=many: epochs takes a float"]),
        (["lora:8", "full", "lora:8"], ["the arm lora:8 occurs twice; leave one out"]),
        (["lora:8", "lora:8@qv"], ["the arm lora:8@qv occurs twice, also as lora:8"]),
        (["oft:5"], ["OFT's blocks of 5 do not divide the 32 inputs", "2, 4, 8, 16, 32"]),
        (["dora:17"], ["DoRA rank is 17", "(16)"]),
        (["full,optim=adamx"], ["optim adamx: adamx is not a valid OptimizerNames"]),
        (["full,optim=galore_adamw"], ["optim galore_adamw: You need to install `galore_torch`"]),
        (["lora:4,optim=galore_adamw"], ["projects gradients of matrices; LoRA trains none"]),
        (["full,optim=sgd,optim_args=momentum=0.9,beta9=1"], ["optim sgd takes no beta9"]),
        (["full,optim_args=beta1=0.8"], ["adamw_torch_fused takes no beta1 in optim_args"]),
        (["full,optim=sgd,optim_args=momentum"], ["optim sgd: not enough values to unpack"]),
    ],
)
def test_what_is_no_arm_is_one_line_and_leaves_nothing(inside, tiny, words, parts):
    argv = ["--model", tiny, "--study", "no-arm", *FEW, "--adapter", *words]
    assert_one_line_error(inside(main, *argv), *parts)
    assert not settings_for(study="no-arm").runs_dir.exists()


def test_an_arm_beats_what_is_set_for_all_and_a_run_says_its_word():
    flags = ["--similar", "--target-modules", "all", "--set", "epochs=2"]
    flags += ["--full-finetune", "--lora", "8"]
    flags += ["--adapter", "lora:8@qv", "oft:32,epochs=3", "loraplus:8,loraplus_ratio=4"]
    runs = plan(build_parser().parse_args(flags), settings_for(), 576)
    assert [run.name for run in runs] == [
        "similar_full_epochs2_seed42",
        "similar_lora_r8_all_epochs2_seed42",
        "similar_lora_r8_epochs2_seed42",
        "similar_oft_b32_all_epochs3_seed42",
        "similar_loraplus_r8_all_epochs2_ratio4_seed42",
    ]
    for run in runs:
        word = str(ArmSpec.of(run.config, run.default))
        parsed = build_parser().parse_args(["--similar", "--adapter", word])
        (again,) = plan(parsed, settings_for(), 576)
        assert again.config == run.config


# ------------------------------------------------------------------------------ the training


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 900, 17, 33, 8, 1200]])).logits


@pytest.mark.parametrize("word", ["dora:4", "pissa:4,lora_dropout=0.1", "loraplus:4", "oft:8"])
def test_an_adapter_is_trained_resumed_and_loads_in_plain_peft(tiny, base, monkeypatch, word):
    """PiSSA under bf16: its base is stored in it, and its conversion must not round."""
    from peft import PeftModel

    study, precision = word.partition(":")[0], "bf16" if "pissa" in word else "fp32"
    argv = [*FEW, "--adapter", word, "--dtype", precision, "--model", str(tiny)]
    models = []

    def building(*args):
        models.append(build_model(*args))
        return models[-1]

    monkeypatch.setattr("multi_task_training.build_model", building)
    assert main([*argv, "--study", study]) == 0
    (run,) = [path.parent for path in settings_for(study=study).runs_dir.glob("*/run.json")]
    record = json.loads((run / "run.json").read_text())
    assert record["config"]["rank"] == ArmSpec.parse(word).rank
    training = json.loads((run / "training.json").read_text())
    trained = {n: p.detach() for n, p in models[0].named_parameters() if p.requires_grad}
    assert training["trainable_parameters"] == sum(p.numel() for p in trained.values())

    arm = ArmSpec.parse(word)
    (planned,) = plan_runs(settings_for(model=str(tiny)), 32, [("sst2",)], [arm], [42], {})
    same = build_model(base, planned.config, False, "sdpa")
    start = logits(same)
    assert torch.allclose(start, logits(load_base(base)), atol=1e-5)
    same.load_state_dict(trained, strict=False)
    loaded = PeftModel.from_pretrained(load_base(base), checkpoints(run)[-1])
    assert torch.allclose(logits(loaded), logits(same), atol=3e-6)
    assert (logits(loaded) - start).abs().max() > 1e-3

    again = settings_for(study=f"{study}-again").runs_dir / run.name
    shutil.copytree(run, again)
    (again / "training.json").unlink()
    shutil.rmtree(again / "checkpoint-4")
    assert main([*argv, "--study", f"{study}-again"]) == 0
    first, second = (load_file(f / "checkpoint-4" / ADAPTER_FILE) for f in (run, again))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_loraplus_trains_b_at_its_ratio_of_as_rate(tiny, tmp_path):
    settings = settings_for(model=str(tiny))
    arm = ArmSpec.parse("loraplus:4,loraplus_ratio=5,weight_decay=0.25")
    (run,) = plan_runs(settings, 32, [("sst2",)], [arm], [42], {"limit": 16})
    base = prepare_base(settings)
    model = build_model(base, run.config, False, "sdpa")
    arguments = training_arguments(run.config, tmp_path, 1, False, "cpu", 1)
    schedule = make_schedule(run.config, settings, base)
    trainer = build_trainer(model, arguments, schedule, TrainerCallback())
    rates = {id(p): g for g in trainer.create_optimizer().param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = 5 if "lora_B" in name else 1
            group = rates[id(parameter)]
            assert group["lr"] == pytest.approx(ratio * run.config.learning_rate)
            assert group["weight_decay"] == 0.25


def test_another_optimizer_is_used_recorded_and_compared(tiny, capsys):
    argv = [*FEW[:-3], "checkpoints=1", "report_to=none", "--model", str(tiny), "--study", "sgd"]
    word = "full,optim=sgd,optim_args=momentum=0.9,nesterov=true"
    assert main([*argv, "--adapter", word]) == 0
    (run,) = [p.parent for p in settings_for(study="sgd").runs_dir.glob("*/run.json")]
    assert "sgd_momentum-0.9-nesterov-true" in run.name
    record = json.loads((run / "run.json").read_text())
    assert record["compared"]["optim_args"] == "momentum=0.9,nesterov=true"
    state = torch.load(checkpoints(run)[-1] / "optimizer.pt")
    assert state["param_groups"][0]["nesterov"] and "momentum_buffer" in state["state"][0]
    record["compared"]["optim"] = "adamw_torch_fused"
    (run / "run.json").write_text(json.dumps(record))
    assert main([*argv, "--adapter", word]) == 2
    assert "optim adamw_torch_fused -> sgd" in capsys.readouterr().err


def test_what_resumes_pissa_goes_with_the_optimizers_state(tiny):
    argv = [*FEW[:-3], "checkpoints=4", "report_to=none", "--adapter", "pissa:2"]
    assert main([*argv, "--model", str(tiny), "--study", "resume-state"]) == 0
    (run,) = [p.parent for p in settings_for(study="resume-state").runs_dir.glob("*/run.json")]
    saved = checkpoints(run)
    assert [checkpoint_problem(folder) for folder in saved] == [None] * 4
    assert [(folder / UNCONVERTED).exists() for folder in saved] == [False, False, True, True]
    config = json.loads((saved[0] / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (4, True)
