"""A task of one's own, as a task file without code, and a family of one's own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from support import assert_one_line_error, settings_for

import data_preprocessing
import dataset_descriptions
import eval as evaluation
from config import DATA_SEED, FAMILIES, UserError
from dataset_descriptions import DESCRIPTIONS, describe, family_of, named_family
from lora_tradeoffs.adaptation.metrics import score
from lora_tradeoffs.data.preparation import check_metrics, prepare
from lora_tradeoffs.files import read_json
from lora_tradeoffs.measuring.results import Results
from lora_tradeoffs.measuring.subjects import find_subjects
from lora_tradeoffs.models.base import prepare_base
from lora_tradeoffs.tables.frames import load_records
from lora_tradeoffs.task_yaml import describe_fields
from lora_tradeoffs.training.row_order import task_shares
from multi_task_training import main as train

AG_NEWS = """\
task: ag_news
training_split: train
validation_split: validation
test_split: test
doc_to_text: "{{text}}\\nTopic:"
doc_to_target: label
doc_to_choice: [World, Sports, Business, Technology]
truncate: text
metric_list:
  - metric: acc
  - metric: f1
family: news
"""
SKY = """\
training_split: train
test_split: test
doc_to_text: "Sky: {{ sky | trim }}\\nWeather:"
doc_to_target: weather
doc_to_choice: [heavy rain, sun, heavy snow]
group_by: sky
"""
OPTIONS = """\
training_split: train
test_split: test
doc_to_text: sky
doc_to_target: "{{options.index(weather)}}"
doc_to_choice: "{{options}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ANSWER = """\
training_split: train
test_split: test
doc_to_text: "{{sky}} Weather:"
doc_to_target: "It is {{weather}}. #### {{number}}"
generation_kwargs: {max_gen_toks: 12, until: ["\\n"]}
metric_list: [{metric: exact_match, regexes_to_ignore: [",", "(?s).*#### "]}, {metric: rougeL}]
filter_list:
  - name: strict
    filter:
      - {function: regex, regex_pattern: "#### (-?[0-9.,]+)"}
      - {function: take_first}
  - {name: whole, filter: [{function: take_first}]}
"""
WEATHERS = ("heavy rain", "sun", "heavy snow")


def write_task(folder, name, text, rows=((60, 0), (15, 60))):
    """A task file, and rows of train and test: so many, from this number on."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "task.yaml").write_text(text, encoding="utf-8")
    for split, (count, start) in zip(("train", "test"), rows):
        lines = []
        for n in range(start, start + count):
            row = {"sky": f" Day {n // 2} of the month, hour {n}. ", "weather": WEATHERS[n % 3]}
            row["null"] = None
            turned = WEATHERS[n % 2 :] + WEATHERS[: n % 2]
            lines.append(json.dumps({**row, "options": turned, "number": 1000 + n}) + "\n")
        (folder / name / f"{split}.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    grouped = SKY.replace("group_by: sky", "group_by: '{{sky.split()[1]}}'")
    write_task(folder, "sky", grouped, ((60, 0), (60, 60)))
    write_task(folder, "options", OPTIONS)
    write_task(folder, "answer", ANSWER)
    sample = Path(__file__).parent.parent / "data" / "sample"
    shutil.copytree(sample / "sst2", folder / "sst2")
    shutil.copytree(sample / "prose", folder / "prose")
    settings_for(data=str(folder), preset="demo")
    return folder


# ------------------------------------------------------------------------------ reading a file


def test_a_file_becomes_the_dataclass_of_the_built_in_tasks(tmp_path):
    write_task(tmp_path, "ag_news", AG_NEWS)
    settings_for(data=str(tmp_path), preset="demo")
    task, row = describe("ag_news"), {"text": "Rates rise", "label": 2}
    assert type(task) is type(describe("sst2"))
    assert task.prompt_parts(row) == ("", "Rates rise", "\nTopic:")
    assert task.completion(row) == " Business" and task.label(row) == 2
    assert task.completion({"text": "x", "label": "Sports"}) == " Sports"
    assert (task.metrics, task.own_family) == (("accuracy", "f1"), "news")
    assert family_of(["ag_news"]) == named_family("news") == "news"
    assert family_of(["ag_news", "sst2"]) == "sst2+ag_news"
    assert family_of(["mnli", "sst2"]) == "similar" and "ag_news" not in FAMILIES["similar"]


def test_templates_are_rendered_as_lm_eval_renders_them(rows):
    from lm_eval.utils import apply_template

    row = json.loads((rows / "answer" / "train.jsonl").read_text().splitlines()[3])
    for name, text in (("answer", ANSWER), ("options", OPTIONS)):
        fields, task = yaml.safe_load(text), describe(name)
        prompt = row["sky"] if name == "options" else apply_template(fields["doc_to_text"], row)
        target = apply_template(fields["doc_to_target"], row)
        assert task.prompt(row) == prompt
        learned = row["options"][int(target)] if name == "options" else target
        assert task.completion(row) == " " + learned
    template = "{{ sky | regex_replace('Day', 'On day') }}\n"
    from lora_tradeoffs.task_description import render

    assert render("doc_to_text", template, row) == apply_template(template, row)


ROW = {"q": " Why?", "n": 1, "right answer": "b", "code": "[1, 2]", "texts": ["x", "y"], "k": "B"}
ROW |= {"both": {"text": ["a", "b"], "label": ["A", "B"]}, "sp": " b", "options": ["a", "b"]}
CHOICES = {"doc_to_text": "Q: {{q}}", "doc_to_choice": ["a", "b"]}
LIKE_LM_EVAL = [
    {**CHOICES, "doc_to_target": "right answer"},
    {**CHOICES, "doc_to_target": 1, "doc_to_choice": "options", "dataset_name": None},
    {**CHOICES, "doc_to_target": "n", "doc_to_choice": {"A": "a", "B": "b"}},
    {**CHOICES, "doc_to_target": "{{both.label.index(k)}}", "doc_to_choice": "{{both.text}}"},
    {**CHOICES, "doc_to_target": "n", "doc_to_choice": "['{{q}}', 'b']"},
    {**CHOICES, "doc_to_target": "sp", "doc_to_choice": [" a", " b"], "target_delimiter": ""},
    {**CHOICES, "doc_to_text": "Q: {{q}}\nA: ", "doc_to_target": "n", "target_delimiter": ""},
    {"doc_to_text": "q", "doc_to_target": "right answer", "should_decontaminate": True},
    {"doc_to_text": "{{q}}", "doc_to_target": "code"},
    {"doc_to_text": "{{q}}", "doc_to_target": "{{texts}}", "generation_kwargs": {"until": "x"}},
]


@pytest.mark.parametrize("fields", LIKE_LM_EVAL)
def test_fields_mean_what_they_mean_in_lm_eval(tmp_path, tokenizer, fields):
    """Prompt, choices, target and their tokens, against lm-eval's task of the same fields."""
    from lm_eval.api.task import ConfigurableTask

    from lora_tradeoffs.data.encoding import encode

    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    files = {"data_files": {"train": str(path), "test": str(path)}}
    fields = fields | {"dataset_path": "json", "dataset_kwargs": files}
    fields |= {"training_split": "train", "test_split": "test"}
    fields["output_type"] = "multiple_choice" if "doc_to_choice" in fields else "generate_until"
    theirs = ConfigurableTask(config={"task": "own", "metric_list": [], **fields})
    doc = theirs.test_docs()[0]
    theirs.build_all_requests(limit=1)
    requests = [instance.args for instance in theirs.instances]
    target = theirs.doc_to_target(doc)

    ours = describe_fields("own", fields, lambda field, reason: UserError(f"{field} {reason}"))
    if ours.has_choices:
        target = theirs.doc_to_choice(doc).index(target) if isinstance(target, str) else target
        texts = [ours.prompt(ROW) + ours.delimiter + choice for choice in ours.choices(ROW)]
        assert texts == ["".join(request) for request in requests]
        assert ours.label(ROW) == target
        row = encode(tokenizer, ours, ROW, 64)
        context = requests[target][0].rstrip()
        assert row["input_ids"][:-1] == tokenizer(texts[target]).input_ids
        assert row["prompt_length"] == len(tokenizer(context).input_ids)
    else:
        assert ours.prompt(ROW) == requests[0][0]
        assert ours.references(ROW) == (target if isinstance(target, list) else [target])
        stops = requests[0][1]["until"]
        assert list(ours.stops) == ([stops] if isinstance(stops, str) else stops)


def test_a_template_that_renders_a_list_of_other_than_texts_is_refused():
    fields = {"doc_to_text": "{{q}}", "doc_to_target": "{{code}}"}
    fields |= {"training_split": "train", "test_split": "test"}
    task = describe_fields("own", fields, lambda field, reason: UserError(field))
    assert task.problem(ROW) == "doc_to_target renders [1, 2], no list of texts; name a column"


def test_two_task_files_of_one_name_are_refused_unless_they_say_the_same(tmp_path, monkeypatch):
    write_task(tmp_path / "rows", "sky", SKY)
    (tmp_path / "sky.yaml").write_text("task: sky\n" + SKY)
    monkeypatch.setenv("TASKS_DIR", str(tmp_path))
    settings_for(data=str(tmp_path / "rows"), preset="demo")
    with pytest.raises(UserError, match=r"task.yaml and .* are two tasks sky"):
        describe("sky")
    (tmp_path / "sky.yaml").write_text("# the same fields\n" + SKY)
    settings_for(data=str(tmp_path / "rows"), preset="demo")
    assert describe("sky").source_file.endswith("rows/sky/task.yaml")


def test_the_page_shows_what_was_understood_and_an_example(rows, inside):
    page = inside(dataset_descriptions.main, "sky", "--data", rows, "--preset", "demo").stdout
    for part in (
        "sky/task.yaml",
        "heavy rain",
        "validation carved from train",
        "Weather:",
        "hour 0",
    ):
        assert part in page


BAD = {
    "doc_to_text: !function a.b": ("task.yaml:4", "doc_to_text", "!function", "no Python"),
    "process_docs: x": (":11", "process_docs is no field"),
    "include: other.yaml": (":11", "include is no field"),
    "doc_to_txt: x": (":11", "doc_to_txt is no field", "did you mean doc_to_text?"),
    "metric_list: !!python/name:os.system": (":11", "metric_list", "python/name", "no Python"),
    "doc_to_text: '{{sky'": (":4", "doc_to_text is no Jinja template"),
    "doc_to_text: hello there": (":4", "doc_to_text is neither a column"),
    "test_split:": (":3", "test_split is missing"),
    "no test_split": ("test_split is missing",),
    "no training_split": ("training_split is missing",),
    "doc_to_choice: [yes, no]": (":6", "doc_to_choice holds True", "quotation marks"),
    "doc_to_choice: [rain, rain]": ("doc_to_choice is", "each once"),
    "metric_list: [{metric: rougeL}]": ("metric_list has rougeL", "acc, f1, acc_norm"),
    "metric_list: [{metric: a, hf_evaluate: true}]": ("metric_list", "no Python"),
    "metric_list: [{metric: acc, higher_is_better: false}]": ("metric_list acc: of every metric",),
    "truncate: cloud": ("truncate is 'cloud'", "doc_to_text does not have"),
    "generation_kwargs: {do_sample: true}": ("generation_kwargs samples",),
    "family: similar": ("family 'similar' is taken",),
    "output_type: generate_until": ("output_type must be multiple_choice",),
}
OF_ROWS = {
    "doc_to_text: '{{cloud}}'": ("test.jsonl:1", "doc_to_text fails", "'cloud' is undefined"),
    "doc_to_text: '{{sky[999:]}}'": ("test.jsonl:1", "doc_to_text renders nothing"),
    "doc_to_text: '{{sky.__class__.mro()}}'": ("test.jsonl:1", "doc_to_text fails", "unsafe"),
    "doc_to_target: sky": ("test.jsonl:1", "doc_to_target gives", "none of the choices (0 heavy"),
    "doc_to_target: '7'": ("test.jsonl:1", "doc_to_target gives '7'"),
    "doc_to_target: cloud": ("test.jsonl:1", "doc_to_target is the column 'cloud'"),
    "doc_to_text: '{{sky}} {{null}}'": ("test.jsonl:1", "doc_to_text fails", "is null"),
}


def changed(text, change):
    """The task file with a field replaced, added, or left out ("no FIELD")."""
    field = change.removeprefix("no ").partition(":")[0]
    lines = text.splitlines()
    kept = [i for i, line in enumerate(lines) if not line.startswith(f"{field}:")]
    if change.startswith("no "):
        return "\n".join(lines[i] for i in kept) + "\n"
    lines = [line if i in kept else change for i, line in enumerate(lines)]
    return "\n".join(lines + [change] * (len(kept) == len(lines))) + "\n"


@pytest.mark.parametrize("change", BAD)
def test_what_is_wrong_in_a_file_is_one_line_with_file_and_field(tmp_path, change):
    text = "\n".join(["task: sky", *SKY.splitlines()[:6], "# 8", "# 9", "# 10"])
    write_task(tmp_path, "sky", changed(text, change))
    settings_for(data=str(tmp_path), preset="demo")
    with pytest.raises(UserError) as error:
        describe("sky")
    line = str(error.value)
    assert line.startswith(f"{tmp_path}/sky/task.yaml:") and len(line.splitlines()) == 1
    for part in BAD[change]:
        assert part in line, line


@pytest.mark.parametrize("change", OF_ROWS)
def test_what_a_row_makes_wrong_is_one_line_with_the_rows_file_and_the_field(
    tmp_path, inside, smollm2, change
):
    write_task(tmp_path, "sky", changed(SKY, change).replace("group_by: sky\n", ""))
    process = inside(data_preprocessing.main, "sky", "--data", tmp_path, "--preset", "demo")
    assert_one_line_error(process, *OF_ROWS[change])


def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused(tmp_path, tokenizer):
    text = SKY.replace("[heavy rain, sun, heavy snow]", "options").replace("group_by: sky\n", "")
    write_task(tmp_path, "sky", text)
    path = tmp_path / "sky" / "train.jsonl"
    path.write_text(path.read_text().replace('"sun"', '"heavy rain"'))
    settings = settings_for(data=str(tmp_path), preset="demo", study="own")
    with pytest.raises(UserError, match="sky: no train row"):
        prepare(settings, tokenizer, ["sky"], 128, 100)


@pytest.mark.parametrize(
    ("metric", "parts"),
    [
        ("{metric: chrf}", ["chrf", "no such metric of single texts"]),
        ("{metric: no_such}", ["no_such", "no such metric"]),
        ("{metric: exact_match, ignore: 1}", ["exact_match failed", "ignore"]),
        ("{metric: acc}", ["metric_list has acc"]),
    ],
)
def test_a_metric_of_the_wrong_kind_is_refused(tmp_path, metric, parts):
    text = "\n".join(line for line in ANSWER.splitlines() if "metric_list" not in line)
    write_task(tmp_path, "answer", f"{text}\nmetric_list: [{metric}]\n")
    settings_for(data=str(tmp_path), preset="demo")
    with pytest.raises(UserError) as error:
        check_metrics(describe("answer"))
    for part in (f"{tmp_path}/answer/task.yaml", *parts):
        assert part in str(error.value)


# ------------------------------------------------------------------------------ the metric


def test_the_metric_is_lm_evals_on_the_same_outputs(tmp_path):
    """GSM8K's own task file, against lm-eval's task made of the same file."""
    from importlib.resources import files

    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask

    text = (files("lm_eval") / "tasks" / "gsm8k" / "gsm8k.yaml").read_text()
    answers = ["9 * 2 = 18.\n#### 18", "So\n#### 1,000", "#### 70000", "#### -3", "#### 2.5"]
    outputs = [
        " #### 18.",
        "It costs $1,000. #### $1,000",
        "so 70,000",
        "#### 3 or -3",
        "2.5 #### 2.50",
    ]
    rows = [{"question": f"How many, {i}?", "answer": a} for i, a in enumerate(answers)]
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    for split in ("train", "test"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    (folder / "task.yaml").write_text(text)
    settings_for(data=str(tmp_path), preset="demo")
    task = describe("gsm8k")
    assert task.metrics == ("exact_match,strict-match", "exact_match,flexible-extract")
    ours = score("gsm8k", outputs, [task.references(row) for row in rows])

    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}
    fields = {**yaml.safe_load(text), "dataset_path": "json", "dataset_name": None}
    fields |= {"dataset_kwargs": {"data_files": files}, "tag": None}
    theirs = ConfigurableTask(config=fields)
    instances = [
        Instance("generate_until", row, (task.prompt(row), {}), i, ("gsm8k", i, 1), resps=[output])
        for i, (row, output) in enumerate(zip(rows, outputs))
    ]
    for ensemble, scores in zip(theirs._filters, ours, strict=True):
        ensemble.apply(instances)
        expected = [
            theirs.process_results(i.doc, [i.filtered_resps[ensemble.name]])["exact_match"]
            for i in instances
        ]
        assert scores.items.tolist() == expected and 0 < sum(expected) < len(expected)


# ------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def study(rows, tiny):
    """A family of a built-in task and three kinds of own ones, trained for two steps, evaluated."""
    flags = ["--preset", "demo", "--model", tiny, "--data", rows, "--study", "own"]
    flags = [*map(str, flags)]
    short = ["--max-steps", "2", "--dtype", "fp32", "--set", "checkpoints=1", "batch_size=4"]
    tasks = ["answer", "options", "sst2", "sky"]
    weights = "mixing_weights=answer:1,options:1,sst2:3,sky:1"
    assert train(["--tasks", *tasks, "--lora", "4", *short, weights, *flags]) == 0
    assert evaluation.main([*flags, "--shots", "2", "--dtype", "fp32", "--no-figures"]) == 0
    return settings_for(data=str(rows), model=str(tiny), study="own", preset="demo")


def run_folder(study):
    (folder,) = (path.parent for path in study.runs_dir.glob("*/run.json"))
    return folder


def test_own_and_built_in_tasks_train_together(study):
    record = json.loads((run_folder(study) / "run.json").read_text())
    assert record["config"]["family"] == "sst2+answer+options+sky"
    assert record["run"].startswith("sst2+answer+options+sky_lora_r4")
    assert record["task_weights"]["sst2"]["examples"] == pytest.approx(0.5)
    training = json.loads((run_folder(study) / "training.json").read_text())
    assert {f"eval_{t}_accuracy" for t in ("sst2", "options", "sky")} <= set(
        training["validation"][-1]
    )


def test_a_run_is_not_measured_on_another_text_than_it_was_trained_on(study, monkeypatch):
    sky, base = DESCRIPTIONS["sky"], prepare_base(study)
    other = dict(sky.definition) | {"metric_list": [{"metric": "f1"}]}
    monkeypatch.setitem(DESCRIPTIONS, "sky", replace(sky, definition=other))
    assert len(find_subjects(study, base)) == 2  # another metric is no other text
    other["doc_to_text"] = "Another question: " + other["doc_to_text"]
    with pytest.raises(UserError, match="was trained on sky with another doc_to_text"):
        find_subjects(study, base)


def test_a_figure_is_that_of_whole_choices_scored_one_by_one(study, tokenizer):
    """Choices of several tokens, fixed or each row's own; the Trainer's and eval.py's accuracy."""
    from peft import PeftModel

    from lora_tradeoffs.models.base import load_base, prepare_base

    folder = run_folder(study)
    records = pd.DataFrame(json.loads(study.document("adaptation").read_text())["records"])
    model = PeftModel.from_pretrained(
        load_base(prepare_base(study)), folder / "checkpoint-2"
    ).eval()
    length = json.loads((folder / "run.json").read_text())["config"]["max_length"]
    for task in ("sky", "options"):
        raw = [json.loads(line) for line in (study.data_folder / task / "test.jsonl").open()]
        data = prepare(study, tokenizer, [task], length, study.examples_per_task)[task].split(
            "test"
        )
        values = []
        for row, item in zip(raw, data, strict=True):
            sums, lengths = [], []
            for choice in describe(task).choices(row):
                start = tokenizer(item["prompt"]).input_ids
                ids = torch.tensor([tokenizer(f"{item['prompt']} {choice}").input_ids])
                with torch.no_grad():
                    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
                of_choice = range(len(start) - 1, ids.shape[1] - 1)
                sums.append(sum(log_probs[i, ids[0, i + 1]].item() for i in of_choice))
                lengths.append(len(choice))
            gold = describe(task).choices(row).index(row["weather"])
            by_length = [s / n for s, n in zip(sums, lengths)]
            values.append((sums.index(max(sums)) == gold, by_length.index(max(by_length)) == gold))
        rows = records[(records.task == task) & (records.split == "test") & (records.step == 2)]
        figures = rows.set_index("metric").value
        assert figures["accuracy"] == pytest.approx(sum(v for v, _ in values) / len(values))
        if task == "options":
            assert figures["acc_norm"] == pytest.approx(sum(v for _, v in values) / len(values))


def test_validation_loss_of_choices_and_texts_is_trainings(study):
    """On the rows that training reads of them."""
    folder = run_folder(study)
    validated = read_json(folder / "training.json")["validation"][-1]
    count = read_json(folder / "run.json")["config"]["eval_examples_per_task"]
    results = Results(study.document("adaptation").parent)
    for task in ("answer", "options", "sky"):
        table = pd.read_parquet(results.items_file(f"{folder.name}-2-{task}-validation"))
        items = np.stack(table["statistics"][table["metric"] == "loss"])[:, 0]
        rows = np.random.default_rng(DATA_SEED).permutation(len(items))[:count]
        assert items[rows].mean() == pytest.approx(validated[f"eval_{task}_loss"], abs=2e-5)


def test_generated_text_has_its_metrics_and_a_baseline(study):
    records = pd.DataFrame(json.loads(study.document("adaptation").read_text())["records"])
    answer = records[(records.task == "answer") & (records.split == "test")]
    names = {"exact_match,strict", "exact_match,whole", "rougeL,strict", "rougeL,whole"}
    assert set(answer.metric) == names and "majority_answer" in set(answer.run)
    samples = (study.document("adaptation").parent / "samples").glob("*answer*test*")
    assert all("\n" not in json.loads(line)["output"] for path in samples for line in path.open())


def test_rows_of_a_group_are_not_split_and_are_resampled_together(study, tokenizer):
    data = prepare(study, tokenizer, ["sky"], 256, study.examples_per_task)["sky"]
    days = [set(data.split(split)["group"][:]) for split in ("train", "validation", "test")]
    assert days[0] & days[1] == set() and len(data.split("validation")) == 6
    items = pd.read_parquet(next(study.document("adaptation").parent.glob("items/*sky-test*")))
    assert items.groupby("metric")["group"].nunique().max() == 30
    records = pd.DataFrame(json.loads(study.document("adaptation").read_text())["records"])
    tested = records[(records.task == "sky") & (records.split == "test")].dropna(subset=["stderr"])
    assert set(tested.n) == {60} and {"f1", "accuracy"} <= set(tested.metric)  # n counts items
    few = records[(records.task == "sky") & (records.split == "validation")]
    validation = pd.read_parquet(next(study.document("adaptation").parent.glob("items/*sky-val*")))
    assert set(few.n) == {6} and validation["group"].nunique() == 3  # however few the groups


def test_documents_alone_say_what_a_reader_needs(study, monkeypatch):
    path = study.document("adaptation")
    own = json.loads(path.read_text())["meta"]["own"]
    family = "sst2+answer+options+sky"
    assert own["families"] == {family: ["sst2", "answer", "options", "sky"]}
    for name in ("answer", "options", "sky"):
        monkeypatch.delitem(dataset_descriptions.DESCRIPTIONS, name)
    monkeypatch.delitem(FAMILIES, family)
    frame = load_records(path)
    assert describe("answer").metrics[0] == "exact_match,strict"
    assert FAMILIES[family] == ("sst2", "answer", "options", "sky")
    base = frame[(frame.method == "base") & (frame.task == "sst2")]
    assert set(base.family) == {family}
    trained = frame[frame.method == "lora"]
    assert {arm.label for arm in trained.arm} == {"LoRA r=4 (checkpoints1 bs4 steps2)"} or all(
        not arm.tasks and not arm.trained_on for arm in trained.arm
    )


def test_shares_are_the_weights():
    assert task_shares([10, 30], "proportional", weights=[2, 1]) == pytest.approx([2 / 3, 1 / 3])
    assert task_shares([10, 30], "proportional") == pytest.approx([0.25, 0.75])


def test_weights_of_other_tasks_are_refused(rows, inside):
    flags = ["--tasks", "sst2", "sky", "--lora", "4", "--data", rows, "--preset", "demo"]
    for weights in (
        "sst2:2",
        "sst2:2,sky:0",
        "sst2:2,sky",
        "sst2:1,sky:1,mnli:1",
        "sst2:1,sky:1,sky:2",
    ):
        process = inside(train, *flags, "--dry-run", "--set", f"mixing_weights={weights}")
        assert_one_line_error(process, f"mixing_weights is '{weights}'", "sst2:1,sky:1")


@pytest.mark.slow
def test_a_family_of_ones_own_is_a_study_like_the_built_in_ones(rows, tiny):
    """Forgetting, drift, gradients, figures and findings, read from the documents alone."""
    import gradient_conflict
    import retention_eval
    import svd_analysis
    from lora_tradeoffs.figures.draw import FIGURES
    from lora_tradeoffs.figures.study_records import StudyRecords
    from lora_tradeoffs.report.findings import findings

    sample = Path(__file__).parent.parent / "data" / "sample"
    for name in ("hellaswag", "arc_challenge", "winogrande"):
        shutil.copytree(sample / name, rows / name, dirs_exist_ok=True)
    own = ["--model", str(tiny), "--data", str(rows), "--study", "family", "--preset", "study"]
    arms = ["--lora", "4", "--full-finetune", "--seed", "42", "43", "44", "--max-steps", "2"]
    short = ["--dtype", "fp32", "--set", "checkpoints=1", "batch_size=4", "micro_batch_size=4"]
    assert train(["--tasks", "sst2", "sky", *arms, *short, *own]) == 0
    measured = [*own, "--no-figures"]
    assert evaluation.main([*measured, "--shots", "0", "--limit", "40", "--dtype", "fp32"]) == 0
    few = ["--limit", "8", "--documents", "2", "--dtype", "fp32"]
    assert retention_eval.main([*measured, *few, "--scale-update", "0.5"]) == 0
    assert svd_analysis.main([*measured, "--top-k", "4"]) == 0
    batches = ["--batches", "2", "--batch-size", "2", "--dtype", "fp32"]
    assert gradient_conflict.main([*measured, *batches]) == 0

    dataset_descriptions.DESCRIPTIONS.pop("sky")
    FAMILIES.pop("sst2+sky")
    records = StudyRecords.load(settings_for(study="family", preset="study", data="sample"))
    for name in ("adaptation", "retention", "drift", "gradients"):
        frame = getattr(records, name)
        assert "sst2+sky" in set(frame["family"]), name
    confirmed = [f for f in findings(records) if f.family == "sst2+sky"]
    assert {"sst2", "sky"} <= {f.about for f in confirmed if f.kind == "confirmatory"}
    points = records.checkpoints
    assert set(points["family"]) == {"sst2+sky"} and points["gain"].notna().all()
    for group, figures in FIGURES.items():
        if group not in ("learning rates", "transfer"):
            for figure in figures:
                figure(records.plain)
