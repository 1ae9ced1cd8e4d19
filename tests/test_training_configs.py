"""Configurations: names, rates, and values that cannot be."""

import dataclasses
import typing

import pytest
from support import settings_for

from config import FAMILIES, GRID, PRESETS, RANKS, UserError
from lora_tradeoffs.training.arms import ArmSpec
from lora_tradeoffs.training.plan import plan_runs
from training_configs import (
    SCALINGS,
    TrainingConfig,
    default_learning_rate,
    parse_assignments,
    settable_fields,
    tasks_and_variant,
)


def config_of(method="lora", rank=8, tasks=FAMILIES["similar"], seed=42, values=None, **changes):
    values = values or {}
    (run,) = plan_runs(settings_for(), 2048, [tasks], [ArmSpec(method, rank)], [seed], values)
    return dataclasses.replace(run.config, **changes), run.default


def name_of(*args, **kwargs):
    config, default = config_of(*args, **kwargs)
    return config.run_name(default)


def test_rates_are_those_of_the_formula():
    assert default_learning_rate("full", 2048) == pytest.approx(4.9e-5)
    assert default_learning_rate("lora", 2048, 10, 16) == pytest.approx(4.9e-4)
    assert default_learning_rate("full_qv", 576) == pytest.approx(1.3e-4)
    assert default_learning_rate("lora", 576, 10, 16) == pytest.approx(1.3e-3)
    assert default_learning_rate("lora", 576, 15, 8) == pytest.approx(3.3e-3)
    assert default_learning_rate("dora", 576, 15, 8) == pytest.approx(3.3e-3)
    for method in ("pissa", "loraplus"):
        assert default_learning_rate(method, 576, 15, 8) == pytest.approx(8.3e-4)
    assert default_learning_rate("oft", 576, 15, 32) == pytest.approx(2e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method, rank", [("lora", 4), ("lora", 64), ("full", 0), ("full_qv", 0)])
def test_the_preset_original_is_the_published_recipe(family, method, rank):
    settings = settings_for(preset="original")
    (run,) = plan_runs(settings, 2048, [FAMILIES[family]], [ArmSpec(method, rank)], [42], {})
    recipe = {"learning_rate": 1e-5, "epochs": 3, "batch_size": 64, "weight_decay": 0.01}
    recipe |= {"warmup": 0.1, "lora_dropout": 0.1 if method == "lora" else 0.0, "alpha": 2 * rank}
    assert run.config.record().items() >= recipe.items()
    assert run.name == f"{family}_{f'lora_r{rank}' if rank else method}_seed42"
    assert (settings.study, settings.model) == ("original", "meta-llama/Llama-3.2-1B")
    assert "one learning rate" in settings.headline("cpu")


def test_the_rate_follows_the_scale_alone():
    """(32/r + 1)/3 of the rate at rank 16 under alpha = 2r; the published rule at its own scale."""

    def rates(scaling):
        arms = [config_of(rank=rank, values={"scaling": scaling}) for rank in RANKS]
        assert all(config.learning_rate == default.learning_rate for config, default in arms)
        return [config.learning_rate for config, _ in arms]

    published = default_learning_rate("lora", 2048, PRESETS["demo"].lora_rate_factor, 16)
    assert rates("constant") == [published] * 5
    for scaling, at_rank in (("2r", lambda r: 16 / r), ("rslora", lambda r: 4 / r**0.5)):
        expected = [published * (1 + 2 * at_rank(rank)) / 3 for rank in RANKS]
        assert rates(scaling) == pytest.approx(expected, rel=0.06)  # two digits
    assert rates("2r")[RANKS.index(16)] == published == rates("rslora")[RANKS.index(16)]
    dense = {config_of(method, 0)[0].learning_rate for method in ("full", "full_qv")}
    assert len(dense) == 1


def test_the_grid_is_full_and_five_ranks():
    arms = [ArmSpec.parse(word) for word in GRID]
    assert arms == [ArmSpec("full"), *(ArmSpec("lora", rank) for rank in RANKS)]


def test_a_name_says_what_differs_from_the_grid():
    assert name_of() == "similar_lora_r8_seed42"
    assert name_of("full", 0, FAMILIES["dissimilar"]) == "dissimilar_full_seed42"
    assert name_of(tasks=("sst2",), seed=7) == "sst2_lora_r8_seed7"
    assert name_of(tasks=("sst2", "qqp")) == "sst2+qqp_lora_r8_seed42"
    assert name_of("full_qv", 0) == "similar_full_qv_seed42"
    assert name_of(learning_rate=1e-3, target_modules="all") == "similar_lora_r8_all_lr1e-3_seed42"
    assert name_of(max_steps=120, scaling="rslora") == "similar_lora_r8_rslora_steps120_seed42"
    assert name_of(micro_batch_size=2, report_to="none") == "similar_lora_r8_seed42"


def test_a_name_gives_back_its_tasks_and_variant():
    changes = [
        ({}, "similar", ""),
        ({"tasks": ("sst2", "qqp")}, "sst2+qqp", ""),
        ({"method": "full", "rank": 0}, "similar", ""),
        ({"method": "full_qv", "rank": 0, "max_steps": 4}, "similar", "steps4"),
        ({"learning_rate": 1e-3, "target_modules": "all"}, "similar", ""),
        ({"scaling": "rslora", "learning_rate": 2e-5, "dtype": "fp32"}, "similar", "rslora_fp32"),
    ]
    for change, tasks, variant in changes:
        record = config_of(**change)[0].record()
        assert tasks_and_variant(name_of(**change), record) == (tasks, variant)
    outside = {"method": "lora", "rank": 8, "seed": 42}
    own = {
        "method": "full",
        "rank": 0,
        "seed": 1,
        "tasks": ["my_full_task"],
        "family": "my_full_task",
    }
    assert tasks_and_variant("my_full_task_full_fp32_seed1", own) == ("my_full_task", "fp32")
    assert tasks_and_variant("someone--adapter", outside) == ("", "someone--adapter")
    assert tasks_and_variant("similar_lora_r4_seed42", outside) == ("", "similar_lora_r4_seed42")


def test_two_configurations_that_learn_differently_have_two_names():
    changes = [
        {"learning_rate": 1.3e-4},
        {"learning_rate": 1.25e-4},
        {"epochs": 2.0},
        {"max_length": 300},
        {"mixing": "equal"},
        {"loss_weighting": "token"},
        {"lora_dropout": 0.1},
        {"limit": 9},
        {"schedule": "cosine"},
        {"warmup": 0.1},
    ]
    names = [name_of(**change) for change in changes]
    assert len(set(names)) == len(names)


def test_alpha_and_scale():
    assert (config_of(rank=16)[0].alpha, config_of(rank=16)[0].scale) == (32, 2)
    assert (config_of(rank=16, scaling="constant")[0].alpha) == 32
    assert config_of(rank=64, scaling="constant")[0].scale == 0.5
    for rank in RANKS:  # rank-stabilised: scale x sqrt(rank) is constant
        rslora = config_of(rank=rank, scaling="rslora")[0]
        assert (rslora.alpha, rslora.scale * rank**0.5) == (8, pytest.approx(8))
    scales = [config_of(rank=16, scaling=scaling)[0].scale for scaling in SCALINGS]
    assert scales == [2, 2, 2]  # where all three meet
    assert config_of("full", 0)[0].scale == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rank": 0}, "LoRA rank is 0"),
        ({"tasks": ("sst2", "squad_v2")}, "not all of the family"),
        ({"tasks": ("sst3",)}, "tasks sst3 are not all of the family"),
        ({"tasks": ()}, "name at least one"),
        ({"method": "qlora"}, "method is 'qlora'; allowed: lora, dora, pissa,"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; allowed: 1e-12 to 1,000,000,000,000"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 to"),
        ({"warmup": 1.0}, "warmup is 1.0"),
        ({"mixing": "random"}, "allowed: proportional, equal, temperature"),
        ({"checkpoints": 0}, "checkpoints is 0"),
        ({"max_length": 10}, "max_length is 10"),
        ({"checkpoints": 10**9}, "checkpoints is 1000000000; allowed: 1 to 10,000"),
        ({"max_steps": 10**9}, "max_steps is 1000000000; allowed: 0 to 1,000,000"),
        ({"seed": 2**32}, "seed is 4294967296; allowed: 0 to 4,294,967,295"),
        ({"batch_size": "8"}, "batch_size is '8'; allowed: int"),
        ({"batch_size": 8.0}, "batch_size is 8.0; allowed: int"),
        ({"limit": True}, "limit is True"),
        ({"schedule": 3}, "schedule is 3"),
        ({"tasks": "sst2"}, "tasks is 'sst2'"),
        ({"method": "full"}, "rank is 8, and full has none"),
        ({"loraplus_ratio": 4.0}, "loraplus_ratio belongs to loraplus; leave it out for lora"),
        ({"method": "oft", "scaling": "rslora"}, "scaling belongs to lora, dora, pissa, loraplus"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(change, says):
    with pytest.raises(UserError) as error:
        dataclasses.replace(config_of()[0], **change)
    assert says in str(error.value)


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e400", "-1", str(10**30)])
def test_no_field_takes_an_absurd_number(value):
    kinds = typing.get_type_hints(TrainingConfig)
    numbers = [name for name in settable_fields() if kinds[name] in (int, float)]
    assert {"temperature", "max_grad_norm", "checkpoints"} < set(numbers)
    for name in numbers:
        with pytest.raises(UserError, match=name):
            dataclasses.replace(config_of()[0], **parse_assignments([f"{name}={value}"]))


def test_assignments_are_typed_and_checked():
    values = parse_assignments(["epochs=2", "batch_size=8", "activation_checkpointing=true"])
    assert values == {"epochs": 2.0, "batch_size": 8, "activation_checkpointing": True}
    for text in ("rank=4", "nothing=1", "epochs", "batch_size=2.5", "activation_checkpointing=1"):
        with pytest.raises(UserError, match="--set"):
            parse_assignments([text])


def test_every_field_of_a_configuration_is_compared_or_operational():
    compared = config_of()[0].compared()
    left = {f.name for f in dataclasses.fields(TrainingConfig)} - set(compared)
    assert left == {
        "model",
        "data",
        "micro_batch_size",
        "eval_batch_size",
        "attention",
        "activation_checkpointing",
        "logging_steps",
        "report_to",
    }
