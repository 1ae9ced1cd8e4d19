"""The tensors of a base and of its checkpoints on disk, read one at a time without a model.

An adapter gives A, B and scale of every matrix it is on, by PEFT's own rules; one whose update is
not scale * B A is refused by name. A full checkpoint gives its matrices, once its names and shapes
have been compared with the base's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.files import read_json

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"

IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.\w+\.(?P<module>\w+)")
FACTOR = re.compile(r"base_model\.model\.(?P<name>.+)\.lora_(?P<factor>[AB])\.weight")
BLOCK = 1 << 22  # numbers that a pass over a large tensor holds at once
# Fields of adapter_config.json with which an update is scale * B A. Any other field has to be off
# (null, false, empty, "none"): PEFT ignores fields that it does not know.
PLAIN_FIELDS = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("lora_dropout", "inference_mode", "ensure_weight_tying"),
    *("base_model_name_or_path", "revision", "task_type", "auto_mapping", "peft_version"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
# Starts that leave the base as it is; others, as PiSSA's, move a part of its weights to A and B.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, order=True)
class Matrix:
    """A weight matrix of a layer; `name` is that of its module in LlamaForCausalLM."""

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
    """The matrix of a module's name; None for a module outside the layers, as embeddings are."""
    match = IN_LAYER.fullmatch(name)
    return Matrix(int(match["layer"]), match["module"], name) if match else None


class Weights:
    """The tensors of a folder's safetensors, in one file or several."""

    def __init__(self, folder: Path, pattern: str = "*.safetensors") -> None:
        """Raises UserError if there is no such file, or one is no whole safetensors file."""
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._paths: dict[str, Path] = {}
        for path in sorted(folder.glob(pattern)):
            with opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._paths[name] = path
        if not self.shapes:
            raise UserError(
                f"{folder} holds no {pattern}; pickled weights are not loaded, convert them first"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        with opened(self._paths[name]) as file:
            return file.get_tensor(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as runs of whole rows, at most about BLOCK numbers each."""
        rows, *others = self.shapes[name]
        step = max(1, BLOCK // max(1, math.prod(others)))
        for start in range(0, rows, step):
            # opened for each block, or all that was read would stay in memory
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
    """The file, memory-mapped. Raises UserError if it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt ({error}); fetch or copy it again") from None


# -------------------------------------------------------------------------------- adapters


class Adapter:
    """A PEFT LoRA folder: A, B and scale of every matrix that it is on."""

    is_low_rank = True

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises UserError for an adapter that is not plain LoRA or does not fit the base."""
        self.folder = folder
        self._config = read_lora_config(folder, "analysed")
        self._weights = Weights(folder, ADAPTER_FILE)
        self._factors = self._pair(base)
        self.matrices = sorted(self._factors)

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor, float]:
        """A (r, n), B (m, r) and scale: the update is scale * B A."""
        names = self._factors[matrix]
        A, B = self._weights.tensor(names["A"]), self._weights.tensor(names["B"])
        return A, B, self.scale(matrix)

    def scale(self, matrix: Matrix) -> float:
        """alpha / r, or alpha / sqrt(r) with rsLoRA, where patterns may set alpha and r."""
        config = self._config
        alpha = _value_for(matrix, config.alpha_pattern, config.lora_alpha)
        rank = self._rank(matrix)
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _rank(self, matrix: Matrix) -> int:
        return _value_for(matrix, self._config.rank_pattern, self._config.r)

    def _pair(self, base: Weights) -> dict[Matrix, dict[str, str]]:
        """The names of A and B of each matrix; every target of the base has both."""
        pairs: dict[Matrix, dict[str, str]] = {}
        for name in self._weights.shapes:
            factor = FACTOR.fullmatch(name)
            matrix = matrix_of(factor["name"]) if factor else None
            if matrix is None:
                what = "LoRA outside the layers" if "lora_" in name else "it is no factor of LoRA"
                raise UserError(f"{self.folder}: {name} cannot be analysed: {what}")
            pairs.setdefault(matrix, {})[factor["factor"]] = name
        missing = self._targets(base) - set(pairs)
        if missing:
            matrix = min(missing)
            raise UserError(f"{self.folder} has no weight for {matrix.label}, which it targets")
        for matrix, names in sorted(pairs.items()):
            self._check(matrix, names, base)
        return pairs

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


def read_lora_config(folder: Path, purpose: str, also: tuple[str, ...] = ()) -> LoraConfig:
    """The adapter's configuration; `also` are fields accepted beside PLAIN_FIELDS.

    Raises UserError, which says that it "cannot be <purpose>", for an adapter that is not LoRA, has
    another field set, or starts from a changed base.
    """
    path = folder / ADAPTER_CONFIG
    fields = read_json(path)
    kind, start = fields.get("peft_type"), fields.get("init_lora_weights")
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of type {kind}, not LORA")
    for name, value in fields.items():
        if name not in PLAIN_FIELDS and name not in also and value and value != "none":
            raise UserError(f"{folder} cannot be {purpose}: its {name} is {value!r}")
    if (start.lower() if isinstance(start, str) else start) not in PLAIN_STARTS:
        raise UserError(
            f"{folder} cannot be {purpose}: its init_lora_weights is {start!r}, which may change"
            " the base; save it as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    rank = fields.get("r", 1)
    if not isinstance(rank, int) or rank < 1:
        raise UserError(f"{folder} has rank {rank}")
    from peft import LoraConfig

    try:
        return LoraConfig.from_pretrained(folder)
    except (TypeError, ValueError) as error:
        raise UserError(f"PEFT cannot read {path}: {str(error).splitlines()[0]}") from None


def _value_for(matrix: Matrix, patterns: dict[str, Any], default: Any) -> Any:
    """The value of the first pattern that ends the module's name, as PEFT looks it up."""
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns, matrix.name), default)


# --------------------------------------------------------------------------- full checkpoints


class FullCheckpoint:
    """A checkpoint of the whole model, with the base's names and shapes."""

    is_low_rank = False

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises UserError for a checkpoint of another model."""
        self.folder = folder
        self._weights, self._base = Weights(folder), base
        self._base_names = model_tensors(base)
        shapes = {name: base.shapes[stored] for name, stored in self._base_names.items()}
        self._names = match_tensors(self._weights, shapes, _is_tied(base.folder))
        self.tensors = sorted(shapes)
        self.matrices = base.matrices()

    def weight(self, matrix: Matrix) -> Tensor:
        return self._weights.tensor(matrix.tensor)

    def squares(self, name: str) -> tuple[float, float]:
        """||dW||_F^2 and ||W0||_F^2 of any tensor, summed in fp64."""
        update = base = 0.0
        tuned_blocks = self._weights.blocks(self._names[name])
        start_blocks = self._base.blocks(self._base_names[name])
        for tuned, start in zip(tuned_blocks, start_blocks, strict=True):
            tuned, start = tuned.double(), start.double()
            base += float(start.square().sum())
            update += float(tuned.sub_(start).square_().sum())
        if not math.isfinite(update + base):
            raise ValueError("the tensor holds values that are not finite")
        return update, base


def match_tensors(
    weights: Weights, shapes: dict[str, tuple[int, ...]], is_tied: bool
) -> dict[str, str]:
    """The name under which the folder stores each of the model's tensors, given by their shapes.

    Raises UserError for a folder that lacks one, has others, or has one in another shape.
    """
    names, folder = stored_names(weights, is_tied), weights.folder
    for others, what in (
        (set(shapes) - set(names), "lacks"),
        (set(names) - set(shapes), "has, and the base has not,"),
    ):
        if others:
            raise UserError(f"{folder} does not fit the base: it {what} {min(others)}")
    for name, shape in sorted(shapes.items()):
        stored = weights.shapes[names[name]]
        if stored != shape:
            raise UserError(f"{folder} does not fit the base: {name} is {stored}, not {shape}")
    return names


def stored_names(weights: Weights, is_tied: bool) -> dict[str, str]:
    """The name of each of the model's tensors, and that under which it is stored.

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
    """Each of the base's tensors once, with the name under which it is stored."""
    return stored_names(base, _is_tied(base.folder))


def read_checkpoint(folder: Path, base: Weights) -> Adapter | FullCheckpoint:
    """The checkpoint in the folder. Raises UserError if it cannot be analysed."""
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    return Adapter(folder, base) if is_adapter else FullCheckpoint(folder, base)
