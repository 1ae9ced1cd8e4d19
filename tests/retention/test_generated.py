"""Benchmarks that are answered in text: lm-eval's texts and scores, and what cannot be asked."""

import json
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from reference import peer_results
from support import settings_for, write_benchmark

from config import BENCHMARK_GROUPS, UserError
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.retention.benchmark_checks import check_requests
from lora_tradeoffs.retention.benchmark_tasks import TaskLoader
from lora_tradeoffs.retention.benchmarks import Benchmarks
from lora_tradeoffs.retention.units import RetentionOptions
from retention_eval import main

slow = pytest.mark.slow
MATHS = {
    "question": "Ann has 2 eggs and eats one. How many are left?",
    "answer": "2 - 1 = 1\n#### 1",
}
REASONING = {"input": "not ( True ) is", "target": "False"}
INSTRUCTION = {
    "key": 1,
    "prompt": "Write two sentences about ice, without commas.",
    "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_sentences"],
    "kwargs": [{}, {"relation": "at least", "num_sentences": 2}],
}


def short_answers(benchmarks, most):
    """The benchmarks with answers of at most so many tokens."""
    for task in benchmarks.tasks.values():
        for instance in task.instances:
            instance.args[1]["max_gen_toks"] = most
    return benchmarks


@pytest.mark.parametrize(
    ("which", "rows", "shots", "most"),
    [
        ("tiny_model", 6, 2, 24),
        pytest.param("smollm2_model", 12, 4, None, marks=slow),
        pytest.param("smollm2_model", 8, None, None, marks=slow),
    ],
)
def test_gsm8k_has_lm_evals_texts_and_scores(
    which, rows, shots, most, tokenizer, real_data, tmp_path, request
):
    model, asked = request.getfixturevalue(which), {}
    benchmarks = Benchmarks(settings_for(data=real_data), tokenizer, ["gsm8k"], shots, rows)
    assert benchmarks.num_fewshot == (5 if shots is None else shots)
    if most:
        short_answers(benchmarks, most)
        asked["gen_kwargs"] = {"max_gen_toks": most}
    (ours,) = benchmarks.measure(model)
    peer = peer_results(model, tokenizer, real_data, ["gsm8k"], rows, shots, tmp_path, asked)
    by_filter = {}
    for sample in sorted(peer["samples"]["peer_gsm8k"], key=lambda s: s["doc_id"]):
        by_filter.setdefault(sample["filter"], []).append(sample)
    theirs = by_filter["strict-match"]
    assert [a["prompt"] for a in ours.answers] == [s["arguments"][0][0] for s in theirs]
    assert [a["output"] for a in ours.answers] == [s["resps"][0][0] for s in theirs]
    scores = peer["results"]["peer_gsm8k"]
    for name, samples in by_filter.items():
        assert ours.metrics[f"exact_match,{name}"] == scores[f"exact_match,{name}"]
        assert ours.stderrs[f"exact_match,{name}"] == scores[f"exact_match_stderr,{name}"]
        own = ours.items[f"exact_match,{name}"]
        assert own.tolist() == [s["exact_match"] for s in samples]
    assert next(iter(ours.metrics)) == "exact_match,strict-match"
    assert (ours.n, ours.chance, ours.truncated) == (rows, 0, 0)


def test_answers_end_at_their_stop_strings_and_contexts_lose_their_beginning(
    tiny_model, tokenizer, real_data, tmp_path
):
    """Every row at its own; HFLM's batches of one do the same."""
    benchmarks = Benchmarks(settings_for(data=real_data), tokenizer, ["gsm8k"], 1, 6)
    (free,) = short_answers(benchmarks, 24).measure(tiny_model)
    word = tokenizer.decode(tokenizer(free.answers[0]["output"]).input_ids[5:7])
    for instance in benchmarks.tasks["gsm8k"].instances:
        instance.args[1]["until"] = [word, "never said"]
    (cut,) = benchmarks.measure(tiny_model)
    for whole, short in zip(free.answers, cut.answers, strict=True):
        assert short["output"] == whole["output"].split(word)[0]
    assert cut.answers[0]["output"] != free.answers[0]["output"]
    lengths = [len(tokenizer(a["prompt"]).input_ids) for a in free.answers]
    window = sorted(lengths)[3] + 24
    (narrow,) = benchmarks.measure(tiny_model, max_length=window)
    assert narrow.truncated == sum(n > window - 24 for n in lengths) == 2
    asked = {"gen_kwargs": {"max_gen_toks": 24, "until": [word, "never said"]}}
    peer = peer_results(
        tiny_model, tokenizer, real_data, ["gsm8k"], 6, 1, tmp_path, asked, max_length=window
    )
    texts = {s["doc_id"]: s["resps"][0][0] for s in peer["samples"]["peer_gsm8k"]}
    assert [a["output"] for a in narrow.answers] == [texts[i] for i in range(6)]
    with pytest.raises(UserError, match=r"answers of 24 tokens do not fit into .* window of 20"):
        benchmarks.measure(tiny_model, max_length=20)


@pytest.mark.parametrize("name", ["bbh_cot_fewshot_navigate", pytest.param("bbh", marks=slow)])
def test_examples_that_a_definition_holds_are_shown(name, tiny_model, tokenizer, tmp_path):
    """BBH's: three each; a folder's rows are none of them."""
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks" / "bbh" / "cot_fewshot").glob("[a-z]*.yaml")
    leaves = [f"bbh_cot_fewshot_{file.stem}" for file in files] if name == "bbh" else [name]
    for leaf in leaves:
        write_benchmark(tmp_path, leaf, "test", [REASONING] * 2)
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, [name])
    (result,) = short_answers(benchmarks, 4).measure(tiny_model)
    assert (result.task, result.n, result.chance) == (name, 2 * len(leaves), 0)
    assert benchmarks.num_fewshot == 3 and list(result.metrics) == ["exact_match"]
    assert all(a["prompt"].count("Let's think step by step") == 4 for a in result.answers[:2])
    assert result.items["exact_match"].mean() == result.metrics["exact_match"]


def test_groups_of_benchmarks_have_names():
    options = RetentionOptions(tasks=("reasoning", "commonsense", "piqa", "hellaswag"))
    named = ("gsm8k", "bbh", "hellaswag", "arc_challenge", "winogrande", "piqa")
    assert options.tasks == named and RetentionOptions().tasks == BENCHMARK_GROUPS["commonsense"]


def test_items_are_paired_and_answers_kept(tiny, tmp_path, capsys):
    """Base and a copy of it, asked with the examples of the definition and with one."""
    rows = [MATHS | {"question": f"What is {i} + 1?"} for i in range(6)]
    for split in ("test", "train"):
        write_benchmark(tmp_path / "rows", "gsm8k", split, rows)
    for text in ("wikitext", "prose"):
        write_benchmark(tmp_path / "rows", text, "test", [{"page": "Ice is frozen water."}] * 2)
    copy = shutil.copytree(tiny, tmp_path / "copy")
    flags = ["--model", str(tiny), "--data", str(tmp_path / "rows"), "--study", "generated"]
    flags += ["--runs", str(copy), "--dtype", "fp32", "--no-figures", "--tasks", "gsm8k"]
    assert main(flags) == 0 and main([*flags, "--num-fewshot", "1"]) == 0
    assert "gsm8k (1 shots)" in (table := capsys.readouterr().out) and "gsm8k (5 shots)" in table
    assert "the base is at chance (not two standard errors above it) on gsm8k" in table
    folder = settings_for(study="generated").document("retention").parent
    records = pd.DataFrame(read_json(folder / "retention.json")["records"])
    lost = records[(records.metric == "forgetting") & (records.task == "gsm8k")]
    assert set(lost.shots) == {1, 5} and set(lost.of) == {"exact_match,strict-match"}
    assert set(lost.value) == {0} and set(lost.test) == {"exact McNemar"}
    base = records[(records.run == "base") & (records.task == "gsm8k")]
    assert set(base.chance) == {0}
    assert set(base.metric) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    for run in ("base-0", "copy-0"):
        items = Results(folder).items(f"{run}-gsm8k-5shot")
        assert items.keys() == set(base.metric)
        assert len(items["exact_match,strict-match"].items) == 6
    samples = (folder / "samples" / "base-0-gsm8k-5shot.jsonl").read_text().splitlines()
    sample = json.loads(samples[0])
    assert len(samples) == 6 and sample["target"] == MATHS["answer"]
    assert sample["prompt"].endswith("Question: What is 0 + 1?\nAnswer:")


# --------------------------------------------------------------------------------- bad input


def load(folder, name, shots=0):
    return TaskLoader(settings_for(data=str(folder)), [name], shots).load()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"do_sample": True, "temperature": 0.7}, "does not take the greedy answer (do_sample)"),
        ({"temperature": 0.7}, "does not take the greedy answer (do_sample)"),
        ({"do_sample": False, "num_beams": 4}, "the greedy answer (num_beams)"),
        ({"repetition_penalty": 1.2}, "the greedy answer (repetition_penalty)"),
    ],
)
def test_answers_that_are_not_greedy_are_refused(tmp_path, options, says, monkeypatch):
    write_benchmark(tmp_path, "gsm8k", "test", [MATHS] * 2)
    task = load(tmp_path, "gsm8k")["tasks"]["gsm8k"]
    task.config.generation_kwargs = {"until": ["."]} | options
    with pytest.raises(UserError) as error:
        check_requests("gsm8k", task)
    assert says in str(error.value)
    task.config.generation_kwargs = {"do_sample": False, "temperature": 0.7, "num_beams": 1}
    check_requests("gsm8k", task)


def test_code_that_a_model_writes_is_not_run(tmp_path):
    row = {"task_id": "a/0", "prompt": "def f():", "entry_point": "f", "test": "f()"}
    write_benchmark(tmp_path, "humaneval", "test", [row | {"canonical_solution": " pass"}] * 2)
    with pytest.raises(UserError, match="benchmark humaneval runs the code that the model writes"):
        load(tmp_path, "humaneval")


def test_a_bad_line_of_a_generated_benchmark_is_named(tmp_path):
    path = write_benchmark(tmp_path, "gsm8k", "test", [MATHS, MATHS | {"question": " "}, MATHS])
    with pytest.raises(UserError, match="field 'answer' is missing") as error:
        write_benchmark(tmp_path, "gsm8k", "test", [MATHS, {"question": "What?"}])
        load(tmp_path, "gsm8k")
    assert f"{path}:2: " in str(error.value)


def test_a_package_that_a_benchmark_lacks_is_named(tmp_path, monkeypatch):
    write_benchmark(tmp_path, "ifeval", "train", [INSTRUCTION] * 2)
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ifeval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "immutabledict", None)
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(UserError, match=r"ifeval needs the package \w+: pip"):
        load(tmp_path, "ifeval")


def test_nltk_data_that_is_missing_is_named(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setattr(nltk, "download", lambda *_: False)
    write_benchmark(tmp_path, "ifeval", "train", [INSTRUCTION] * 2)
    with pytest.raises(UserError, match=r"needs NLTK's data punkt_tab: python -m nltk.downloader"):
        load(tmp_path, "ifeval")


def test_ifeval_is_scored_by_lm_evals_own_checks(tmp_path, tiny_model, tokenizer):
    rows = [INSTRUCTION | {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}] * 3
    write_benchmark(tmp_path, "ifeval", "train", rows)
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, ["ifeval"])
    (result,) = short_answers(benchmarks, 8).measure(tiny_model)
    followed = ["," not in answer["output"] for answer in result.answers]
    assert result.items["prompt_level_strict_acc"].tolist() == followed
    assert next(iter(result.metrics)) == "prompt_level_strict_acc" and result.chance == 0
    assert "inst_level_strict_acc" not in result.items and benchmarks.num_fewshot == 0
