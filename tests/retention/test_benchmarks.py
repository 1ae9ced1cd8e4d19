"""lm-eval's numbers, on this suite's engine: against its own HFLM, on real rows."""

import os
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_llama
from reference import DEFINITIONS, Allocations, peer_results, plain_score
from support import ROOT, assert_one_line_error, settings_for, write_benchmark

from config import UserError
from lora_tradeoffs.data.sources import held_out_texts, read_jsonl
from lora_tradeoffs.files import write_json
from lora_tradeoffs.models.base import load_base, prepare_base
from lora_tradeoffs.retention.benchmark_checks import schema_problem
from lora_tradeoffs.retention.benchmark_tasks import TaskLoader
from lora_tradeoffs.retention.benchmarks import Benchmarks, quiet_lm_eval, text_log_likelihoods

slow = pytest.mark.slow
TASKS = ("hellaswag", "arc_challenge", "winogrande", "piqa", "boolq")


def measured(benchmarks, model):
    """Our results, and lm-eval's report that they are made from: it tells what was greedy."""
    from lm_eval import evaluator

    reports, evaluate = [], evaluator.evaluate

    def keep(*arguments, **options):
        reports.append(evaluate(*arguments, **options))
        return reports[-1]

    evaluator.evaluate = keep
    try:
        results = benchmarks.measure(model)
    finally:
        evaluator.evaluate = evaluate
    return results, reports[-1]


def largest_difference(model, tokenizer, data, tasks, rows, shots, folder):
    """Of a log-likelihood; greediness, prompts and figures must be equal."""
    peer = peer_results(model, tokenizer, data, tasks, rows, shots, folder)
    benchmarks = Benchmarks(settings_for(data=str(data)), tokenizer, tasks, shots, rows)
    results, report = measured(benchmarks, model)
    largest = 0.0
    for result in results:
        theirs = peer["results"][f"peer_{result.task}"]
        assert result.n == theirs["sample_len"]
        for metric, value in result.metrics.items():
            assert value == theirs[f"{metric},none"], (result.task, metric)
            assert result.stderrs[metric] == theirs[f"{metric}_stderr,none"]
            assert result.items[metric].mean() == pytest.approx(value, abs=1e-12)
        assert "acc_norm" in result.metrics or result.task in ("winogrande", "boolq")
        peers = sorted(peer["samples"][f"peer_{result.task}"], key=lambda s: s["doc_id"])
        ours = sorted(report["samples"][result.task], key=lambda s: s["doc_id"])
        for mine, other, found in zip(ours, peers, result.log_likelihoods, strict=True):
            assert mine["arguments"] == other["arguments"]
            for (a, greedy), (b, also), c in zip(
                mine["filtered_resps"], other["filtered_resps"], found, strict=True
            ):
                assert greedy == also
                largest = max(largest, abs(a - b), abs(c - b))
    return largest


@pytest.mark.parametrize(
    ("which", "shots", "rows"),
    [
        ("tiny_model", 2, 6),
        pytest.param("tiny_model", 0, 24, marks=slow),
        pytest.param("tiny_model", 2, 24, marks=slow),
        pytest.param("smollm2_model", 1, 3, marks=slow),
    ],
)
def test_every_figure_is_that_of_lm_evals_own_model(
    which, shots, rows, tokenizer, real_data, tmp_path, request
):
    model = request.getfixturevalue(which)
    assert largest_difference(model, tokenizer, real_data, TASKS, rows, shots, tmp_path) < 1e-3


def test_wikitext_is_lm_evals_rolling_log_likelihood(tiny_model, tokenizer, real_data, tmp_path):
    peer = peer_results(
        tiny_model, tokenizer, real_data, ["wikitext"], 3, 0, tmp_path, max_length=512
    )["samples"]["peer_wikitext"]
    benchmarks = Benchmarks(settings_for(data=str(real_data)), tokenizer, ["wikitext"], 0, 3)
    (result,) = benchmarks.measure(tiny_model, max_length=512)
    theirs = [s["word_perplexity"] for s in sorted(peer, key=lambda s: s["doc_id"])]
    assert result.items["log_likelihood"].tolist() == pytest.approx(
        [ll for ll, _ in theirs], rel=1e-4
    )
    assert result.items["words"].tolist() == [words for _, words in theirs]
    assert min(result.items["tokens"]) > 1024  # several windows a document
    whole = -result.items["log_likelihood"].sum() / result.items["words"].sum()
    assert result.metrics["word_perplexity"] == pytest.approx(np.exp(whole), rel=1e-9)


def test_smollm2_on_wikitext_equals_lm_eval_in_windows(smollm2_model, tokenizer, real_data):
    text = read_jsonl(Path(real_data) / "wikitext" / "test.jsonl", limit=1)[0]["page"][:2_000]
    found = text_log_likelihoods(smollm2_model, tokenizer, [text], max_length=128)
    ids = tokenizer(text).input_ids
    total, seen = 0.0, [tokenizer.bos_token_id, *ids]
    for start in range(0, len(ids), 128):
        end = min(start + 128, len(ids))
        # every window is as long as it can be; only what no window had is scored
        context = seen[max(0, end - 128) : start + 1] if start else seen[:1]
        total += plain_score(smollm2_model, context, ids[start:end])[0]
    assert found.tokens.tolist() == [len(ids)]
    assert found.log_likelihoods[0] == pytest.approx(total, rel=1e-5)


def test_a_second_model_is_measured_without_loading_again(tiny_model, tokenizer, real_data):
    settings = settings_for(data=str(real_data))
    benchmarks = Benchmarks(settings, tokenizer, ["winogrande", "piqa"], 0, 6)
    first, again = benchmarks.measure(tiny_model), benchmarks.measure(tiny_model)
    for a, b in zip(first, again, strict=True):
        assert (a.metrics, a.log_likelihoods, a.identity) == (
            b.metrics,
            b.log_likelihoods,
            b.identity,
        )
    with torch.no_grad():
        tiny_model.model.layers[0].mlp.up_proj.weight.mul_(3)
        changed = benchmarks.measure(tiny_model)
        tiny_model.model.layers[0].mlp.up_proj.weight.div_(3)
    assert changed[0].log_likelihoods != first[0].log_likelihoods
    assert [r.task for r in first] == ["winogrande", "piqa"]
    assert [r.chance for r in first] == [0.5, 0.5]


def test_an_adapter_is_measured_and_one_of_zeros_changes_nothing(base, tokenizer, real_data):
    from peft import LoraConfig, get_peft_model

    model = load_base(base).eval()
    benchmarks = Benchmarks(settings_for(data=str(real_data)), tokenizer, ["piqa"], 0, 6)
    (before,) = benchmarks.measure(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert benchmarks.measure(adapted)[0].log_likelihoods == before.log_likelihoods
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert benchmarks.measure(adapted)[0].log_likelihoods != before.log_likelihoods
    with adapted.disable_adapter():
        assert benchmarks.measure(adapted)[0].log_likelihoods == before.log_likelihoods


def test_a_model_that_computes_no_numbers_is_an_error(base, tokenizer, real_data):
    broken = load_base(base).eval()
    benchmarks = Benchmarks(settings_for(data=str(real_data)), tokenizer, ["piqa"], 0, 3)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        benchmarks.measure(broken)


@pytest.mark.slow
def test_a_group_is_one_result_over_its_tasks(tmp_path, tiny_model, tokenizer):
    for name, count in (("wmdp_bio", 3), ("wmdp_chem", 4), ("wmdp_cyber", 5)):
        row = {"question": "Which?", "choices": ["this", "that", "these", "those"]}
        rows = [row | {"question": f"Which of {k}?", "answer": k % 4} for k in range(count)]
        write_benchmark(tmp_path, name, "test", rows)
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, ["wmdp"])
    (group,) = benchmarks.measure(tiny_model)
    assert (group.task, group.n, group.chance) == ("wmdp", 12, 0.25)
    assert group.items["acc"].mean() == pytest.approx(group.metrics["acc"])
    assert group.identity["num_fewshot"] == 0


@slow
def test_mmlus_subjects_are_lm_evals(tmp_path, tiny_model, tokenizer):
    """Two examples from dev, in its order; the group is the mean over all its questions."""
    import lm_eval

    files = (Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default").glob("mmlu_*.yaml")
    subjects = sorted(file.stem for file in files)
    assert len(subjects) == 57
    for number, subject in enumerate(subjects):
        questions = [
            {"question": f"What is {i} times {number}?", "subject": subject.removeprefix("mmlu_")}
            | {"choices": [str(i * (number + k)) for k in range(4)], "answer": (i + number) % 4}
            for i in range(2, 8 + number % 3)
        ]
        write_benchmark(tmp_path, subject, "dev", questions[:3])
        write_benchmark(tmp_path, subject, "test", questions[3:])
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, ["mmlu"], 2)
    (result,) = benchmarks.measure(tiny_model)
    peer = peer_results(tiny_model, tokenizer, tmp_path, subjects, None, 2, tmp_path)
    samples = {subject: peer["samples"][f"peer_{subject}"] for subject in subjects}
    theirs = {s: sorted(rows, key=lambda r: r["doc_id"]) for s, rows in samples.items()}
    first = theirs[subjects[0]][0]["arguments"][0][0]
    assert first.startswith("The following are multiple choice questions")
    assert first.count("Answer:") == 3
    by_subject = [row for task in benchmarks.tasks for row in theirs[task]]
    assert result.items["acc"].tolist() == [row["acc"] for row in by_subject]
    found = [ll for row in by_subject for ll, _ in row["filtered_resps"]]
    assert np.ravel(result.log_likelihoods) == pytest.approx(found, abs=1e-3)
    assert (result.task, result.n, result.chance) == ("mmlu", len(by_subject), 0.25)
    assert result.metrics["acc"] == pytest.approx(np.mean([row["acc"] for row in by_subject]))


def test_a_definitions_own_number_of_examples_is_told(tmp_path, tokenizer):
    write_benchmark(tmp_path, "truthfulqa_mc1", "validation", [ROWS["truthfulqa_mc1"]] * 4)
    rows = [{**ROWS["piqa"], "goal": f"{ROWS['piqa']['goal']} {i}"} for i in range(4)]
    write_benchmark(tmp_path, "piqa", "validation", rows)  # none is its own example
    settings = settings_for(data=str(tmp_path))
    asked = Benchmarks(settings, tokenizer, ["truthfulqa_mc1", "piqa"], 2)
    assert asked.other_shots == {"truthfulqa_mc1": (0, 0)}
    assert not Benchmarks(settings, tokenizer, ["truthfulqa_mc1", "piqa"]).other_shots


@pytest.mark.slow
def test_a_group_without_a_mean_is_its_tasks(tmp_path, tiny_model, tokenizer):
    row = {"question": "Which?", "choices": ["this", "that", "these", "those"], "answer": 1}
    for name in ("wmdp_bio", "wmdp_chem", "wmdp_cyber"):
        write_benchmark(tmp_path, name, "test", [row] * 3)
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, ["wmdp"])
    benchmarks.loaded["groups"]["wmdp"].aggregate_metric_list = None
    results = benchmarks.measure(tiny_model)
    assert [(r.task, r.n) for r in results] == [(task, 3) for task in benchmarks.tasks]


def test_a_group_of_many_tasks_needs_all_of_them(tmp_path):
    write_benchmark(tmp_path, "wmdp_bio", "test", [{"question": "Which?", "choices": ["a", "b"]}])
    with pytest.raises(UserError, match=r"^wmdp: benchmark wmdp_.* needs its split test"):
        load(tmp_path, "wmdp")


def test_the_identity_tells_shots_and_rows_apart(tokenizer, real_data, tmp_path):
    def identity(data, *arguments):
        return Benchmarks(settings_for(data=str(data)), tokenizer, ["winogrande"], *arguments)

    zero, two, fewer = (
        identity(real_data, *arguments).identities["winogrande"]
        for arguments in ((0, 6), (2, 6), (0, 5))
    )
    assert len({i["requests"] for i in (zero, two, fewer)}) == 3
    assert zero["definition"] == two["definition"]
    assert (zero["shots_from"], two["shots_from"]) == (None, "validation")
    rows = read_jsonl(Path(real_data) / "winogrande" / "validation.jsonl", limit=6)
    write_benchmark(tmp_path, "winogrande", "validation", rows)
    assert identity(tmp_path, 0, 6).identities["winogrande"] == zero
    rows[0]["answer"] = {"1": "2", "2": "1"}[rows[0]["answer"]]
    write_benchmark(tmp_path, "winogrande", "validation", rows)
    relabelled = identity(tmp_path, 0, 6).identities["winogrande"]
    assert relabelled["requests"] != zero["requests"]


def test_a_context_longer_than_the_window_is_cut_and_counted(tiny_model, tokenizer, real_data):
    benchmarks = Benchmarks(settings_for(data=str(real_data)), tokenizer, ["boolq"], 0, 8)
    task = benchmarks.tasks["boolq"]
    lengths = [len(tokenizer(i.args[0]).input_ids) for i in task.instances if i.idx == 0]
    window = sorted(lengths)[4]
    (whole,) = benchmarks.measure(tiny_model)
    (cut,) = benchmarks.measure(tiny_model, max_length=window)
    assert whole.truncated == 0
    assert cut.truncated == sum(length > window for length in lengths) > 0
    for length, a, b in zip(lengths, whole.log_likelihoods, cut.log_likelihoods, strict=True):
        assert (length > window) or a == pytest.approx(b, abs=1e-4)
    longest = lengths.index(max(lengths))
    context = tokenizer(task.instances[2 * longest].args[0]).input_ids[-window:]
    expected = [
        plain_score(tiny_model, context, tokenizer(a).input_ids)[0] for a in (" no", " yes")
    ]
    assert cut.log_likelihoods[longest] == pytest.approx(expected, abs=1e-4)


def test_a_tasks_requests_are_rows_and_not_all_logits(
    tiny_model, tokenizer, real_data, monkeypatch
):
    from lora_tradeoffs.scoring import log_likelihoods as scoring

    monkeypatch.setattr(scoring, "LOGIT_BUDGET", 64 * len(tokenizer))
    settings = settings_for(data=str(real_data))
    benchmarks = Benchmarks(settings, tokenizer, ["hellaswag"], 0, 16)
    (expected,) = benchmarks.measure(tiny_model)
    vocabulary, sizes = tiny_model.config.vocab_size, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.shape[-1:] == (vocabulary,):
                sizes.append(output.numel() // vocabulary)
            return output

    with Watch():
        (found,) = benchmarks.measure(tiny_model)
    assert found.log_likelihoods == expected.log_likelihoods
    assert 0 < max(sizes) <= 64


@pytest.mark.parametrize("task", ["hellaswag", pytest.param("winogrande", marks=slow)])
def test_memory_is_that_of_the_forward_pass(smollm2_model, tokenizer, task):
    """A batch's logits over SmolLM2's vocabulary would be a third of its weights."""
    benchmarks = Benchmarks(settings_for(), tokenizer, [task], 0, 12)
    model = smollm2_model
    weights = sum(parameter.nbytes for parameter in model.parameters())
    with Allocations(model) as forward, torch.inference_mode():
        model(torch.ones((8, 128), dtype=torch.long), use_cache=False, logits_to_keep=1)
    with Allocations(model) as whole:
        benchmarks.measure(model)
    assert weights + whole.peak < 1.15 * (weights + forward.peak)


# --------------------------------------------------------------------------------- bad input


ROWS = {
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man stands.",
        "ctx_b": "he",
        "endings": ["cooks.", "flies.", "sings.", "melts."],
        "label": "0",
    },
    "arc_challenge": {
        "question": "What melts?",
        "choices": {"text": ["Ice", "Sand"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "winogrande": {
        "sentence": "Ann thanked Eve because _ had helped.",
        "option1": "Ann",
        "option2": "Eve",
        "answer": "2",
    },
    "piqa": {"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Turn the jar", "label": 0},
    "boolq": {"question": "is ice cold", "passage": "Ice is cold.", "idx": 0, "label": 1},
    "wikitext": {"page": "Ice is frozen water."},
    # its definition has the gold answer's number, 0, in place of a field's name
    "truthfulqa_mc1": {
        "question": "Is ice hot?",
        "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
    },
}


def load(folder, name, shots=0):
    return TaskLoader(settings_for(data=str(folder)), [name], shots).load()


@pytest.mark.parametrize("name", ROWS)
def test_sound_rows_of_the_original_schema_are_loaded(tmp_path, name):
    write_benchmark(tmp_path, name, DEFINITIONS[name][1], [ROWS[name]] * 2)
    with quiet_lm_eval():
        assert list(load(tmp_path, name)["tasks"]) == [name]


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("hellaswag", {"label": "4"}, "gold answer 4 is not among the 4 choices"),
        ("hellaswag", {"label": ""}, "the definition cannot be applied"),
        ("hellaswag", {"ctx_b": None}, "field 'ctx_b' is missing"),
        ("hellaswag", {"endings": ["cooks."]}, "it has 1 choice"),
        ("hellaswag", {"endings": ["cooks.", ""]}, "choice 2 is empty"),
        ("hellaswag", {"endings": "cooks."}, "field 'endings' is a text, in line 1 a list"),
        ("arc_challenge", {"answerKey": "E"}, "'E' is not in list"),
        ("winogrande", {"answer": "3"}, "KeyError: '3'"),
        ("winogrande", {"sentence": "Ann helped."}, "ValueError"),
        ("piqa", {"label": -1}, "gold answer -1 is not among the 2 choices"),
        ("piqa", {"label": "0"}, "field 'label' is a text, in line 1 a number"),
        ("boolq", {"label": 2}, "gold answer 2 is not among the 2 choices"),
        ("wikitext", {"page": " "}, "its text is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, change, says):
    rows = [ROWS[name]] * 6 + [ROWS[name] | change] + [ROWS[name]] * 4
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    path = write_benchmark(tmp_path, name, DEFINITIONS[name][1], rows)
    with pytest.raises(UserError) as error, quiet_lm_eval():
        load(tmp_path, name)
    assert f"{path}:7: " in str(error.value)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_field_that_no_line_has_is_an_error(tmp_path):
    row = {k: v for k, v in ROWS["boolq"].items() if k != "label"} | {"answer": True}
    path = write_benchmark(tmp_path, "boolq", "validation", [row] * 3)
    with pytest.raises(UserError, match="field 'label', the gold answer, is missing") as error:
        load(tmp_path, "boolq")
    assert f"{path}:1: " in str(error.value)


def test_fields_that_differ_between_lines_are_found():
    assert schema_problem([{"a": 1, "b": None}, {"a": 2.5, "b": None}]) is None
    assert schema_problem([{"a": 1}, {"a": 1, "b": 2}]) == (
        1,
        "field 'b' is missing (line 2 has it)",
    )


def test_a_missing_split_names_the_file(tmp_path):
    write_benchmark(tmp_path, "arc_challenge", "validation", [ROWS["arc_challenge"]])
    with pytest.raises(UserError, match=r"needs its split test.*test\.jsonl.*validation\.jsonl"):
        load(tmp_path, "arc_challenge")


def test_shots_come_from_train_or_leave_the_item_out(tmp_path, tokenizer):
    row = ROWS["piqa"]
    rows = [row | {"goal": f"Open jar {k}"} for k in range(3)]
    write_benchmark(tmp_path, "piqa", "validation", rows)
    with pytest.raises(UserError, match="3 shots need 4 rows, it has 3"):
        load(tmp_path, "piqa", 3)
    settings = settings_for(data=str(tmp_path))
    task = Benchmarks(settings, tokenizer, ["piqa"], 2).tasks["piqa"]
    for instance in task.instances:
        assert [instance.args[0].count(f"jar {k}") for k in range(3)] == [1, 1, 1]
    write_benchmark(
        tmp_path, "piqa", "train", [row | {"goal": f"Close door {k}"} for k in range(2)]
    )
    benchmarks = Benchmarks(settings, tokenizer, ["piqa"], 2)
    assert benchmarks.identities["piqa"]["shots_from"] == "train"
    assert all(i.args[0].count("Close door") == 2 for i in benchmarks.tasks["piqa"].instances)
    bad = write_benchmark(tmp_path, "piqa", "train", [row, row | {"label": 7}])
    with pytest.raises(UserError, match="gold answer 7") as error:
        load(tmp_path, "piqa", 1)
    assert f"{bad}:2: " in str(error.value)
    load(tmp_path, "piqa", 0)  # where nothing is shown it does not matter


def test_choices_are_tokenised_where_they_stand(blank_first_tokenizer, tmp_path):
    """With a blank before any text a choice alone has other tokens than after its context."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = blank_first_tokenizer
    model = load_base(prepare_base(settings_for(model=str(tiny_llama(tmp_path / "m", tokenizer)))))
    write_benchmark(tmp_path, "piqa", "validation", [ROWS["piqa"]])
    benchmarks = Benchmarks(settings_for(data=str(tmp_path)), tokenizer, ["piqa"])
    (found,) = benchmarks.measure(model.eval())[0].log_likelihoods
    pairs = [instance.args for instance in benchmarks.tasks["piqa"].instances]
    with quiet_lm_eval():
        peer = HFLM(pretrained=model, tokenizer=tokenizer)
        theirs = peer.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    assert found == pytest.approx([log_likelihood for log_likelihood, _ in theirs], abs=1e-4)
    for (context, choice), score in zip(pairs, found, strict=True):
        start, joint = (tokenizer(text).input_ids for text in (context, context + choice))
        assert joint[: len(start)] == start and start[0] == tokenizer.bos_token_id
        assert tokenizer(choice).input_ids[1:] != joint[len(start) :]
        assert score == pytest.approx(plain_score(model, start, joint[len(start) :])[0], abs=1e-4)


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no task 'helaswag'; close: hellaswag"):
        load(tmp_path, "helaswag")


def test_without_a_network_the_ways_out_are_named(script):
    code = (
        "from support import settings_for; from lora_tradeoffs.command_line import guarded\n"
        "from lora_tradeoffs.retention.benchmark_tasks import TaskLoader; import sys\n"
        "def main(argv=None):\n"
        "    TaskLoader(settings_for(data='hub'), ['piqa'], 0).load()\n"
        "sys.exit(guarded(main)())"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = script("-c", code, HF_HUB_OFFLINE="1", PYTHONPATH=path, HF_HOME="/nowhere")
    assert_one_line_error(process, "baber/piqa", "benchmark piqa", "--data", "--preset demo")


def test_held_out_text_has_a_source_that_is_no_wikipedia(tmp_path, real_data):
    texts = held_out_texts(settings_for(data=str(real_data)), limit=2)
    assert {name: len(documents) for name, documents in texts.items()} == {
        "wikitext": 2,
        "cnn_dailymail": 2,
    }
    write_benchmark(tmp_path, "wikitext", "test", [ROWS["wikitext"]])
    write_benchmark(tmp_path, "prose", "test", [{"page": "It rained."}])
    found = held_out_texts(settings_for(data=str(tmp_path)))
    assert found == {"wikitext": ["Ice is frozen water."], "prose": ["It rained."]}
    path = write_benchmark(tmp_path, "prose", "test", [{"page": "It rained."}, {"text": "It did."}])
    with pytest.raises(UserError, match="field 'page' is no text") as error:
        held_out_texts(settings_for(data=str(tmp_path)))
    assert f"{path}:2: " in str(error.value)


def test_nothing_of_lm_eval_is_imported_at_import(script):
    code = "import sys, lora_tradeoffs.retention.benchmarks\n"
    code += "assert not {'lm_eval', 'torch'} & set(sys.modules)"
    assert script("-c", code).returncode == 0


def test_recorded_rows_are_trusted_of_a_folder_and_never_of_the_hub(tiny, tmp_path, monkeypatch):
    from lora_tradeoffs.retention.analysis import Retention, RetentionOptions

    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path))
    recorded = {"arc_challenge": {"lm_eval": version("lm_eval")}}
    unit = SimpleNamespace(name="base-0-arc", kind="benchmark", task="arc_challenge", limit=4)
    for data in ("sample", "hub"):
        settings = settings_for(model=str(tiny), data=data, preset="demo", study=f"trust-{data}")
        analysis = Retention(settings, prepare_base(settings), RetentionOptions(dtype="fp32"))
        analysis.trusts_records = True
        analysis.benchmarks = lambda *_: SimpleNamespace(identities={"arc_challenge": "as it is"})
        request = {"benchmark": recorded}
        write_json(analysis.results.unit_file(unit.name), {"request": request, "records": []})
        expected = recorded if data == "sample" else {"arc_challenge": "as it is"}
        assert analysis.request(unit)["benchmark"] == expected
