"""The door to checkpoints: found, verified, loaded, for the commands and for a user's notebook.

from checkpoint_utils import checkpoint_steps, load_base_model, load_checkpoint_model
"""

from __future__ import annotations

from pathlib import Path

from lora_tradeoffs.files import (
    Checkpoint,
    checkpoint_step,
    checkpoints,
    newest_whole_checkpoint,
)
from lora_tradeoffs.models.checkpoint_models import checkpoint_models, checkpoint_weights

__all__ = [
    "Checkpoint",
    "checkpoint_models",
    "checkpoint_steps",
    "checkpoint_weights",
    "checkpoints",
    "newest_whole_checkpoint",
]


def checkpoint_steps(run: str | Path) -> list[int]:
    """The optimizer steps at which a run's folder has checkpoints, in order."""
    return [checkpoint_step(folder) for folder in checkpoints(Path(run))]
