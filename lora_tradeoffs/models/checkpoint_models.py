"""The models of many checkpoints over one base in memory, one after another.

Adapters are put into the base and taken out again, never merged; the weights of a full checkpoint
are copied into the same module, tensor by tensor. So memory holds one model at a time. After an
adapter that is more than low rank, or one that failed, the base is read from its files again: PEFT
does not undo all that such an adapter changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.checkpoints import Checkpoint, check_whole
from lora_tradeoffs.models.adapters import own_head, put_into, read_checkpoint
from lora_tradeoffs.models.base import (
    Base,
    load_base,
    load_model,
    own_fields,
    store_frozen_linears_in_bf16,
)
from lora_tradeoffs.models.configs import is_low_rank, read_adapter_config, read_config
from lora_tradeoffs.models.weights import EMBEDDING, HEAD, FullCheckpoint, Weights

if TYPE_CHECKING:
    from torch import Tensor


def checkpoint_models(
    base: Base, selected: Sequence[Checkpoint], device: str = "cpu", bf16: bool = False
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base), then (checkpoint, its model): adapters first, full weights after them.

    With `bf16` the models are for bf16 autocast alone: their linear layers are stored as it would
    round them. A model is valid until the next one is requested. For a checkpoint that is corrupt,
    half-written or does not fit the base, the UserError that says so takes the model's place, and
    the others follow.

    >>> from pathlib import Path
    >>> from checkpoint_utils import checkpoint_models, checkpoints_in, find_base
    >>> selected = checkpoints_in(Path("models/demo/similar_lora_r8_seed42"))
    >>> for checkpoint, model in checkpoint_models(find_base(), selected):
    ...     print(checkpoint.step if checkpoint else "base", type(model).__name__)
    base LlamaForCausalLM
    3 PeftModel
    6 PeftModel
    """
    models = _Models(base, device, bf16)
    yield None, models.base_model()
    for checkpoint in sorted(selected, key=lambda checkpoint: not checkpoint.is_adapter):
        try:
            check_whole(checkpoint)
            model = models.adapted(checkpoint) if checkpoint.is_adapter else models.full(checkpoint)
        except UserError as error:
            model = error
        yield checkpoint, model
        if checkpoint.is_adapter and not isinstance(model, UserError):
            models.remove_adapter(model)


class _Models:
    """One model at a time: the base's, with an adapter or with a full checkpoint's weights."""

    def __init__(self, base: Base, device: str, bf16: bool) -> None:
        self.base, self.device, self.bf16 = base, device, bf16
        self.weights = Weights(base.folder)
        self.model: Any = None
        self.is_base = self.is_whole = False  # holds the base's weights; is the base's module

    def base_model(self) -> Any:
        if not self.is_base:
            self._load(lambda: load_base(self.base))
            self.is_base = self.is_whole = True
        return self.model

    def _load(self, load: Callable[[], Any]) -> None:
        """Replace the model, whose memory is freed first, also where the caller still holds it."""
        self.is_base = self.is_whole = False
        if self.model is not None:
            self.model.to("meta")
        self.model = load().eval().requires_grad_(False)
        if self.bf16:
            store_frozen_linears_in_bf16(self.model)
        self.model.to(self.device)

    def adapted(self, checkpoint: Checkpoint) -> Any:
        """The base with the adapter in it."""
        model = self.base_model()
        self.is_base = self.is_whole = False  # until the adapter is out again
        modules = [name for name, _ in model.named_modules()]
        config = read_adapter_config(checkpoint.folder, "loaded", modules)
        weights = Weights(checkpoint.folder)
        if head := own_head(weights, self.weights):
            raise UserError(
                f"{checkpoint.folder} cannot be scored: the base lacks its head, {min(head)}; its"
                " drift can be measured with svd_analysis.py"
            )
        return put_into(model, weights, self.weights, config)

    def remove_adapter(self, adapted: Any) -> None:
        """Keep the base for the next adapter, if this one changed nothing in it."""
        config = adapted.peft_config["default"]
        if is_low_rank(config) and not config.ensure_weight_tying:
            adapted.unload()
            self.is_base = self.is_whole = True

    def full(self, checkpoint: Checkpoint) -> Any:
        """The checkpoint's weights in the base's module, or in one of its own configuration."""
        full = FullCheckpoint(checkpoint.folder, self.weights)
        if full.other_head or own_fields(full.folder, self.base):
            folder = full.folder if (full.folder / "config.json").is_file() else self.base.folder
            self._load(lambda: load_model(full.weights, read_config(folder)))
            return self.model
        if not self.is_whole:
            self.base_model()
        self.is_base = False
        _copy_weights(self.model, full)
        return self.model


def checkpoint_weights(
    base: Base, checkpoints: Sequence[Checkpoint]
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base's weights), then (checkpoint, its weights) for each; no model is built.

    The weights are verified and read when they are used. A checkpoint that is broken or does not
    fit the base comes with the UserError that says so instead.

    >>> from pathlib import Path
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
            check_whole(checkpoint, (".safetensors", "config.json", ".index.json"))
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
    adapter whose update is not linear in its scaling, a full checkpoint that computes otherwise
    than the base, or a folder that is corrupt, and ValueError for a t that is not finite.
    """
    from math import isfinite

    if not all(map(isfinite, scales)):
        raise ValueError(f"the scale of an update must be finite: {list(scales)}")
    scaled = _adapter_scale if checkpoint.is_adapter else _weights_scale
    set_scale = scaled(base, checkpoint, model)
    try:
        for t in scales:
            set_scale(t)
            yield t, model
    finally:
        set_scale(1)


@contextmanager
def with_added(model: Any, changes: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[Any]:
    """The model with L R^T added to the weights of modules, given as L and R by the module's name.

    The product is applied to the modules' inputs in fp32 (in fp64 if the model is), so no weight is
    copied, and afterwards the model is the same bit for bit.
    """
    import torch

    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    base = getattr(model, "get_base_model", lambda: model)()

    def adding(left: Tensor, right: Tensor) -> Callable[..., Tensor]:
        left, right = (side.to(model.device, dtype) for side in (left, right))

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            with torch.autocast(output.device.type, enabled=False):
                return output + (args[0].to(dtype) @ right @ left.T).to(output.dtype)

        return hook

    with ExitStack() as stack:
        for name, change in changes.items():
            handle = base.get_submodule(name).register_forward_hook(adding(*change))
            stack.callback(handle.remove)
        yield model


def _adapter_scale(base: Base, checkpoint: Checkpoint, model: Any) -> Callable[[float], None]:
    """A function that gives the adapter's layers t times the update that they have now.

    LoRA's scaling is multiplied. A layer of another type gives the base layer's output plus t times
    what it adds to that.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config, name = model.peft_config["default"], "default"
    for field in ("modules_to_save", "bias", "trainable_token_indices"):
        value = getattr(config, field, None)
        if value not in (None, "none", []):
            raise UserError(f"{checkpoint.folder} cannot be scaled: its {field} is {value!r}")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if is_low_rank(config):
        # PEFT's scale_layer multiplies the present scaling, so t = 0 could not be undone
        scalings = [layer.scaling[name] for layer in layers]

        def set_scale(t: float) -> None:
            for layer, scaling in zip(layers, scalings, strict=True):
                layer.scaling[name] = t * scaling

        return set_scale
    hooks: list[Any] = []

    def set_share(t: float) -> None:
        def share(layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
            start = layer.base_layer(*args, **kwargs)
            return start + t * (output - start)

        while hooks:
            hooks.pop().remove()
        if t != 1:
            hooks.extend(layer.register_forward_hook(share, with_kwargs=True) for layer in layers)

    return set_share


def _weights_scale(base: Base, checkpoint: Checkpoint, model: Any) -> Callable[[float], None]:
    """A function that sets the weights to those t times the way from the base's."""
    full = FullCheckpoint(checkpoint.folder, Weights(base.folder))
    fields = own_fields(full.folder, base) + ["tie_word_embeddings"] * full.other_head
    if fields:
        raise UserError(
            f"{full.folder} cannot be scaled: it computes with its own {', '.join(fields)}, not the"
            " base's"
        )
    return lambda t: _copy_weights(model, full, t)


def _copy_weights(model: Any, full: FullCheckpoint, share: float = 1) -> None:
    """Copy every weight of the checkpoint into the base's module, one tensor at a time.

    With `share`, the weights are those that lie so far of the way from the base's to these.
    """
    import torch

    targets = model.state_dict()
    for name in full.tensors:
        tensor = full.mixed(name, share)
        # a tied weight may be stored in two precisions
        tied = name == EMBEDDING and HEAD not in full.tensors and HEAD in targets
        for target in (EMBEDDING, HEAD) if tied else (name,):
            with torch.no_grad():
                targets[target].copy_(tensor)
