"""BOS and EOS on every path that makes tokens, by tokenizers that add one, the other, or none."""

import dataclasses
import functools
import json
import shutil

import pytest
from reference import plain_score
from support import settings_for
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from dataset_descriptions import describe
from lora_tradeoffs.adaptation.analysis import Adaptation, AdaptationOptions, TaskUnit
from lora_tradeoffs.gradients.analysis import GradientAnalysis, GradientOptions, GradientUnit
from lora_tradeoffs.measuring.subjects import find_subjects
from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base
from lora_tradeoffs.retention.analysis import Retention, RetentionOptions
from lora_tradeoffs.retention.benchmarks import Benchmarks, text_log_likelihoods
from lora_tradeoffs.retention.representation import compare, observe

slow = pytest.mark.slow
BOS, EOS = "<|im_start|>", "<|im_end|>"
TEMPLATES = {"none": "$A", "bos": f"{BOS} $A", "eos": f"$A {EOS}", "both": f"{BOS} $A {EOS}"}
TEXTS = ["Ice is frozen water. " * 9, f"One line.\nA {EOS} in the text, and its end."]
PIQA = {"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Turn the jar over", "label": 0}


@pytest.fixture(
    scope="module",
    params=["bos", "eos", *(pytest.param(name, marks=slow) for name in ("none", "both"))],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def base(kind, tiny, tmp_path_factory):
    """The two-layer model with SmolLM2's vocabulary, whose tokenizer adds what its kind says."""
    folder = tmp_path_factory.mktemp("bases") / f"adds_{kind}"
    shutil.copytree(tiny, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = [(BOS, tokenizer.bos_token_id), (EOS, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(TEMPLATES[kind], None, special)
    tokenizer.save_pretrained(folder)
    base = prepare_base(settings_for(model=str(folder)))
    added = [kind in ("bos", "both"), kind in ("eos", "both")]
    ids = load_tokenizer(base)("a b").input_ids
    assert [ids[0] == special[0][1], ids[-1] == special[1][1]] == added
    return base


@pytest.fixture(scope="module")
def model(base):
    return load_base(base).eval()


@functools.cache
def vocabulary(folder):
    """The tokenizer without templates, and without added tokens, which a text could contain."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    return Tokenizer.from_str(json.dumps(definition | {"post_processor": None, "added_tokens": []}))


def encoded(base, text, with_bos=False):
    return [1] * with_bos + vocabulary(base.tokenizer_folder).encode(text).ids


def test_held_out_text_is_scored_once_after_one_bos(base, model):
    tokenizer = load_tokenizer(base)
    scores = text_log_likelihoods(model, tokenizer, TEXTS, max_length=16)
    assert scores.tokens.tolist() == [len(encoded(base, text)) for text in TEXTS]
    for text, found in zip(TEXTS, scores.log_likelihoods, strict=True):
        ids, total = [tokenizer.bos_token_id, *encoded(base, text)], 0.0
        for start in range(1, len(ids), 16):
            end = min(start + 16, len(ids))
            # every window is as long as it can be; only what no window had is scored
            total += plain_score(model, ids[max(0, end - 17) : start], ids[start:end])[0]
        assert found == pytest.approx(total, abs=1e-3)


def test_benchmarks_have_one_bos_and_choices_without_eos(kind, base, model, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(PIQA) + "\n")
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "test.jsonl").write_text(json.dumps({"page": TEXTS[0]}) + "\n")
    settings = settings_for(data=str(tmp_path))
    benchmarks = Benchmarks(settings, load_tokenizer(base), ["piqa", "wikitext"])
    piqa, wikitext = benchmarks.measure(model)
    context = encoded(base, "Question: Open a jar\nAnswer:", kind in ("bos", "both"))
    expected = [
        plain_score(model, context, encoded(base, f" {PIQA[s]}"))[0] for s in ("sol1", "sol2")
    ]
    assert piqa.log_likelihoods == [pytest.approx(expected, abs=1e-4)]
    (text,) = benchmarks.tasks["wikitext"].instances[0].args
    whole = plain_score(model, [1], encoded(base, text))[0]
    assert wikitext.log_likelihoods == [pytest.approx([whole], abs=1e-3)]
    assert wikitext.items["tokens"].tolist() == [len(encoded(base, text))]


def read_by(model, work):
    """The rows of tokens that the model reads while `work` runs, without their padding."""
    rows = []

    def keep(_, args):
        for row in args[0].tolist():
            while row and row[-1] in (0, 2):  # what scoring and the collator pad with
                row.pop()
            while row and row[0] == 0:
                row.pop(0)
            rows.append(row)

    handle = model.get_input_embeddings().register_forward_pre_hook(keep)
    try:
        work()
    finally:
        handle.remove()
    return [tuple(row) for row in rows]


def texts_of(analysis, subject, task, split, completion=False):
    """The prepared rows' prompts, with their completions if asked."""
    rows = analysis.task(subject, task).split(split)
    return [row["prompt"] + (row["completion"] if completion else "") for row in rows]


@pytest.mark.parametrize("shots", [0, 2])
def test_evaluation_reads_the_prompt_after_one_bos(kind, base, model, shots):
    settings = settings_for(study=f"adds_{kind}")
    options = AdaptationOptions(limit=4, shots=shots, dtype="fp32")
    analysis = Adaptation(settings, base, options)
    (subject,) = find_subjects(settings, base)
    for task in ("sst2", "squad_v2"):
        unit = TaskUnit(subject, "validation", task, 4, shots)
        rows = analysis.rows(unit)
        prompts, answers = rows["prompt"][:], rows["completion"][:]
        read = read_by(model, lambda unit=unit: analysis.measure(model, unit, 4_096))
        examples = analysis.shots(unit) if shots else []
        start = "".join(asked + answer + "\n\n" for asked, answer in examples)
        assert len(examples) == shots
        if not shots:  # validation loss is that of the prompt and its right answer
            whole = [p + a for p, a in zip(prompts, answers)]
            prompts = whole if describe(task).is_classification else [*prompts, *whole]
        expected = {tuple(encoded(base, start + p, kind in ("bos", "both"))) for p in prompts}
        assert expected == {row for row in read if len(row) > 9}  # else a generated token
        assert describe(task).is_classification or len(read) > len(prompts)


def test_gradients_are_of_the_rows_that_are_trained(kind, base, model):
    settings = settings_for(study=f"adds_{kind}")
    analysis = GradientAnalysis(settings, base, GradientOptions(2, 2, "fp32"))
    (subject,) = find_subjects(settings, base)
    unit = GradientUnit(subject, "similar", ("sst2", "qqp"))
    read = read_by(model, lambda: analysis.measure(model, unit))
    known = {
        tuple(encoded(base, text, kind in ("bos", "both")))
        for task in unit.tasks
        for text in texts_of(analysis, subject, task, "train", completion=True)
    }
    assert len(read) == 8 and set(read) <= known
    rows = analysis.task(subject, "sst2").split("train")
    assert all(ids[-1] == 2 and ids.count(2) == 1 for ids in rows["input_ids"][:])


def test_drift_is_read_on_text_and_prompts_after_one_bos(kind, base, model):
    settings = settings_for(study=f"adds_{kind}")
    analysis = Retention(settings, base, RetentionOptions(documents=2, dtype="fp32"))
    with_bos = kind in ("bos", "both")
    (subject,) = find_subjects(settings, base)
    subject = dataclasses.replace(subject, family="similar")
    passages = analysis.passages(subject)
    for name, parts in passages.items():
        read = read_by(model, lambda parts=parts: compare(observe(model, parts), model))
        assert len(read) == 2 * len(parts)
        if name == "text":
            documents = [
                encoded(base, text) for texts in analysis.texts().values() for text in texts
            ]
            known = {tuple(ids[i : i + 128]) for ids in documents for i in range(0, len(ids), 128)}
            assert {row[with_bos:] for row in read} <= known
            assert {row[:1] for row in read} == {(1,)} or not with_bos
            continue
        known = [
            encoded(base, t, with_bos)
            for t in texts_of(analysis, subject, name, "validation", True)
        ]
        assert set(read) <= set(map(tuple, known))
