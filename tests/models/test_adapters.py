"""Any adapter's update is what PEFT's own merge makes of the whole model, minus the base."""

import copy
import shutil

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file
from support import change_json, edited_tensors, moved, settings_for
from tokenizers.normalizers import Lowercase

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint, checkpoints_in
from lora_tradeoffs.measuring.subjects import Subject, find_subjects, no_arm, own_settings
from lora_tradeoffs.models.adapters import Adapter, MergedAdapter, read_checkpoint
from lora_tradeoffs.models.base import load_base, prepare_base
from lora_tradeoffs.models.checkpoint_models import checkpoint_models, scaled_updates
from lora_tradeoffs.models.configs import MERGED_TYPES
from lora_tradeoffs.models.weights import Weights
from lora_tradeoffs.tables.arms import arm_of

PROMPT = torch.tensor([[5, 17, 400, 23]])
QV = ["q_proj", "v_proj"]
LORA = {
    "dora": {"use_dora": True},
    "dora, patterns": {"use_dora": True, "rank_pattern": {"v_proj": 2}, "use_rslora": True},
    "lora_bias": {"lora_bias": True, "layers_to_transform": [1]},
    "bias": {"bias": "all", "alpha_pattern": {"q_proj": 3}},
    "modules_to_save": {"modules_to_save": ["norm", "k_proj", "embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [17, 400]},
    "parameters": {"target_parameters": ["model.layers.0.mlp.up_proj.weight"]},
}
TYPES = {
    "OFT": {"oft_block_size": 8, "r": 0},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 16},
    "FOURIERFT": {"n_frequency": 30},
    "IA3": {"feedforward_modules": []},
    "ROAD": {"group_size": 16},
    "MISS": {"r": 16},
    "SHIRA": {"r": 4},
    "ADALORA": {"total_step": 10},
    "VBLORA": {"num_vectors": 8, "vector_length": 16, "save_only_topk_weights": False},
    "WAVEFT": {"n_frequency": 30},
}
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def base(workspace, tokenizer):
    """A two-layer Llama whose projections have biases."""
    return prepare_base(settings_for(model=str(tiny_llama(workspace / "b", tokenizer, bias=True))))


@pytest.fixture(scope="module")
def weights(base):
    return Weights(base.folder)


def make(base, folder, kind="LORA", **fields):
    """Save an adapter with random weights; its model in fp32."""
    from peft import get_peft_config, get_peft_model

    torch.manual_seed(0)
    fields = {"target_modules": QV, **({"r": 4} if kind == "LORA" else {}), **fields}
    model = get_peft_model(load_base(base), get_peft_config({"peft_type": kind, **fields}))
    model = moved(model.eval(), 0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def assert_the_update_is_pefts(base, weights, folder, model):
    start = load_base(base).double().state_dict()
    logits = model(PROMPT).logits.detach()
    merged = model.double().merge_and_unload().state_dict()
    update = {name: merged[name] - tensor for name, tensor in start.items()}
    adapter = read_checkpoint(folder, weights)
    assert isinstance(adapter, MergedAdapter)
    moved = {name for name, change in update.items() if change.abs().max() > 0}
    if "token_adapter" in str(model) or "embed" in str(moved):
        moved -= {"lm_head.weight"}  # tied, so counted once
    assert {name for name in adapter.tensors if adapter.squares(name)[0]} == moved
    for name in adapter.tensors:
        square = float(update[name].square().sum())
        assert adapter.squares(name)[0] == pytest.approx(square, rel=1e-6)
        assert adapter.squares(name)[1] == pytest.approx(float(start[name].square().sum()))
    assert {matrix.tensor for matrix in adapter.matrices} == {n for n in moved if "_proj.w" in n}
    for matrix in adapter.matrices:
        ours = adapter.weight(matrix) - start[matrix.tensor]
        assert (ours - update[matrix.tensor]).abs().max() < 1e-6
    found = [m for c, m in checkpoint_models(base, [Checkpoint("it", 0, folder)]) if c]
    assert torch.allclose(found[0](PROMPT).logits, logits, atol=1e-5)


@pytest.mark.parametrize("name", [n if "," in n else pytest.param(n, marks=SLOW) for n in LORA])
def test_lora_that_is_more_than_low_rank(base, weights, tmp_path, name):
    model = make(base, tmp_path, **LORA[name])
    with torch.no_grad():
        assert_the_update_is_pefts(base, weights, tmp_path, model)


@pytest.mark.parametrize(
    "kind", [k if k == "OFT" else pytest.param(k, marks=SLOW) for k in MERGED_TYPES]
)
def test_adapters_of_other_types(base, weights, tmp_path, kind):
    model = make(base, tmp_path, kind, **TYPES.get(kind, {}))
    with torch.no_grad():
        assert_the_update_is_pefts(base, weights, tmp_path, model)


def test_a_classifiers_update_is_measured_and_its_head_is_not_scored(base, weights, tmp_path):
    """As LlamaForSequenceClassification's adapter is saved, with the head in modules_to_save."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(base.folder, num_labels=3)
    config = LoraConfig(r=4, target_modules=QV, task_type="SEQ_CLS", init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert any("score" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    adapter = read_checkpoint(tmp_path, weights)
    assert isinstance(adapter, Adapter) and len(adapter.matrices) == 4
    for matrix in adapter.matrices:
        A, B, scale = adapter.factors(matrix)
        delta = model.get_submodule(f"base_model.model.{matrix.name}").get_delta_weight("default")
        assert torch.allclose(scale * B @ A, delta, atol=1e-6)
    checkpoint = Checkpoint("theirs", 0, tmp_path)
    (_, _), (_, error) = checkpoint_models(base, [checkpoint])
    assert "cannot be scored: the base lacks its head, base_model.model.score.weight" in str(error)
    subject = Subject("theirs", 0, checkpoint, no_arm("lora"), None, True, False)
    assert "theirs has a head of its own, which is not scored" in str(own_settings([subject], base))


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("OFT", {"of_tomorrow": 2}, "its of_tomorrow is 2"),
        ("OFT", {"layer_replication": [[0, 2]]}, "its layer_replication is"),
        ("OFT", {"target_modules": None}, "it has no target_modules"),
        ("OFT", {"oft_block_size": 4}, "does not fit the base"),
        ("OFT", {"bias": "some"}, "bias"),
        ("LORA", {"use_dora": True, "target_modules": ["k_proj"]}, "does not fit the base"),
        ("LORA", {"use_dora": True, "alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ("LORA", {"use_dora": True, "ensure_weight_tying": True}, "ensure_weight_tying"),
    ],
    ids=str,
)
def test_other_adapters_that_do_not_fit_are_refused_by_name(
    base, weights, tmp_path, kind, fields, named
):
    make(base, tmp_path, kind, **({"use_dora": True} if kind == "LORA" else TYPES["OFT"]))
    change_json(tmp_path / "adapter_config.json", **fields)
    with pytest.raises(UserError, match=named) as error:
        read_checkpoint(tmp_path, weights)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_the_columns_of_foreign_adapters(base, tmp_path):
    for method, rank, kind, fields in (
        ("dora", 4, "LORA", {"use_dora": True}),
        ("oft", 8, "OFT", TYPES["OFT"]),
        ("adapter", 0, "LOHA", {"r": 8}),
        ("lora", 8, "LORA", {"r": 8, "lora_alpha": 4}),
    ):
        make(base, tmp_path / method, kind, **fields)
        (_, subject) = find_subjects(settings_for(), base, [str(tmp_path / method)])
        arm = arm_of({**subject.fields, "run": method})
        assert (subject.fields["method"], subject.fields["rank"]) == (method, rank)
        assert arm.method == method and method in arm.label and arm.kind


def test_each_of_a_trainers_folder_is_what_its_own_files_say(base, tmp_path):
    """A merged model in the root over adapters, and adapters that PEFT saved by their names."""
    make(base, tmp_path / "checkpoint-5", r=8)
    load_base(base).save_pretrained(tmp_path)
    _, adapter, final = find_subjects(settings_for(), base, [str(tmp_path)])
    assert (adapter.fields["method"], adapter.fields["rank"]) == ("lora", 8)
    assert (final.fields["method"], final.fields["rank"]) == ("full", 0)
    make(base, tmp_path / "named" / "one")
    for _ in range(2):
        with pytest.raises(UserError, match="give one of the adapters' folders in it: one"):
            read_checkpoint(checkpoints_in(tmp_path / "named")[0].folder, Weights(base.folder))
        make(base, tmp_path / "named" / "checkpoint-1" / "one")


@pytest.fixture(scope="module")
def trainers(base, tmp_path_factory):
    """A Trainer's folder with the adapters of three steps, the first before training."""
    folder = tmp_path_factory.mktemp("trainers") / "mine"
    for step in (0, 9, 10):
        make(base, folder / f"checkpoint-{step}")
    return folder


def subjects_of(base, *runs, checkpoints=("all",)):
    _, *subjects = find_subjects(settings_for(), base, [*map(str, runs)], checkpoints)
    return subjects


def steps_of(subjects):
    return [(s.run, s.step, s.fields["fraction"], s.is_last) for s in subjects]


def test_the_checkpoints_of_a_run_are_one_run_however_they_are_given(
    base, trainers, tmp_path, monkeypatch
):
    whole = subjects_of(base, trainers)
    assert steps_of(whole) == [
        ("mine", 0, 0.0, False),
        ("mine", 9, 0.9, False),
        ("mine", 10, 1.0, True),
    ]
    singly = sorted(map(str, trainers.iterdir()))  # as a shell writes mine/checkpoint-*
    assert steps_of(subjects_of(base, *singly)) == steps_of(whole)
    assert steps_of(subjects_of(base, trainers, *singly)) == steps_of(whole)
    assert steps_of(subjects_of(base, *singly, checkpoints=["last"])) == steps_of(whole[2:])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "checkpoint-7").symlink_to(trainers / "checkpoint-9")
    monkeypatch.chdir(tmp_path)
    for link in ("mine/checkpoint-7", str(tmp_path / "mine" / "checkpoint-7")):
        assert steps_of(subjects_of(base, link)) == [("mine", 7, 1.0, True)]
    shutil.copytree(trainers, tmp_path / "twice")
    shutil.copytree(trainers / "checkpoint-9", tmp_path / "twice" / "checkpoint-09")
    with pytest.raises(UserError, match="are both step 9 of 'twice'"):
        subjects_of(base, tmp_path / "twice")


def test_a_half_written_checkpoint_does_not_speak_for_its_run(base, trainers, tmp_path):
    """The columns of each are those of its own files, not those of the run's last."""
    shutil.copytree(trainers, folder := tmp_path / "mine")
    (folder / "checkpoint-10" / "adapter_config.json").unlink()
    (folder / "checkpoint-11").write_text("no folder")
    first, second, broken = subjects_of(base, folder)
    assert {(s.fields["method"], s.fields["rank"]) for s in (first, second)} == {("lora", 4)}
    with pytest.raises(
        UserError, match=r"holds no model.safetensors; its adapter_model.safet.* lack"
    ):
        read_checkpoint(broken.checkpoint.folder, Weights(base.folder))


def test_a_model_beside_a_runs_checkpoints_is_measured_or_told(base, trainers, tmp_path):
    shutil.copytree(trainers, folder := tmp_path / "mine")
    for name in ("._adapter_model.safetensors", ".DS_Store", ".ipynb_checkpoints"):
        (folder / name).write_bytes(b"of a file manager")
    assert own_settings(subjects := subjects_of(base, folder), base) == [] and len(subjects) == 3
    shutil.copytree(trainers / "checkpoint-9", folder / "final_checkpoint")
    (line,) = own_settings(subjects_of(base, folder), base)
    assert "mine: final_checkpoint beside its checkpoints is not measured" in line
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(trainers / "checkpoint-9" / name, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    final = subjects_of(base, folder)[-1]
    assert steps_of([final]) == [("mine-final", 0, 1.0, True)]
    for _ in range(2):
        with pytest.raises(UserError, match="pickled weights are not loaded"):
            read_checkpoint(checkpoints_in(folder)[-1].folder, Weights(base.folder))
        for step in (0, 9, 10):
            shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
        shutil.rmtree(folder / "final_checkpoint", ignore_errors=True)


def test_a_checkpoint_with_a_tokenizer_or_a_precision_of_its_own_is_told(base, tokenizer, tmp_path):
    make(base, tmp_path)
    (_, subject) = find_subjects(settings_for(), base, [str(tmp_path)])
    trained = copy.deepcopy(tokenizer)
    trained("a", truncation=True, max_length=4)  # which its file then holds, as of a Trainer's
    trained.save_pretrained(tmp_path)
    assert own_settings([subject], base) == []
    for dtype, told in (("float64", ""), ("bfloat16", "is rounded to BF16: up to 0.39% of each")):
        load_base(base).to(getattr(torch, dtype)).save_pretrained(tmp_path / dtype)
        (_, full) = find_subjects(settings_for(), base, [str(tmp_path / dtype)])
        lines = own_settings([full], base)
        assert told in str(lines) and len(lines) == bool(told)
    # as older versions of transformers noted it
    change_json(tmp_path / "float64" / "config.json", _name_or_path="a/other")
    (_, full) = find_subjects(settings_for(), base, [str(tmp_path / "float64")])
    assert own_settings([full], base) == [
        f"float64 names a/other as its base and is measured against {base.name}"
    ]
    trained.backend_tokenizer.normalizer = Lowercase()
    trained.save_pretrained(tmp_path)
    (line,) = own_settings([subject], base)
    assert "has a tokenizer that encodes text otherwise, and is measured with the base's" in line


def test_a_merged_adapter_that_lacks_a_tensor_is_refused(base, weights, tmp_path):
    make(base, tmp_path, use_dora=True)
    path = tmp_path / "adapter_model.safetensors"
    with edited_tensors(path) as tensors:
        del tensors[next(name for name in tensors if "magnitude" in name)]
    with pytest.raises(UserError, match=r"1 are missing, such as .*magnitude"):
        read_checkpoint(tmp_path, weights)


@pytest.mark.parametrize("kind", ["dora", pytest.param("OFT", marks=SLOW)])
def test_a_scaled_merged_update_lies_between_base_and_checkpoint(base, weights, tmp_path, kind):
    fields = {"use_dora": True} if kind == "dora" else TYPES["OFT"]
    make(base, tmp_path, "LORA" if kind == "dora" else kind, **fields)
    checkpoint = Checkpoint("it", 0, tmp_path)
    start, tuned = load_base(base), read_checkpoint(tmp_path, weights)
    logits = {0: start(PROMPT).logits}
    half = load_base(base)
    for matrix in tuned.matrices:
        weight = half.get_submodule(matrix.name).weight
        weight.data.lerp_(tuned.weight(matrix).float(), 0.5)
    models = checkpoint_models(base, [checkpoint])
    model = next(model for found, model in models if found)
    with torch.no_grad():
        logits |= {0.5: half(PROMPT).logits, 1: model(PROMPT).logits}
        for t, scaled in scaled_updates(base, checkpoint, model, [0, 0.5, 1, 0]):
            close = {"atol": 1e-5} if t == 0.5 else {"atol": 0, "rtol": 0}
            assert torch.allclose(scaled(PROMPT).logits, logits[t], **close), t
        assert torch.equal(model(PROMPT).logits, logits[1])
