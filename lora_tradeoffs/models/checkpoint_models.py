"""The models of many checkpoints over one base in memory, one after another.

Adapters are swapped into the base, never merged; the weights of full fine-tuning are copied into
the same module, tensor by tensor from memory-mapped files. So memory holds one model at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from config import UserError
from lora_tradeoffs.files import Checkpoint, check_whole
from lora_tradeoffs.models.base import Base, load_base, store_frozen_linears_in_bf16

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER_FILE = "adapter_model.safetensors"


def checkpoint_models(
    base: Base, wanted: Sequence[Checkpoint], device: str = "cpu", bf16: bool = False
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base), then (checkpoint, its model): adapters first, full weights after them.

    With `bf16` the models are for bf16 autocast alone: their linear layers are stored as it would
    round them. A model is good until the next is asked for. In place of the model of a checkpoint
    that is corrupt, half-written or does not fit the base comes the UserError that says so; the
    others go on.
    """
    model = load_base(base).eval().requires_grad_(False)
    if bf16:
        store_frozen_linears_in_bf16(model)
    model.to(device)
    yield None, model
    adapted = None  # the base with an adapter in it
    for number, checkpoint in enumerate(c for c in wanted if c.is_adapter):
        try:
            check_whole(checkpoint)
            adapted = _swap_adapter(adapted or model, checkpoint, f"adapter{number}")
            result = adapted
        except UserError as error:
            result = error
        yield checkpoint, result
    if adapted is not None:
        model = adapted.unload()
    for checkpoint in wanted:
        if checkpoint.is_adapter:
            continue
        try:
            check_whole(checkpoint)
            _copy_weights(model, checkpoint.folder)
            result = model
        except UserError as error:
            result = error
        yield checkpoint, result


def scaled_updates(
    base: Base, checkpoint: Checkpoint, model: Any, scales: Sequence[float]
) -> Iterator[tuple[float, Any]]:
    """(t, the model with t times the checkpoint's update) for every t; in the end t is 1 again.

    `model` is what `checkpoint_models` gave for the checkpoint, and is changed in place: an
    adapter's scaling, or the weights, W0 + t (W - W0) tensor by tensor from the two folders'
    memory-mapped files. At t = 0 and t = 1 these are the base's and the checkpoint's, bit for bit.
    Raises UserError for an adapter whose update is not linear in its scaling, or a folder that is
    corrupt, and ValueError for a t that is not finite.
    """
    from math import isfinite

    if not all(map(isfinite, scales)):
        raise ValueError(f"a scale of an update has to be finite: {list(scales)}")
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

    PEFT's scale_layer multiplies what it finds, so t = 0 could not be undone.
    """
    from peft.tuners.lora import LoraLayer

    name = model.active_adapter
    config = model.peft_config[name]
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and name in m.scaling]
    for found, what in (
        (any(name in layer.lora_variant for layer in layers), "DoRA or another variant of LoRA"),
        (config.bias != "none", "biases of its own"),
        (config.modules_to_save or config.trainable_token_indices, "modules trained in full"),
    ):
        if found:
            raise UserError(f"{checkpoint.folder} has {what}: its update cannot be scaled")
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


def _swap_adapter(model: Any, checkpoint: Checkpoint, name: str) -> Any:
    """Load the adapter, make it active, and only then drop the one before it.

    A load that fails leaves the model as it was.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    folder = checkpoint.folder
    if not (folder / ADAPTER_FILE).is_file():
        raise UserError(f"{folder} holds no {ADAPTER_FILE}; a pickled adapter is not loaded")
    before = list(getattr(model, "peft_config", {}))
    try:
        with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
            found = set(file.keys())
        config = PeftConfig.from_pretrained(folder)
        if config.peft_type != "LORA":
            raise UserError(f"{folder} is an adapter of type {config.peft_type}, not LORA")
        if before:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        else:
            model = PeftModel(model, config, name, low_cpu_mem_usage=True)
        model.load_adapter(folder, name, is_trainable=False, low_cpu_mem_usage=True)
        # an adapter that lacks tensors loads without an error, and scores like another model
        expected = set(
            get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        )
        if found != expected:
            raise UserError(_unlike(folder, expected - found, found - expected))
    except (
        *(SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError),
        *(AttributeError, UserError),
    ) as error:
        if before and name in model.peft_config:
            model.delete_adapter(name)
        elif not before and hasattr(model, "peft_config"):
            model.unload()
        if isinstance(error, UserError):
            raise
        message = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder} is corrupt or does not fit the base: {message}") from None
    model.set_adapter(name, inference_mode=True)
    for old in before:
        model.delete_adapter(old)
    return model.eval()


def _unlike(folder: Path, missing: set[str], unexpected: set[str]) -> str:
    parts = [
        f"{len(names)} {what}, such as {min(names)}"
        for names, what in ((missing, "are missing"), (unexpected, "are unexpected"))
        if names
    ]
    return f"{folder} does not fit the base: of its tensors {'; '.join(parts)}"


def _copy_weights(model: Any, folder: Path, start: Path | None = None, share: float = 1) -> None:
    """Copy every weight of the folder's safetensors into the model, one tensor at a time.

    With `start`, a folder too, weights are what lies that share of the way from its to these. Names
    and shapes are compared first, so a checkpoint that does not fit changes nothing.
    """
    import torch
    from safetensors import SafetensorError

    weights = {name: [weight] for name, weight in model.state_dict().items()}
    if model.config.tie_word_embeddings:  # one weight, also where it is stored in two precisions
        weights[EMBEDDING] = weights[HEAD] = [*weights[EMBEDDING], *weights[HEAD]]
    try:
        with ExitStack() as stack:
            files = _open_tensors(stack, folder)
            shapes = {name: file.get_slice(name).get_shape() for name, file in files.items()}
            _compare_shapes(folder, weights, shapes)
            before = _open_tensors(stack, start) if start else {}
            tied = {EMBEDDING: HEAD, HEAD: EMBEDDING}
            for name, file in files.items():
                tensor = file.get_tensor(name)
                if start:
                    own = name if name in before else tied[name]
                    tensor = torch.lerp(before[own].get_tensor(own).to(tensor), tensor, share)
                for weight in weights[name]:
                    with torch.no_grad():
                        weight.copy_(tensor)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder} is corrupt: {error}") from None


def _open_tensors(stack: ExitStack, folder: Path) -> dict[str, Any]:
    """The folder's safetensors files, memory-mapped, by the names of the tensors in them."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        found |= dict.fromkeys(file.keys(), file)
    return found


def _compare_shapes(
    folder: Path, weights: dict[str, list[Any]], shapes: dict[str, list[int]]
) -> None:
    # of a tied embedding and lm_head a file may name both, or either
    filled = {id(weights[name]) for name in shapes if name in weights}
    missing = [name for name, targets in weights.items() if id(targets) not in filled]
    unexpected = [name for name in shapes if name not in weights]
    known = [name for name in shapes if name in weights]
    other = [name for name in known if list(weights[name][0].shape) != shapes[name]]
    for names, what in (
        (missing, "lacks"),
        (unexpected, "has, and the base has not,"),
        (other, "has in another shape"),
    ):
        if names:
            raise UserError(f"{folder} does not fit the base: it {what} {sorted(names)[0]} ...")
