"""Expected cost of a run before it starts: parameters, memory and disk; checks against both."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from config import UserError
from dataset_descriptions import preset_family
from training_configs import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GB = 1e9
# Bytes of activations kept for the backward pass per token and layer: per hidden unit, and per MLP
# unit, under bf16 autocast (twice that in fp32); fitted to measured peaks, rounded up.
ACTIVATION_BYTES = (40, 16)
EAGER_BYTES = 14  # eager attention's weights, per pair of tokens, head and layer
PROCESS_BYTES = 700_000_000  # the interpreter and its libraries
LOGIT_BYTES = 16  # a supervised logit in bf16 and fp32, their gradients, and the softmax


@dataclass(frozen=True)
class Cost:
    """Expected needs of a run, in bytes: memory per device, disk for the whole run."""

    parameters: int
    trainable: int
    memory: int
    disk: int


def trainable_shapes(model: PreTrainedModel, config: TrainingConfig) -> list[tuple[int, int]]:
    """(out, in) of every linear layer that an adapter or full_qv trains.

    Raises UserError for a rank above the smallest dimension, where B A has no lower rank, and for a
    size of OFT's blocks that does not divide the inputs: PEFT would take another.
    """
    import torch

    shapes = [
        (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in config.modules
    ]
    if config.method == "oft":
        for inputs in sorted({into for _, into in shapes}):
            if config.rank < 2 or inputs % config.rank:
                raise UserError(
                    f"OFT's blocks of {config.rank} do not divide the {inputs} inputs of a matrix;"
                    f" allowed: {', '.join(str(n) for n in range(2, inputs + 1) if not inputs % n)}"
                )
        return shapes
    smallest = min((min(shape) for shape in shapes), default=0)
    if config.rank > smallest:
        raise UserError(
            f"{config.rank_name} is {config.rank}, above the smallest matrix it would adapt"
            f" ({smallest}); allowed: 1 to {smallest}"
        )
    return shapes


def reads_base(config: TrainingConfig) -> bool:
    """Whether the forward pass computes with frozen weights themselves, as DoRA's norm does.

    Then they stay in fp32: autocast would not round them there.
    """
    return config.method == "dora"


def expected_cost(
    model: PreTrainedModel,
    config: TrainingConfig,
    bf16: bool,
    longest: int = 0,
    eager: bool = False,
) -> Cost:
    """The run's cost from the architecture alone (a model on the meta device).

    `longest` is the longest row in tokens, or 0 for the configuration's max_length.
    """
    import torch

    total = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    shapes = trainable_shapes(model, config)
    low_rank = sum(config.rank * (out + into) for out, into in shapes)
    trainable = {
        "dora": low_rank + sum(out for out, _ in shapes),
        "oft": sum(into * (config.rank - 1) // 2 for _, into in shapes),
        "full": total,
        "full_qv": sum(out * into for out, into in shapes),
    }.get(config.method, low_rank)
    c = model.config
    longest, weights = longest or config.max_length, 4 * total
    if config.is_adapter:
        # frozen linears are stored in the precision of the computation, a tied lm_head as a copy
        head = c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else -1)
        is_stored = bf16 and not reads_base(config)
        weights += 4 * trainable + is_stored * 2 * (head - linear)
    tokens = config.micro_batch_size * longest
    # heads may be wider together than the hidden size (Qwen3)
    width = max(c.hidden_size, c.num_attention_heads * (getattr(c, "head_dim", None) or 0))
    per_token = ACTIVATION_BYTES[0] * width + ACTIVATION_BYTES[1] * c.intermediate_size
    if eager or c._attn_implementation == "eager":
        per_token += EAGER_BYTES * c.num_attention_heads * longest
    activations = tokens * c.num_hidden_layers * per_token * (1 if bf16 else 2)
    if config.activation_checkpointing:
        activations //= c.num_hidden_layers
    supervised = config.micro_batch_size * (2 if preset_family(config.tasks) == "similar" else 128)
    logits = LOGIT_BYTES * supervised * c.vocab_size
    memory = PROCESS_BYTES + weights + 12 * trainable + activations + logits
    saved = 4 * (trainable if config.is_adapter else total)
    saved *= 1 + (config.method == "pissa")  # converted to twice the rank
    disk = config.checkpoints * saved + 2 * 8 * trainable  # Adam's state in the two newest
    return Cost(total, trainable, int(memory), disk)


def check_room(cost: Cost, folder: Path, device: str) -> None:
    """Raise UserError if the run needs more disk or memory than is free."""
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < cost.disk:
        raise UserError(
            f"{folder} has {free / GB:.1f} GB free and the run needs {cost.disk / GB:.1f} GB; free"
            " some space, set OUTPUT_DIR to another disk, or lower --set checkpoints=N"
        )
    available = free_memory(device)
    if available < cost.memory:
        raise UserError(
            f"{device} has {available / GB:.1f} GB of memory free and the run needs about"
            f" {cost.memory / GB:.1f} GB; try --set micro_batch_size=N, --set"
            " activation_checkpointing=true, or LoRA instead of full fine-tuning"
        )


def free_memory(device: str) -> int:
    """Bytes of memory free on the device."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil  # accelerate brings it

    return psutil.virtual_memory().available
