"""What the tests share: a workspace of their own, the real tokenizer, a two-layer Llama."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import hypothesis
import pytest
from support import DEMO, ROOT, VARIABLES, settings_for

# Tests marked `fuzz`: the same few examples every time, or with HYPOTHESIS_PROFILE=fuzz other ones.
COMMON = {
    "database": None,
    "deadline": timedelta(seconds=120),
    "suppress_health_check": list(hypothesis.HealthCheck),
}
hypothesis.settings.register_profile("few", max_examples=25, derandomize=True, **COMMON)
hypothesis.settings.register_profile("fuzz", max_examples=10_000, **COMMON, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session", autouse=True)
def workspace(tmp_path_factory):
    """One temporary folder for all that is written; the user's .env and variables are unseen."""
    import config

    folder = tmp_path_factory.mktemp("workspace")
    before = dict(os.environ)
    for name in VARIABLES:
        os.environ.pop(name, None)
    folders = {"OUTPUT_DIR": str(folder), "DATA_DIR": str(folder / "data")}
    # a model or data of one's own ask for a preset
    os.environ.update(folders, PRESET="demo", TOKENIZERS_PARALLELISM="0")
    config._env_file = dict
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module", autouse=True)
def studies(workspace):
    """No file of tests sees the studies of another, whichever ran before it in this process."""
    yield
    for folder in ("data", "drift_analysis_plots", "logs", "outputs", "performance_analysis"):
        shutil.rmtree(workspace / folder, ignore_errors=True)
    for study in (workspace / "models").glob("*"):
        if study.name != "base":
            shutil.rmtree(study)


@pytest.fixture(scope="module", autouse=True)
def built_in_tasks():
    """Tasks and families of one's own that a module's tests add are unknown to the next."""
    import config
    import dataset_descriptions as d

    registries = d.DESCRIPTIONS, config.FAMILIES, d._broken
    before = [dict(registry) for registry in registries]
    yield
    for registry, contents in zip(registries, before):
        registry.clear()
        registry.update(contents)


@pytest.fixture(scope="session")
def real_data():
    """The folder of real rows, from the variable REAL_DATA."""
    folder = os.environ.get("REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("REAL_DATA names no folder of real rows")
    return folder


@pytest.fixture(scope="session")
def smollm2(workspace):
    """The embedded base model, unpacked."""
    from lora_tradeoffs.models.base import prepare_base

    return prepare_base(settings_for())


@pytest.fixture(scope="module")
def smollm2_model(smollm2):
    from lora_tradeoffs.models.base import load_base

    return load_base(smollm2).eval()


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    from lora_tradeoffs.models.base import load_tokenizer

    return load_tokenizer(smollm2)


@pytest.fixture(scope="session")
def llama3_tokenizer():
    """Llama 3's vocabulary with its BOS, from the package llama-models."""
    from importlib.util import find_spec

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    spec = find_spec("llama_models")
    if spec is None:
        pytest.skip("llama-models is not installed")
    vocabulary = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    converter = TikTokenConverter(
        vocab_file=str(vocabulary), pattern=pattern, extra_special_tokens=special
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(), bos_token=special[0], eos_token=special[1]
    )
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def blank_first_tokenizer():
    """As those of Llama 2 and Mistral: a blank before any text, BOS, words with their blank."""
    from tokenizers import (
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    from dataset_descriptions import DESCRIPTIONS

    special = ["<s>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet = ["\n", *map(chr, range(32, 127))]
    words = [word for d in DESCRIPTIONS.values() for word in d.label_words]
    files = sorted((ROOT / "data" / "sample").glob("*/train.jsonl"))
    texts = [*words * 999, *(path.read_text(encoding="utf-8") for path in files)]
    trainer = trainers.BpeTrainer(
        vocab_size=2_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # as LlamaTokenizerFast has it: a text that begins with a blank gets a second one
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    names = dict(zip(("bos_token", "eos_token", "unk_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def tiny(workspace, tokenizer):
    """Folder of a two-layer random Llama with SmolLM2's tokenizer."""
    return tiny_llama(workspace / "tiny", tokenizer)


@pytest.fixture(scope="session")
def base(tiny):
    """The two-layer Llama as a base."""
    from lora_tradeoffs.models.base import prepare_base

    return prepare_base(settings_for(model=str(tiny)))


@pytest.fixture(scope="module")
def tiny_model(base):
    from lora_tradeoffs.models.base import load_base

    return load_base(base).eval()


def tiny_llama(folder, tokenizer, bias=False):
    """Save a two-layer random Llama and its tokenizer in the folder, and return it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        attention_bias=bias,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(workspace):
    """Run one of the scripts as a user would; the finished process with its output."""

    def run(*command, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **DEMO, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


@pytest.fixture
def inside(capsys):
    """Like `script`, but a main in this process, which has the libraries loaded."""

    def run(main, *command):
        capsys.readouterr()
        command = [*map(str, command)]
        try:
            code = main(command)
        except SystemExit as ended:
            code = ended.code
        told = capsys.readouterr()
        return subprocess.CompletedProcess(command, code, told.out, told.err)

    return run
