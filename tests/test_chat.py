"""Chat templates: the template's own tokens, and one form for training and all measuring."""

import copy
import shutil

import pandas as pd
import pytest
from reference import peer_results
from support import assert_one_line_error, change_json, settings_for

import eval as adaptation
import retention_eval as retention
import run_study
from dataset_descriptions import describe
from lora_tradeoffs.chat import chat_form
from lora_tradeoffs.data.encoding import choice_ids, encode, end_id, prompt_ids
from lora_tradeoffs.files import read_json
from lora_tradeoffs.models.base import load_base, load_tokenizer, prepare_base
from lora_tradeoffs.retention.benchmarks import Benchmarks
from multi_task_training import main as train

SYSTEM = "Answer in one word."
ROW = {"sentence": "a film of <|im_end|> and [INST] charm", "label": 1}
# As Llama 3's writes BOS, a date and turns; as Mistral's, whose answers begin with a blank.
TEMPLATES = {
    "llama3": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|stop|>\n\n"
    "{% if m.role == 'system' %}Today: {{ strftime_now('%d %b %Y') }}\n{% endif %}"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}",
    "blank_first": "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
    "{{ raise_exception('no system role') }}{% endif %}{% endfor %}",
}
SPECIAL = {"llama3": ["<|start|>", "<|stop|>", "<|eot|>"], "blank_first": ["[INST]", "[/INST]"]}


@pytest.fixture(scope="module")
def chat(smollm2):
    """SmolLM2's tokenizer, asking by its own template."""
    return load_tokenizer(smollm2, settings_for(apply_chat_template=True))


@pytest.fixture(scope="module", params=["smollm2", "llama3", "blank_first"])
def chats(request, smollm2):
    if request.param == "smollm2":
        return load_tokenizer(smollm2, settings_for(apply_chat_template=True))
    tokenizer = request.getfixturevalue(f"{request.param}_tokenizer")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[request.param]})
    tokenizer.chat_template = TEMPLATES[request.param]
    tokenizer.chat_form = chat_form(tokenizer, request.param, "")
    return tokenizer


def template_ids(tokenizer, *texts, answered=False, **options):
    """The tokens that transformers makes of turns."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    options |= {"add_generation_prompt": not answered}
    return tokenizer.apply_chat_template(messages, return_dict=False, **options)


def test_turns_have_the_tokens_of_the_template(chats):
    one, two, three = "Is ice cold?\nAnswer:", "yes", "Is it hot?"
    assert prompt_ids(chats, one) == template_ids(chats, one)
    assert prompt_ids(chats, three, [(one, " " + two)]) == template_ids(chats, one, two, three)


def test_bos_is_there_once_whoever_writes_it(llama3_tokenizer):
    tokenizer = copy.deepcopy(llama3_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL["llama3"]})
    ids = []
    for template in (TEMPLATES["llama3"], TEMPLATES["llama3"].removeprefix("{{ bos_token }}")):
        tokenizer.chat_template = template
        tokenizer.chat_form = chat_form(tokenizer, "llama3", "")
        ids.append(prompt_ids(tokenizer, "Is ice cold?"))
    assert ids[0] == ids[1] and ids[0].count(tokenizer.bos_token_id) == 1


def test_a_row_is_a_users_turn_and_an_answer_with_the_turns_end(chats):
    description = describe("cnn_dailymail")
    row = {"article": "Ice is cold. " * 30, "highlights": "Ice is cold ."}
    encoded = encode(chats, description, row, 2_000)
    whole = template_ids(chats, encoded["prompt"], row["highlights"], answered=True)
    ids, start = encoded["input_ids"], encoded["prompt_length"]
    assert whole[: len(ids)] == ids and ids[-1] == end_id(chats)
    assert ids[:start] == template_ids(chats, encoded["prompt"]) and not encoded["problem"]
    short = encode(chats, description, row, start + 80)
    assert short["cut"] > 0 and len(short["input_ids"]) <= start + 80
    assert short["prompt_length"] <= start + 80 - description.max_new_tokens


def test_what_looks_like_a_special_token_in_a_row_is_text(chats):
    frame = set(prompt_ids(chats, "Is ice cold?"))
    ids = prompt_ids(chats, ROW["sentence"])
    special = [i for i in ids if i in chats.all_special_ids]
    assert special == [i for i in prompt_ids(chats, "ice") if i in chats.all_special_ids]
    assert frame >= set(special)


def test_a_label_word_follows_the_assistants_turn_without_a_blank(chat):

    ids = choice_ids(chat, describe("sst2"))
    assert [chat.decode(i) for i in ids] == ["negative", "positive"]
    encoded = encode(chat, describe("sst2"), {"sentence": "fine", "label": 1}, 256)
    answer = encoded["input_ids"][encoded["prompt_length"] :]
    assert chat.decode(answer) == "positive<|im_end|>"


def test_the_date_of_a_template_stands_still(llama3_tokenizer):
    tokenizer = copy.deepcopy(llama3_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL["llama3"]})
    tokenizer.chat_template = TEMPLATES["llama3"]
    tokenizer.chat_form = chat_form(tokenizer, "llama3", SYSTEM)
    prompt = tokenizer.decode(prompt_ids(tokenizer, "Is ice cold?"))
    assert f"system<|stop|>\n\nToday: 26 Jul 2024\n{SYSTEM}<|eot|>" in prompt


# ------------------------------------------------------------------------------ from end to end


SHORT = ["--dtype", "fp32", "--limit", "12"]
CHAT = ["--apply-chat-template", "--system-instruction", SYSTEM]
RUN = "sst2_lora_r4_steps2_fp32_checkpoints1_seed42"


@pytest.fixture(scope="module")
def study(tiny):
    """A run that was trained on turns of a chat."""
    flags = ["--model", str(tiny), "--study", "chat"]
    steps = ["--max-steps", "2", "--set", "checkpoints=1", "--dtype", "fp32"]
    assert train(["--tasks", "sst2", "--lora", "4", *steps, *flags, *CHAT]) == 0
    return flags


def test_base_and_run_are_measured_in_the_runs_form(study):
    flags = [*study, *SHORT, "--no-figures"]
    assert adaptation.main([*flags, "--splits", "validation", "--tasks", "sst2"]) == 0
    assert retention.main([*flags, "--tasks", "winogrande", "--documents", "1"]) == 0
    settings = settings_for(study="chat")
    run = read_json(settings.runs_dir / RUN / "run.json")["config"]
    assert run["apply_chat_template"] and run["system_instruction"] == SYSTEM
    digests = set()
    for name, task in (("adaptation", "sst2"), ("retention", "winogrande")):
        document = settings.document(name)
        records = pd.DataFrame(read_json(document)["records"])
        asked = records[(records.task == task) & (records.metric != "answer_kl")]
        digests |= set(asked[~asked.metric.str.contains("answer")].chat_template)
        if name == "retention":
            texts = records[records.task.str.startswith("text_")]
            assert set(texts[texts.metric == "log_likelihood"].chat_template.isna()) == {True}
            lost = records[(records.metric == "forgetting") & (records.task == task)]
            assert set(lost.run) == {RUN}
        for unit in (document.parent / "records").glob(f"*{task}*.json"):
            request = read_json(unit)["request"]
            assert request["system_instruction"] == SYSTEM
            assert "fewshot_as_multiturn" in request or name == "adaptation"
    assert len(digests) == 1 and None not in digests


def test_what_is_measured_is_not_measured_again_and_other_forms_are_refused(study, inside):
    flags = [*study, *SHORT, "--no-figures", "--documents", "1", "--tasks", "winogrande"]
    assert "0 to run" in inside(retention.main, *flags).stdout
    for other in (["--apply-chat-template"], [*CHAT[:2], "Be brief."]):
        said = inside(retention.main, *flags, *other)
        assert_one_line_error(said, f"turns of a chat after {SYSTEM!r} ({RUN})", "(the flags)")
    plain = ["--tasks", "sst2", "--lora", "8", "--max-steps", "2", *study]
    assert_one_line_error(inside(train, *plain), "add --apply-chat-template", SYSTEM)


def test_a_chat_needs_a_template_and_a_system_message_a_chat(tiny, tmp_path, inside):
    folder = shutil.copytree(tiny, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    flags = ["--model", str(folder), "--study", "no-template", "--apply-chat-template"]
    says = "has no chat template: leave --apply-chat-template out"
    assert_one_line_error(inside(train, "--tasks", "sst2", "--lora", "4", *flags), says)
    assert_one_line_error(inside(retention.main, *flags, *SHORT), says)
    assert_one_line_error(inside(run_study.main, "--tasks", "sst2", "--ranks", "4", *flags), says)
    named = [{"name": "rag", "template": "a"}]
    change_json(folder / "tokenizer_config.json", chat_template=[*named, *named])
    assert_one_line_error(inside(retention.main, *flags, *SHORT), "no default specified")
    settings = settings_for(study="no-template")
    assert not settings.runs_dir.exists()
    assert not (settings.output_dir / "outputs/no-template/study.json").exists()
    system = ["--model", str(tiny), "--study", "none", "--system-instruction", SYSTEM]
    assert_one_line_error(inside(retention.main, *system, *SHORT), "needs --apply-chat-template")
    turns = ["--model", str(tiny), "--fewshot-as-multiturn", "--study", "none"]
    assert_one_line_error(inside(retention.main, *turns), "needs --apply-chat-template")
    template = "{% for m in messages %}{{ raise_exception('no ' + m.role) if m.role == 'system' }}"
    (folder / "chat_template.jinja").write_text(template + "{{ m.content }}{% endfor %}")
    said = inside(retention.main, *flags, *SHORT, "--system-instruction", SYSTEM)
    assert_one_line_error(said, "no system", "leave --system-instruction out")
    template = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    said = inside(retention.main, *flags, *SHORT, "--system-instruction", SYSTEM)
    assert_one_line_error(said, "drops the system message", "leave --system-instruction out")


@pytest.mark.parametrize(
    ("which", "task", "rows", "turns", "system"),
    [
        ("tiny", "gsm8k", 4, None, SYSTEM),
        ("tiny", "arc_challenge", 4, False, ""),
        *(
            pytest.param("smollm2", *case, marks=pytest.mark.slow)
            for case in (("gsm8k", 8, None, ""), ("gsm8k", 4, False, SYSTEM))
        ),
    ],
)
def test_benchmarks_are_asked_and_scored_as_by_lm_eval(
    which, task, rows, turns, system, tiny, smollm2, tokenizer, real_data, tmp_path
):
    base = smollm2 if which == "smollm2" else prepare_base(settings_for(model=str(tiny)))
    settings = settings_for(data=real_data, apply_chat_template=True, system_instruction=system)
    model, asking = load_base(base).eval(), load_tokenizer(base, settings)
    benchmarks = Benchmarks(settings, asking, [task], 2, rows, turns)
    asked = {"apply_chat_template": True, "fewshot_as_multiturn": turns is not False}
    asked |= {"system_instruction": system or None}
    if which == "tiny" and task == "gsm8k":
        asked["gen_kwargs"] = {"max_gen_toks": 16}
        for instance in benchmarks.tasks[task].instances:
            instance.args[1]["max_gen_toks"] = 16
    (ours,) = benchmarks.measure(model)
    peer = peer_results(model, tokenizer, real_data, [task], rows, 2, tmp_path, asked)
    samples = sorted(peer["samples"][f"peer_{task}"], key=lambda s: s["doc_id"])
    prompts = {s["doc_id"]: s["arguments"][0][0] for s in samples}
    instances = benchmarks.tasks[task].instances
    assert {i.doc_id: i.args[0] for i in instances} == prompts
    assert all(
        p.count("<|im_start|>assistant") == (3 if turns is None else 1) for p in prompts.values()
    )
    if task == "gsm8k":
        texts = {s["doc_id"]: s["resps"][0][0] for s in samples}
        assert [answer["output"] for answer in ours.answers] == [texts[i] for i in range(rows)]
    else:
        for sample, row in zip(samples, ours.log_likelihoods, strict=True):
            assert row == pytest.approx([ll for ll, _ in sample["filtered_resps"]], abs=1e-4)
    assert ours.identity["fewshot_as_multiturn"] == (turns is not False)
