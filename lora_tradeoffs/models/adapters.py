"""Adapters of PEFT: their updates, module by module, and how one is put into a model.

An adapter that is scale * B A gives A, B and scale of every matrix it is on, by PEFT's own rules.
The update of any other is what PEFT's merge makes of a module's base weight in fp64, minus that
weight; modules are merged one at a time, so no model is built.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.checkpoints import ADAPTER_CONFIG
from lora_tradeoffs.models.base import empty_model
from lora_tradeoffs.models.configs import (
    adapter_fields,
    is_low_rank,
    read_adapter_config,
    read_config,
    refusing,
)
from lora_tradeoffs.models.weights import (
    HEAD,
    FullCheckpoint,
    Matrix,
    Weights,
    matrix_of,
    stored_names,
)

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from torch import Tensor

PREFIX = "base_model.model."  # of all names in an adapter's file
FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
EMBEDDING_FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_embedding_(?P<factor>[AB])")
# PEFT stores a copy of the base's embedding or head with LoRA on it, or with save_embedding_layers.
BASE_COPY = re.compile(
    r"base_model\.model\.(?P<name>.+(?=\.base_layer)|model\.embed_tokens|lm_head)(\.base_layer)?\.weight"
)


def read_checkpoint(folder: Path, base: Weights) -> Adapter | MergedAdapter | FullCheckpoint:
    """The checkpoint in the folder. Raises UserError if it cannot be analysed."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return FullCheckpoint(folder, base)
    config = read_adapter_config(folder, "analysed", _modules(base))
    return (Adapter if is_low_rank(config) else MergedAdapter)(folder, base, config)


# ---------------------------------------------------------------------------- names of tensors


def adapter_tensors(weights: Weights, base: Weights) -> list[str]:
    """The names of an adapter's own tensors, without those of `own_head`, and without the copies of
    the base's embedding and head that PEFT stores when LoRA is on them.

    Raises UserError if a copy is not the base's.
    """
    names, fields = [], adapter_fields(weights.folder)
    trained = tuple(fields.get("modules_to_save", ()))
    if trained and fields.get("ensure_weight_tying"):  # its embedding is saved under both names
        trained += ("embed_tokens", "lm_head")
    trained = tuple(f"{name}.weight" for name in trained)
    for name in sorted(set(weights.shapes) - set(own_head(weights, base))):
        copied = BASE_COPY.fullmatch(name)
        if not copied or name.endswith(trained):
            names.append(name)
            continue
        stored = stored_names(base, both=True).get(f"{copied['name']}.weight")
        if stored is None or not weights.same(name, base, stored):
            raise UserError(f"{weights.folder} was trained on another base: its {name} differs")
    return names


def own_head(weights: Weights, base: Weights) -> list[str]:
    """The adapter's tensors of `modules_to_save` that the base lacks, as a classifier's head."""
    saved, modules = adapter_fields(weights.folder).get("modules_to_save", ()), _modules(base)
    names = {name: name.removeprefix(PREFIX).rpartition(".")[0] for name in weights.shapes}
    return [
        name
        for name, module in names.items()
        if module not in modules and any(f".{part}." in f".{module}." for part in saved)
    ]


def _modules(base: Weights) -> set[str]:
    """The names of the base's modules that hold tensors, at any depth."""
    parts = [name.split(".")[:-1] for name in stored_names(base, both=True)]
    return {".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)}


# ------------------------------------------------------------------------------- the updates


class Adapter:
    """A PEFT LoRA folder: A, B and scale of every matrix that it is on."""

    is_low_rank = True

    def __init__(self, folder: Path, base: Weights, config: LoraConfig) -> None:
        """Raises UserError for an adapter that does not fit the base."""
        self.folder, self._config = folder, config
        self._weights = Weights(folder)
        self._outside: dict[str, dict[str, str]] = {}  # factors on the embedding and the head
        self._factors = self._pair(base)
        self.matrices = sorted(self._factors)

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor, float]:
        """A (r, n), B (m, r) and scale: the update is scale * B A."""
        names = self._factors[matrix]
        A, B = self._weights.tensor(names["A"]), self._weights.tensor(names["B"])
        return A, B, self.scale(matrix)

    def scale(self, matrix: Matrix) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, where patterns may set alpha and r."""
        return self._scale(matrix.name)

    def _scale(self, name: str) -> float:
        config = self._config
        alpha, rank = _value_for(name, config.alpha_pattern, config.lora_alpha), self._rank(name)
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _rank(self, name: str) -> int:
        return _value_for(name, self._config.rank_pattern, self._config.r)

    def squares_outside(self) -> dict[str, float]:
        """||dW||_F^2 of the embedding and the head, if the adapter is on them."""
        squares = {}
        for name, names in self._outside.items():
            A, B = (self._weights.tensor(names[factor]).double() for factor in "AB")
            square = float(((B.T @ B) * (A @ A.T)).sum()) * self._scale(name) ** 2
            if not math.isfinite(square):
                raise UserError(f"{self.folder}: {name} holds values that are not finite")
            squares[f"{name}.weight"] = square
        return squares

    def _pair(self, base: Weights) -> dict[Matrix, dict[str, str]]:
        """The names of A and B of each matrix; every target of the base has both."""
        pairs: dict[Matrix, dict[str, str]] = {}
        for name in adapter_tensors(self._weights, base):
            factor = FACTOR.fullmatch(name) or EMBEDDING_FACTOR.fullmatch(name)
            if factor is None:
                raise UserError(
                    f"{self.folder}: {name} cannot be analysed: it is no factor of LoRA"
                )
            matrix = matrix_of(factor["name"])
            names = pairs if matrix else self._outside
            names.setdefault(matrix or factor["name"], {})[factor["factor"]] = name
        targets = self._targets(base)
        if missing := targets - set(pairs):
            matrix = min(missing)
            raise UserError(f"{self.folder} has no weight for {matrix}, which it targets")
        for matrix, names in sorted(pairs.items()):
            self._check(str(matrix), matrix.name, names, base)
            if matrix not in targets:
                raise UserError(f"{self.folder} has a weight for {matrix}, no target of it")
        if self._outside and self._config.ensure_weight_tying:
            raise UserError(f"{self.folder} cannot be analysed: its ensure_weight_tying is True")
        for name, names in self._outside.items():
            self._check(name, name, names, base)
        return pairs

    def _targets(self, base: Weights) -> set[Matrix]:
        """The matrices of the base that the adapter's configuration names."""
        from peft.tuners.tuners_utils import check_target_module_exists

        config, matrices = copy.copy(self._config), base.matrices()
        if str(config.target_modules).lower() == "all-linear":
            config.target_modules = {matrix.name for matrix in matrices}
        return {matrix for matrix in matrices if check_target_module_exists(config, matrix.name)}

    def _check(self, label: str, name: str, names: dict[str, str], base: Weights) -> None:
        where = f"{self.folder}: {label}"
        lacks = sorted({"A", "B"} - set(names))
        if lacks:
            raise UserError(f"{where} has no lora_{lacks[0]}")
        stored = stored_names(base, both=True).get(f"{name}.weight")
        if stored is None or len(base.shapes[stored]) != 2:
            raise UserError(f"{where}: the base has no such matrix")
        shapes = [self._weights.shapes[names[factor]] for factor in "AB"]
        rank, size = self._rank(name), base.shapes[stored]
        if "lora_embedding_" in names["A"]:
            size = size[::-1]
        if 0 in (*shapes[0], *shapes[1]):
            raise UserError(f"{where} has rank {min(rank, *shapes[0])}")
        if shapes != [(rank, size[1]), (size[0], rank)]:
            raise UserError(
                f"{where}: A {shapes[0]} and B {shapes[1]} do not fit rank {rank} and the base's"
                f" {size[0]} x {size[1]}"
            )


def _value_for(name: str, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that ends the module's name, as PEFT looks it up."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns, name), default)


class MergedAdapter:
    """A PEFT folder whose update is not, or not only, scale * B A: DoRA, OFT and others.

    It has the methods of `FullCheckpoint` for the tensors of the model that it makes.
    """

    is_low_rank = False

    def __init__(self, folder: Path, base: Weights, config: PeftConfig) -> None:
        """Raises UserError for an adapter that does not fit the base, or ties its head."""
        if getattr(config, "ensure_weight_tying", False):
            raise UserError(f"{folder} cannot be analysed: its ensure_weight_tying is True")
        self.folder, self._base = folder, base
        model = _model_of_placeholders(base)
        self._model = put_into(model, Weights(folder), base, config).get_base_model()
        self._stored = stored_names(base, both=True)
        names = [*self._stored] if not base.is_tied else [n for n in self._stored if n != HEAD]
        if getattr(config, "lora_bias", False):
            names += [f"{name}.bias" for name, m in self._model.named_modules() if _is_tuned(m)]
        if HEAD not in names and self._changes(HEAD):
            names.append(HEAD)
        self.tensors = sorted(set(names))
        self.matrices = [matrix for matrix in base.matrices() if self._changes(matrix.tensor)]

    def weight(self, matrix: Matrix) -> Tensor:
        """The tuned matrix in fp64."""
        return self._tuned(matrix.tensor)

    def squares(self, name: str) -> tuple[float, float]:
        """||dW||_F^2 and ||W0||_F^2 of a tensor, summed in fp64."""
        base = self._base.square(self._stored[name]) if name in self._stored else 0.0
        if not self._changes(name):
            return 0.0, base
        update = self._tuned(name)
        if name in self._stored:
            update -= self._base.tensor(self._stored[name])
        square = float(update.square_().sum())
        if not math.isfinite(square + base):
            raise ValueError("the tensor holds values that are not finite")
        return square, base

    def _module(self, name: str) -> Any:
        """The module of a tensor's name; PEFT's wrappers give the attributes of what they wrap."""
        module = functools.reduce(getattr, name.split(".")[:-1], self._model)
        return getattr(module, "token_adapter", module)

    def _changes(self, name: str) -> bool:
        module = self._module(name)
        if _is_tuned(module):
            return getattr(module, "tied_adapter", None) is None  # else it is counted elsewhere
        return not _is_placeholder(getattr(module, name.rpartition(".")[2]))

    def _tuned(self, name: str) -> Tensor:
        """The adapter's tensor of this name in fp64, merged if PEFT computes it in parts."""
        import torch
        from torch import nn

        of_module, _, parameter = name.rpartition(".")
        module = self._module(name)
        if not _is_tuned(module):
            return getattr(module, parameter).detach().double()
        placeholders = filter(_is_placeholder, module.get_base_layer().parameters())
        # a merge changes the module; a copy of a placeholder would be as large as its tensor
        module = copy.deepcopy(module, {id(tensor): tensor for tensor in placeholders})
        layer = module.get_base_layer()
        for part in ("weight", "bias") if hasattr(layer, "bias") else ("weight",):
            stored = self._stored.get(f"{of_module}.{part}")
            if stored and _is_placeholder(getattr(layer, part)):
                setattr(layer, part, nn.Parameter(self._base.tensor(stored).double()))
            elif not stored:  # PEFT merges an adapter's bias into the layer's alone
                layer.bias = nn.Parameter(torch.zeros(len(layer.weight)).double())
        with torch.no_grad(), refusing(f"{self.folder}: PEFT cannot merge {of_module}"):
            module.merge()
        return getattr(layer, parameter).detach()


def _model_of_placeholders(base: Weights) -> Any:
    """The base's model in fp64, each parameter a single zero in memory, seen as its full shape.

    Parameters on the meta device would do, but PEFT moves an adapter to the device of its layer.
    """
    import torch

    model = empty_model(read_config(base.folder), str(base.folder))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=torch.double).expand(parameter.shape)
            module.register_parameter(name, torch.nn.Parameter(zeros, requires_grad=False))
    return model.eval()


def _is_placeholder(tensor: Tensor) -> bool:
    return not any(tensor.stride())


def _is_tuned(module: Any) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


# ---------------------------------------------------------------------------------- in a model


def put_into(model: Any, weights: Weights, base: Weights, config: PeftConfig) -> Any:
    """The model with the folder's adapter in it; a load that fails leaves it half changed.

    Raises UserError if tensors are missing, unexpected or of another shape.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    names = adapter_tensors(weights, base)
    with refusing(f"{weights.folder} is corrupt or does not fit the base"):
        adapted = PeftModel(model, config, low_cpu_mem_usage=True)
        tensors = {name: weights.tensor(name) for name in names}
        tensors = {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}
        tensors = {name: tensor.to(model.device) for name, tensor in tensors.items()}
        set_peft_model_state_dict(adapted, tensors, low_cpu_mem_usage=True)
        # an adapter that lacks tensors loads without an error, and scores like another model
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if set(names) != expected:
            missing, unexpected = expected - set(names), set(names) - expected
            raise UserError(_mismatch(weights.folder, missing, unexpected))
        adapted.set_adapter("default", inference_mode=True)
    return adapted.eval()


def _mismatch(folder: Path, missing: set[str], unexpected: set[str]) -> str:
    parts = [
        f"{len(names)} {what}, such as {min(names)}"
        for names, what in ((missing, "are missing"), (unexpected, "are unexpected"))
        if names
    ]
    return f"{folder} does not fit the base: of its tensors {'; '.join(parts)}"
