"""The weights of a base and of its checkpoints, tensor by tensor, without building a model.

Safetensors are memory-mapped and read where they are asked for. An adapter gives A, B and scale of
every matrix it is on, with PEFT's own rules; one whose update is not scale * B A is refused by
name. A full checkpoint gives its matrices, after names and shapes were compared with the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.files import Checkpoint, check_whole, read_json
from lora_tradeoffs.models.checkpoint_models import ADAPTER_FILE, EMBEDDING, HEAD

if TYPE_CHECKING:
    from torch import Tensor

    from lora_tradeoffs.models.base import Base

IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.\w+\.(?P<module>\w+)")
FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
BLOCK = 1 << 22  # numbers that a pass over a large tensor holds at once
# With these an adapter's update is not, or not only, scale * B A.
REFUSED = {
    "use_dora": "DoRA",
    "bias": "trained biases (bias)",
    "lora_bias": "a bias of its own (lora_bias)",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "arrow_config": "Arrow routing (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
# These starts change the base, too, unless the adapter was converted when it was saved.
REFUSED_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True, order=True)
class Matrix:
    """A weight matrix of a layer; `name` is its module's in LlamaForCausalLM."""

    layer: int
    module: str
    name: str

    @property
    def label(self) -> str:
        return f"layer {self.layer} {self.module}"

    @property
    def tensor(self) -> str:
        """The name of its weight in a checkpoint of the whole model."""
        return f"{self.name}.weight"


def matrix_of(name: str) -> Matrix | None:
    """The matrix of a module's name; None for what is in no layer, as embeddings are."""
    found = IN_LAYER.fullmatch(name)
    return Matrix(int(found["layer"]), found["module"], name) if found else None


class Weights:
    """The tensors of a folder's safetensors, in one file or several."""

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        """Raises UserError if there is no such file, or one is cut off or no safetensors."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob(pattern)):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._paths[name] = path
        if not self.shapes:
            raise UserError(f"{folder} holds no {pattern}; pickled weights are not loaded")

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        with opened(self._paths[name]) as file:
            return file.get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as runs of whole rows, at most about BLOCK numbers each."""
        rows, *others = self.shapes[name]
        step = max(1, BLOCK // max(1, math.prod(others)))
        for start in range(0, rows, step):
            # mapped anew each time, or all that was read would stay in memory
            with opened(self._paths[name]) as file:
                yield file.get_slice(name)[start : start + step]

    def square(self, name: str) -> float:
        """||W||_F^2 of the tensor, summed in fp64."""
        return sum(float(block.double().square().sum()) for block in self.blocks(name))

    def matrices(self) -> list[Matrix]:
        """The weight matrices of layers."""
        names = (n.removesuffix(".weight") for n in self.shapes if len(self.shapes[n]) == 2)
        return sorted(matrix for matrix in map(matrix_of, names) if matrix)


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The safetensors file. Raises UserError for one that is cut off or no safetensors."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt: {error}") from None


# -------------------------------------------------------------------------------- adapters


class Adapter:
    """A PEFT LoRA folder: A, B and scale of every matrix that it is on."""

    is_low_rank = True

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises UserError for another kind of adapter, and one that does not fit the base."""
        self.folder = folder
        if not (folder / ADAPTER_FILE).is_file():
            raise UserError(f"{folder} holds no {ADAPTER_FILE}; a pickled adapter is not loaded")
        self._config = _lora_config(folder)
        self._weights = Weights(folder, ADAPTER_FILE)
        self._factors = self._pair(base)
        self.matrices = sorted(self._factors)

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor, float]:
        """A (r, n), B (m, r) and scale: the update is scale * B A."""
        names = self._factors[matrix]
        A, B = self._weights.tensor(names["A"]), self._weights.tensor(names["B"])
        return A, B, self.scale(matrix)

    def scale(self, matrix: Matrix) -> float:
        """alpha / r, of rsLoRA alpha / sqrt(r), with the matrix's own alpha and r."""
        config = self._config
        alpha = _of_pattern(config.alpha_pattern, matrix.name, config.lora_alpha)
        rank = self._rank(matrix)
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _rank(self, matrix: Matrix) -> int:
        return _of_pattern(self._config.rank_pattern, matrix.name, self._config.r)

    def _pair(self, base: Weights) -> dict[Matrix, dict[str, str]]:
        """The names of A and B of each matrix; every target of the base has both."""
        found: dict[Matrix, dict[str, str]] = {}
        for name in self._weights.shapes:
            factor = FACTOR.fullmatch(name)
            matrix = matrix_of(factor["name"]) if factor else None
            if matrix is None:
                what = "LoRA outside the layers" if "lora_" in name else "it is no factor of LoRA"
                raise UserError(f"{self.folder}: {name} cannot be analysed: {what}")
            found.setdefault(matrix, {})[factor["factor"]] = name
        missing = self._targets(base) - set(found)
        if missing:
            matrix = min(missing)
            raise UserError(f"{self.folder} has no weight for {matrix.label}, which it targets")
        for matrix, names in sorted(found.items()):
            self._check(matrix, names, base)
        return found

    def _targets(self, base: Weights) -> set[Matrix]:
        """The matrices of the base that the adapter's configuration names."""
        from peft.tuners.tuners_utils import check_target_module_exists

        matrices = base.matrices()
        return {m for m in matrices if check_target_module_exists(self._config, m.name)}

    def _check(self, matrix: Matrix, names: dict[str, str], base: Weights) -> None:
        where = f"{self.folder}: {matrix.label}"
        lacks = sorted({"A", "B"} - set(names))
        if lacks:
            raise UserError(f"{where} has no lora_{lacks[0]}")
        if matrix.tensor not in base.shapes:
            raise UserError(f"{where}: the base has no such matrix")
        shapes = [self._weights.shapes[names[factor]] for factor in "AB"]
        rank, size = self._rank(matrix), base.shapes[matrix.tensor]
        if rank < 1 or 0 in (*shapes[0], *shapes[1]):
            raise UserError(f"{where} has rank {min(rank, *shapes[0])}")
        if shapes != [(rank, size[1]), (size[0], rank)]:
            raise UserError(
                f"{where}: A {shapes[0]} and B {shapes[1]} do not fit rank {rank} and the base's"
                f" {size[0]} x {size[1]}"
            )


def _lora_config(folder: Path) -> Any:
    """The adapter's configuration. Raises UserError for what is not plain LoRA."""
    path = folder / "adapter_config.json"
    raw = read_json(path)
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}, not LORA")
    for name, what in REFUSED.items():
        if raw.get(name) and raw[name] != "none":
            raise UserError(f"{folder} cannot be analysed: it has {what}")
    start = str(raw.get("init_lora_weights", "")).lower()
    if start.startswith(REFUSED_STARTS):
        raise UserError(
            f"{folder} cannot be analysed: it starts from {start}, which changes the base; save it"
            " as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    rank = raw.get("r", 1)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{folder} has rank {rank}")
    from peft import LoraConfig

    try:
        return LoraConfig.from_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path} is of no adapter known here: {str(error).splitlines()[0]}"
        ) from None


def _of_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that ends the module's name, as PEFT looks it up."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns, name), default)


# --------------------------------------------------------------------------- full checkpoints


class FullCheckpoint:
    """A checkpoint of the whole model, with the base's names and shapes."""

    is_low_rank = False

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises UserError for a checkpoint of another model."""
        self.folder = folder
        self._weights, self._base = Weights(folder), base
        theirs = model_tensors(base)
        ours = _names(self._weights, _is_tied(base.folder))
        for names, what in (
            (set(theirs) - set(ours), "lacks"),
            (set(ours) - set(theirs), "has, and the base has not,"),
        ):
            if names:
                raise UserError(f"{folder} does not fit the base: it {what} {min(names)}")
        for name in sorted(theirs):
            sizes = self._weights.shapes[ours[name]], base.shapes[theirs[name]]
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{folder} does not fit the base: {name} is {sizes[0]}, not {sizes[1]}"
                )
        self._stored = {name: (ours[name], theirs[name]) for name in theirs}
        self.tensors = sorted(theirs)
        self.matrices = base.matrices()

    def weight(self, matrix: Matrix) -> Tensor:
        return self._weights.tensor(matrix.tensor)

    def squares(self, name: str) -> tuple[float, float]:
        """||dW||_F^2 and ||W0||_F^2 of any tensor, summed in fp64."""
        update = base = 0.0
        ours, theirs = self._stored[name]
        for tuned, start in zip(self._weights.blocks(ours), self._base.blocks(theirs), strict=True):
            tuned, start = tuned.double(), start.double()
            base += float(start.square().sum())
            update += float(tuned.sub_(start).square_().sum())
        if not math.isfinite(update + base):
            raise ValueError("the tensor holds values that are not finite")
        return update, base


def _names(weights: Weights, is_tied: bool) -> dict[str, str]:
    """Every tensor's name, and the one it is stored under.

    Of an embedding and the head that is tied to it, a file may hold either or both.
    """
    names = {name: name for name in weights.shapes}
    if is_tied and HEAD in names:
        names.setdefault(EMBEDDING, HEAD)
        del names[HEAD]
    return names


def _is_tied(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and bool(read_json(path).get("tie_word_embeddings"))


def model_tensors(base: Weights) -> dict[str, str]:
    """Every tensor of the model once, with the name that it is stored under."""
    return _names(base, _is_tied(base.folder))


def checkpoint_weights(
    base: Base, checkpoints: Sequence[Checkpoint]
) -> Iterator[tuple[Checkpoint | None, Any]]:
    """(None, the base's weights), then (checkpoint, its weights) for each; no model is built.

    The weights are verified and read when they are used. A checkpoint that is broken or does not
    fit the base comes with the UserError that says so instead.
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


def read_checkpoint(folder: Path, base: Weights) -> Adapter | FullCheckpoint:
    """The checkpoint in the folder. Raises UserError if it cannot be analysed."""
    is_adapter = (folder / "adapter_config.json").is_file()
    return Adapter(folder, base) if is_adapter else FullCheckpoint(folder, base)
