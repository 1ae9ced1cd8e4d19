"""Checkpoints: find them, verify them, load them; for the commands and for your own notebook.

    from checkpoint_utils import checkpoint_steps, load_base_model, load_checkpoint_model

A run's folder is models/<study>/<run>/, and its checkpoints are checkpoint-<step>/ in it. A LoRA
checkpoint holds an adapter, which is loaded into the base model; a checkpoint of full fine-tuning
holds all weights. The base is the one of the settings (environment, .env, preset), or the Hub id or
folder given as `model`. The analysis commands load a study's checkpoints one after another over one
base in memory, with `checkpoint_models` and `checkpoint_weights`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError, resolve_settings
from lora_tradeoffs.checkpoints import (
    Checkpoint,
    checkpoint_step,
    checkpoints,
    checkpoints_in,
    newest_whole_checkpoint,
)
from lora_tradeoffs.models.base import Base, prepare_base
from lora_tradeoffs.models.checkpoint_models import checkpoint_models, checkpoint_weights
from lora_tradeoffs.records import read_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Checkpoint",
    "checkpoint_models",
    "checkpoint_steps",
    "checkpoint_weights",
    "checkpoints",
    "checkpoints_in",
    "find_base",
    "load_base_model",
    "load_checkpoint_model",
    "newest_whole_checkpoint",
]


def checkpoint_steps(run: str | Path) -> list[int]:
    """The optimizer steps at which a run's folder has checkpoints, in order.

    >>> checkpoint_steps("models/demo/similar_lora_r8_seed42")
    [3, 6]
    """
    return [checkpoint_step(folder) for folder in checkpoints(Path(run))]


def find_base(model: str | None = None) -> Base:
    """The base model's files: downloaded or unpacked to models/base/ if they are not there yet.

    >>> base = find_base()
    >>> (base.folder / "config.json").is_file()
    True
    """
    preset = "study" if model else None  # which one matters for no model
    return prepare_base(resolve_settings(argparse.Namespace(model=model, preset=preset)))


def load_base_model(model: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """The base model in fp32, in evaluation mode.

    >>> model = load_base_model()
    >>> type(model).__name__, model.training
    ('LlamaForCausalLM', False)
    """
    _, base_model = next(checkpoint_models(find_base(model), [], device))
    return base_model


def load_checkpoint_model(path: str | Path, model: str | None = None, device: str = "cpu") -> Any:
    """The model of a checkpoint's folder, or of a run's last checkpoint, in evaluation mode.

    A LoRA checkpoint gives a `PeftModel`, whose `disable_adapter()` gives the base; any other a
    model of the base's class. Any PEFT or Transformers folder will do. Raises UserError if the
    checkpoint is broken, does not fit the base, or was trained on another one.

    >>> model = load_checkpoint_model("models/demo/similar_lora_r8_seed42/checkpoint-6")
    >>> type(model).__name__
    'PeftModel'
    >>> import torch
    >>> tokens = torch.tensor([[5, 17, 400]])
    >>> logits = model(tokens).logits
    >>> with model.disable_adapter():
    ...     torch.equal(model(tokens).logits, logits)
    False
    """
    base, checkpoint = find_base(model), checkpoints_in(Path(path))[-1]
    run = checkpoint.folder.parent
    trained_on = read_run(run, "base")["base"] if (run / "run.json").is_file() else None
    if trained_on and trained_on["digest"] != base.digest:
        raise UserError(
            f"{checkpoint.folder} was trained on {trained_on['name']}, not on {base.name}: give"
            " that base as `model`"
        )
    models = checkpoint_models(base, [checkpoint], device)
    next(models)  # the base
    _, checkpoint_model = next(models)
    if isinstance(checkpoint_model, UserError):
        raise checkpoint_model
    return checkpoint_model
