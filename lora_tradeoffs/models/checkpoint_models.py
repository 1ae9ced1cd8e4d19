"""The models of many checkpoints over one base in memory, one after another.

Adapters are put into the base and taken out again, never merged; the weights of a full checkpoint
are copied into the same module, tensor by tensor. So memory holds one model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from config import UserError, is_out_of_memory
from lora_tradeoffs.files import Checkpoint, check_whole
from lora_tradeoffs.models.base import Base, load_base, store_frozen_linears_in_bf16
from lora_tradeoffs.models.weights import (
    ADAPTER_FILE,
    EMBEDDING,
    HEAD,
    Weights,
    match_tensors,
    read_checkpoint,
    read_lora_config,
    stored_names,
)

# Fields of adapter_config.json with which PEFT loads and scores an adapter, although its update is
# not, or not only, scale * B A.
SCORED_FIELDS = ("use_dora", "bias", "lora_bias", "modules_to_save", "trainable_token_indices")
SCORED_FIELDS += ("target_parameters", "velora_config")


def checkpoint_models(
    base: Base, selected: Sequence[Checkpoint], device: str = "cpu", bf16: bool = False
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base), then (checkpoint, its model): adapters first, full weights after them.

    With `bf16` the models are for bf16 autocast alone: their linear layers are stored as it would
    round them. A model is valid until the next one is requested. For a checkpoint that is corrupt,
    half-written or does not fit the base, the UserError that says so takes the model's place, and
    the others follow.

    >>> from checkpoint_utils import checkpoint_models, checkpoints_in, find_base
    >>> selected = checkpoints_in(Path("models/demo/similar_lora_r8_seed42"))
    >>> for checkpoint, model in checkpoint_models(find_base(), selected):
    ...     print(checkpoint.step if checkpoint else "base", type(model).__name__)
    base LlamaForCausalLM
    3 PeftModel
    6 PeftModel
    """
    model = load_base(base).eval().requires_grad_(False)
    if bf16:
        store_frozen_linears_in_bf16(model)
    model.to(device)
    yield None, model
    for checkpoint in (c for c in selected if c.is_adapter):
        try:
            check_whole(checkpoint)
            adapted = _with_adapter(model, checkpoint.folder)
        except UserError as error:
            yield checkpoint, error
        else:
            yield checkpoint, adapted
            adapted.unload()
    for checkpoint in selected:
        if checkpoint.is_adapter:
            continue
        try:
            check_whole(checkpoint)
            _copy_weights(model, checkpoint.folder)
            result = model
        except UserError as error:
            result = error
        yield checkpoint, result


def checkpoint_weights(
    base: Base, checkpoints: Sequence[Checkpoint]
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base's weights), then (checkpoint, its weights) for each; no model is built.

    The weights are verified and read when they are used. A checkpoint that is broken or does not
    fit the base comes with the UserError that says so instead.

    >>> from checkpoint_utils import checkpoint_weights, checkpoints_in, find_base
    >>> selected = checkpoints_in(Path("models/demo/similar_lora_r8_seed42"))
    >>> for checkpoint, weights in checkpoint_weights(find_base(), selected):
    ...     print(checkpoint.step if checkpoint else "base", type(weights).__name__)
    base Weights
    3 Adapter
    6 Adapter
    """
    base_weights = Weights(base.folder)
    yield None, base_weights
    for checkpoint in checkpoints:
        try:
            check_whole(checkpoint, ".safetensors")
            result: Any = read_checkpoint(checkpoint.folder, base_weights)
        except UserError as error:
            result = UserError(f"{checkpoint.run}, step {checkpoint.step}: {error}")
        yield checkpoint, result


def scaled_updates(
    base: Base, checkpoint: Checkpoint, model: Any, scales: Sequence[float]
) -> Iterator[tuple[float, Any]]:
    """(t, the model with t times the checkpoint's update) for every t; afterwards t is 1 again.

    `model` is the one that `checkpoint_models` gives for the checkpoint, and is changed in place:
    an adapter's scaling, or the weights, W0 + t (W - W0) tensor by tensor from the two folders. At
    t = 0 and t = 1 these are the base's and the checkpoint's, bit for bit. Raises UserError for an
    adapter whose update is not linear in its scaling, or a folder that is corrupt, and ValueError
    for a t that is not finite.
    """
    from math import isfinite

    if not all(map(isfinite, scales)):
        raise ValueError(f"the scale of an update must be finite: {list(scales)}")
    set_scale = _adapter_scale(checkpoint, model) if checkpoint.is_adapter else None
    try:
        for t in scales:
            if set_scale:
                set_scale(t)
            else:
                _mix_weights(model, base.folder, checkpoint.folder, t)
            yield t, model
    finally:
        if set_scale:
            set_scale(1)
        else:
            _copy_weights(model, checkpoint.folder)


def _adapter_scale(checkpoint: Checkpoint, model: Any) -> Callable[[float], None]:
    """A function that sets the active adapter's scaling to t times what it is now.

    PEFT's scale_layer multiplies the present scaling, so t = 0 could not be undone.
    """
    from peft.tuners.lora import LoraLayer

    read_lora_config(checkpoint.folder, "scaled")  # raises for an update that is not linear
    name = model.active_adapter
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.scaling]
    scalings = [layer.scaling[name] for layer in layers]

    def set_scale(t: float) -> None:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling[name] = t * scaling

    return set_scale


def _mix_weights(model: Any, start: Path, end: Path, t: float) -> None:
    """The weights of `start`, moved by t times the way to those of `end`.

    At t = 0 and t = 1 they are copied: a sum keeps neither the sign of a zero nor, on every device,
    the last bit.
    """
    if t in (0, 1):
        _copy_weights(model, end if t else start)
    else:
        _copy_weights(model, end, start, t)


def _with_adapter(model: Any, folder: Path) -> Any:
    """The model with the folder's adapter in it; a load that fails leaves the model as it was."""
    from peft import PeftModel, get_peft_model_state_dict

    tensors = set(Weights(folder, ADAPTER_FILE).shapes)
    config = read_lora_config(folder, "loaded", also=SCORED_FIELDS)
    adapted = None
    try:
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        adapted.load_adapter(folder, "default", is_trainable=False, low_cpu_mem_usage=True)
        # an adapter that lacks tensors loads without an error, and scores like another model
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if tensors != expected:
            raise UserError(_mismatch(folder, expected - tensors, tensors - expected))
    except Exception as error:  # PEFT raises many kinds for a file that does not fit
        if adapted is None:
            _remove_adapter_layers(model)
        else:
            adapted.unload()
        # too little memory says nothing of the file
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is corrupt or does not fit the base: {message}") from None
    adapted.set_adapter("default", inference_mode=True)
    return adapted.eval()


def _remove_adapter_layers(model: Any) -> None:
    """Undo a PeftModel whose making failed on the way, with some layers replaced."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in layers:
        model.set_submodule(name, layer.get_base_layer())


def _mismatch(folder: Path, missing: set[str], unexpected: set[str]) -> str:
    parts = [
        f"{len(names)} {what}, such as {min(names)}"
        for names, what in ((missing, "are missing"), (unexpected, "are unexpected"))
        if names
    ]
    return f"{folder} does not fit the base: of its tensors {'; '.join(parts)}"


def _copy_weights(model: Any, folder: Path, start: Path | None = None, share: float = 1) -> None:
    """Copy every weight of the folder's safetensors into the model, one tensor at a time.

    With `start`, a folder too, the weights are those that lie `share` of the way from its weights
    to these. Names and shapes are compared first: a checkpoint that does not fit changes nothing.
    """
    import torch

    is_tied = model.config.tie_word_embeddings
    targets = model.state_dict()
    shapes = {name: tuple(target.shape) for name, target in targets.items()}
    if is_tied:
        del shapes[HEAD]
    weights, before = Weights(folder), Weights(start) if start else None
    names = match_tensors(weights, shapes, is_tied)
    before_names = stored_names(before, is_tied) if before else {}
    for name, stored in names.items():
        tensor = weights.tensor(stored)
        if before:
            tensor = torch.lerp(before.tensor(before_names[name]).to(tensor), tensor, share)
        # a tied weight may be stored in two precisions
        for target in (EMBEDDING, HEAD) if is_tied and name == EMBEDDING else (name,):
            with torch.no_grad():
                targets[target].copy_(tensor)
