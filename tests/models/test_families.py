"""Every model family: trained and measured, against plain PEFT and Transformers."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from reference import MODEL_FIELDS, family_model
from support import ROOT, assert_one_line_error, settings_for

import eval as evaluation
import gradient_conflict
import multi_task_training
import retention_eval
import svd_analysis
from config import DOCUMENTS, UserError
from lora_tradeoffs.checkpoints import checkpoints_in
from lora_tradeoffs.models.base import load_tokenizer, prepare_base
from lora_tradeoffs.models.checkpoint_models import checkpoint_models
from lora_tradeoffs.models.configs import MODEL_FAMILIES, differing_fields, read_config
from lora_tradeoffs.training.trainer import pick_attention

ARMS = ("lora_r4_all", "full", "full_qv")
REPRESENTATIVE = "gemma3_text"  # windows, norms of queries and keys, a tied head, scaled embeddings


@pytest.fixture(
    scope="module",
    params=[
        name if name == REPRESENTATIVE else pytest.param(name, marks=pytest.mark.slow)
        for name in MODEL_FIELDS
    ],
)
def family(request, workspace, tokenizer):
    """The settings of a study of the family whose three arms were trained."""
    study, folder = f"family_{request.param}", workspace / request.param
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = family_model(
        request.param, vocabulary=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **ids
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = settings_for(model=str(folder), study=study)
    short = ["--max-steps", "4", "--limit", "32", "--set", "checkpoints=1", "batch_size=8"]
    arms = ["--lora", "4", "--full-finetune", "--full-qv", "--target-modules", "all"]
    assert multi_task_training.main(["--similar", *arms, *short, *flags(settings)]) == 0
    return settings


def flags(settings):
    return ["--model", settings.model, "--study", settings.study, "--dtype", "fp32"]


def checkpoint_of(settings, arm):
    (run,) = (r for r in settings.runs_dir.glob("*/") if r.name.startswith(f"similar_{arm}_steps"))
    return checkpoints_in(run)[-1]


def plain_model(settings, folder=None):
    """The model as Transformers and PEFT load it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    whole = folder and not (folder / "adapter_config.json").is_file()
    path = folder if whole else settings.model
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, folder) if folder and not whole else model).eval()


def logits_of(model, prompt):
    with torch.no_grad():
        return model(prompt).logits


def test_checkpoints_compute_what_plain_peft_and_transformers_compute(family):
    settings = family
    base = prepare_base(settings)
    prompt = torch.tensor([load_tokenizer(base)("The window is shorter than this. " * 5).input_ids])
    checkpoints = [checkpoint_of(settings, arm) for arm in ARMS]
    logits = []
    for checkpoint, model in checkpoint_models(base, checkpoints):
        logits.append(logits_of(model, prompt))
        plain = plain_model(settings, checkpoint and checkpoint.folder)
        assert (logits[-1] - logits_of(plain, prompt)).abs().max() < 1e-4
        if checkpoint:
            assert (logits[-1] - logits[0]).abs().max() > 1e-3
    for checkpoint in checkpoints[1:]:
        assert not differing_fields(read_config(checkpoint.folder), read_config(base.folder))


def records_in(settings, name):
    document = settings.output_dir / DOCUMENTS[name].format(study=settings.study)
    return pd.DataFrame(json.loads(document.read_text())["records"])


def test_every_analysis_measures_every_arm(family):
    settings = family
    common, few = [*flags(settings), "--no-figures"], ["--limit", "4"]
    assert evaluation.main([*common, *few, "--shots", "0"]) == 0
    assert retention_eval.main([*common, *few, "--tasks", "hellaswag", "--documents", "2"]) == 0
    assert svd_analysis.main([*common[:-3], "--no-figures", "--top-k", "4"]) == 0
    assert gradient_conflict.main([*common, "--batches", "2", "--batch-size", "4"]) == 0
    for name in DOCUMENTS:
        records = records_in(settings, name)
        assert set(records.method) >= {"lora", "full", "full_qv"}, name
        assert np.isfinite(records.value.astype(float)).mean() > 0.9
    drift = records_in(settings, "drift")
    for arm in ARMS:
        checkpoint = checkpoint_of(settings, arm)
        tuned, base = plain_model(settings, checkpoint.folder), plain_model(settings)
        tuned = tuned.merge_and_unload() if arm.startswith("lora") else tuned
        assert_drift_is_dense(drift[drift.run == checkpoint.run], tuned, base, arm)


def assert_drift_is_dense(records, tuned, base, arm):
    """The size of every module's update over all layers, and which tensors it is in."""
    update, start = {}, {}
    for name, parameter in tuned.double().named_parameters():
        before, tensor = base.get_parameter(name).detach(), name.split(".", 4)[-1]
        moved = float((parameter.detach() - before).square().sum())
        update[tensor] = update.get(tensor, 0) + moved
        start[tensor] = start.get(tensor, 0) + float(before.double().square().sum())
    tensors = {tensor for tensor, square in update.items() if square}
    if arm == "full_qv":  # no bias
        assert tensors == {"q_proj.weight", "v_proj.weight"}
    elif arm != "full":
        assert len(tensors) == 7 and not any("norm" in t or "bias" in t for t in tensors)
    sizes = records[(records.metric == "relative_frobenius") & (records.layer == -1)]
    sizes = sizes.set_index("module").value
    assert {"q_proj", "v_proj"} <= set(sizes.index)
    for module in ("q_proj", "v_proj"):
        square = update[f"{module}.weight"] / start[f"{module}.weight"]
        assert sizes[module] == pytest.approx(square**0.5, rel=1e-4)


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]},
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]},
        {"model_type": "falcon", "architectures": ["FalconForCausalLM"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C"}},
    ],
    ids=lambda fields: fields["model_type"],
)
def test_another_family_is_refused_by_name(tmp_path, inside, fields):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    process = inside(multi_task_training.main, "--dry-run", "--model", tmp_path)
    name = fields.get("architectures", ["mine"])[0]
    assert_one_line_error(process, name, "not supported", *MODEL_FAMILIES.values())


def test_gemma_that_reads_both_ways_is_refused(tmp_path):
    config = family_model("gemma3_text", vocabulary=50).config
    config.use_bidirectional_attention = True
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bidirectional, so it is no causal language model"):
        read_config(tmp_path)


def test_sdpa_is_refused_where_scores_are_capped(tmp_path):
    lengths = np.array([1_000])
    assert pick_attention("auto", lengths, "cuda", True, "eager") == "eager"
    assert pick_attention("eager", lengths, "cuda", True, "sdpa") == "eager"
    with pytest.raises(UserError, match="leave out --set attention=sdpa"):
        pick_attention("sdpa", lengths, "cuda", True, "eager")
    config = family_model("gemma3_text", vocabulary=50, attn_logit_softcapping=1.0).config
    assert config._attn_implementation == "eager"


def test_the_readme_names_every_family():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    *others, last = MODEL_FAMILIES.values()
    assert f"{', '.join(others)} or {last}" in text
    assert set(MODEL_FIELDS) == set(MODEL_FAMILIES)
