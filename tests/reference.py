"""What results are compared with: log-likelihoods without batches, memory, and lm-eval's own."""

import json
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def plain_score(model, context, continuation):
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *continuation]])).logits[0]
    # in fp32, as lm-eval: over 49,152 logits it is off by 1e-5 a token, to one side
    log_probs = logits[len(context) - 1 : -1].log_softmax(-1)
    ids = torch.tensor(continuation)
    total = log_probs[torch.arange(len(ids)), ids].sum().item()
    return total, bool((log_probs.argmax(-1) == ids).all())


class Allocations(TorchDispatchMode):
    """Bytes of all tensors alive that were made inside, at the peak; the largest tensor's size.

    Views of the model's weights are none.
    """

    def __init__(self, model):
        super().__init__()
        # one reference that is never dropped
        self.references = {parameter.data_ptr(): 1 for parameter in model.parameters()}
        self.live, self.peak, self.largest = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, torch.Tensor):
                self._count(output)
        return outputs

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key not in self.references:
            self.references[key] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
            self.largest = max(self.largest, tensor.numel())
        self.references[key] += 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key, size):
        self.references[key] -= 1
        if not self.references[key]:
            del self.references[key]
            self.live -= size


# What each model family has beside a LLaMA, by model_type: windows of eight tokens in one layer (in
# Mistral's in each), norms of queries and keys, biases, heads wider than the hidden size's share,
# scaled ropes, soft caps that change the numbers.
_WIDE, _WINDOW = {"head_dim": 16}, {"sliding_window": 8}
_SECOND = {**_WINDOW, "use_sliding_window": True, "max_window_layers": 1}
_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_ROPE |= {"rope_theta": 1e4, "original_max_position_embeddings": 64}
MODEL_FIELDS = {
    "llama": {"attention_bias": True, "rope_parameters": _ROPE},
    "mistral": {**_WIDE, **_WINDOW},
    "qwen2": {**_SECOND, "tie_word_embeddings": True},
    "qwen3": {**_SECOND, **_WIDE, "tie_word_embeddings": True, "attention_bias": True},
    "gemma2": {
        **_WIDE,
        **_WINDOW,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_WIDE,
        **_WINDOW,
        "query_pre_attn_scalar": 16,
        "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "olmo2": {"attention_bias": True},
}
WINDOWED = [name for name, fields in MODEL_FIELDS.items() if "sliding_window" in fields]


def family_model(model_type, attention=None, seed=0, vocabulary=40_000, **fields):
    """A two-layer random model of a family, with norms and biases that are not their defaults.

    `attention` is used where the family can (Gemma 2 has eager alone); default: the suite's.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from lora_tradeoffs.models.base import default_attention

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = CONFIG_MAPPING[model_type](
        vocab_size=vocabulary, **sizes, **MODEL_FIELDS[model_type], **fields
    )
    default = default_attention(config)
    attention = attention if attention and default == "sdpa" else default
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def subspace_similarities(first, second):
    """phi(a, b) of the leading a columns of `first` and b of `second`, at [a - 1, b - 1].

    phi(a, b) = ||U_a^T V_b||_F^2 / min(a, b), in [0, 1] (Hu et al., arXiv 2106.09685, section 7).
    """
    squares = (first.double().T @ second.double()).square().cumsum(0).cumsum(1)
    sizes = [torch.arange(1, n + 1) for n in squares.shape]
    return squares / torch.minimum(sizes[0][:, None], sizes[1])


def random_similarity(i, j, d):
    """The mean of phi(i, j) over random subspaces of a d-dimensional space."""
    return max(i, j) / d


# lm-eval's file of each definition, and the split that it evaluates
DEFINITIONS = {
    "hellaswag": ("hellaswag/hellaswag", "validation"),
    "arc_challenge": ("arc/arc_challenge", "test"),
    "winogrande": ("winogrande/default", "validation"),
    "piqa": ("piqa/piqa", "validation"),
    "boolq": ("super_glue/boolq/default", "validation"),
    "gsm8k": ("gsm8k/gsm8k", "test"),
    "wikitext": ("wikitext/wikitext", "test"),
    "truthfulqa_mc1": ("truthfulqa/truthfulqa_mc1", "validation"),
}


def peer_results(model, tokenizer, data, tasks, rows, shots, folder, asked=None, **options):
    """lm-eval's own report: its HFLM, its simple_evaluate, definitions included by hand.

    `asked` are arguments of simple_evaluate, `options` of HFLM.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from lora_tradeoffs.retention.benchmarks import quiet_lm_eval

    for task in tasks:
        name, split = DEFINITIONS.get(task, (f"mmlu/default/{task}", "test"))
        files = {s.stem: str(s) for s in (Path(data) / task).glob("*.jsonl")}
        own = Path(lm_eval.__file__).parent / "tasks" / f"{name}.yaml"
        definition = {"include": str(own), "task": f"peer_{task}", "dataset_path": "json"}
        definition |= {"dataset_name": None, "dataset_kwargs": {"data_files": files}}
        definition["training_split"] = None  # so that shots come from validation
        if split == "validation":
            definition["test_split"] = None
        (folder / f"{task}.yaml").write_text(json.dumps(definition))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    with quiet_lm_eval():
        peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, **options)
        names = [f"peer_{task}" for task in tasks]
        shared = {"num_fewshot": shots, "limit": rows, "task_manager": manager}
        return lm_eval.simple_evaluate(peer, tasks=names, **shared, **(asked or {}))
