"""The tensors of a base and of full checkpoints on disk, read one at a time without a model.

A full checkpoint gives its tensors, once their names and shapes have been compared with the base's.
Which files are read, and under which names, is said here for the models in memory, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from lora_tradeoffs.checkpoints import weight_files
from lora_tradeoffs.models.configs import read_config

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.\w+\.(?P<module>\w+)")
# torch.compile, DataParallel, FSDP and multimodal models add parts to the language model's names.
WRAPPERS = re.compile(
    r"(?<![^.])(_orig_mod|module|language_model|_(fsdp|checkpoint)_wrapped_module)\."
)
IGNORED = "rotary_emb.inv_freq"  # computed, and stored by older versions of transformers
SIGNIFICANT_BITS = {"F8_E5M2": 3, "F8_E4M3": 4, "BF16": 8, "F16": 11, "F32": 24}
BLOCK = 1 << 22  # numbers that a pass over a large tensor holds at once


@dataclass(frozen=True, order=True)
class Matrix:
    """A weight matrix of a layer; `name` is that of its module in the model."""

    layer: int
    module: str
    name: str

    def __str__(self) -> str:
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
    """The tensors of a folder, in one file or several, by the names that the model gives them."""

    def __init__(self, folder: Path, paths: Sequence[Path] | None = None) -> None:
        """`paths` are the files (default: the folder's `weight_files`).

        Raises UserError if one is no whole safetensors file, and if a tensor occurs twice.
        """
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.stored: dict[str, tuple[Path, str]] = {}  # the file and the name there
        for path in weight_files(folder) if paths is None else paths:
            with opened(path) as file:
                for stored in file.keys():  # noqa: SIM118 (it is no dict)
                    name = WRAPPERS.sub("", stored)
                    if name.endswith(IGNORED):
                        continue
                    if name in self.stored:
                        where = self.stored[name][0].name
                        raise UserError(f"{path}: {name} occurs twice, here and in {where}")
                    self.shapes[name] = tuple(file.get_slice(stored).get_shape())
                    self.stored[name] = path, stored
        if not self.shapes:
            raise UserError(f"the weight files of {folder} hold no tensor")

    def tensor(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        path, stored = self.stored[name]
        with opened(path) as file:
            return file.get_tensor(stored)

    def stored_type(self) -> str:
        """The type in which the layers' matrices are stored, as safetensors calls it: BF16."""
        path, name = self.stored[next((m.tensor for m in self.matrices()), min(self.shapes))]
        with opened(path) as file:
            return file.get_slice(name).get_dtype()

    @cached_property
    def is_tied(self) -> bool:
        """Whether the head is the embedding: config.json says so, and no other head is stored.

        Raises UserError if only one is stored, and config.json says that they are two.
        """
        has_config = (self.folder / "config.json").is_file()
        says_so = read_config(self.folder).tie_word_embeddings if has_config else None
        lacks = [name for name in (EMBEDDING, HEAD) if name not in self.shapes]
        if len(lacks) == 1 and says_so is False:
            raise UserError(f"{self.folder} lacks {lacks[0]}, and its config.json does not tie it")
        return bool(lacks) or (bool(says_so) and self.same(EMBEDDING, self, HEAD))

    def same(self, name: str, other: Weights, other_name: str) -> bool:
        """Whether a tensor has the shape and the values of another, in its own precision."""
        if self.shapes[name] != other.shapes[other_name]:
            return False
        pairs = zip(self.blocks(name), other.blocks(other_name), strict=True)
        return all(bool((block == second.to(block.dtype)).all()) for block, second in pairs)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The tensor as runs of whole rows, at most about BLOCK numbers each."""
        rows, *others = self.shapes[name]
        step = max(1, BLOCK // max(1, math.prod(others)))
        path, stored = self.stored[name]
        for start in range(0, rows, step):
            # opened for each block, or all that was read would stay in memory
            with opened(path) as file:
                yield file.get_slice(stored)[start : start + step]

    def square(self, name: str) -> float:
        """||W||_F^2 of the tensor, summed in fp64."""
        return sum(float(block.double().square().sum()) for block in self.blocks(name))

    def matrices(self) -> list[Matrix]:
        """The weight matrices of layers."""
        names = (n.removesuffix(".weight") for n in self.shapes if len(self.shapes[n]) == 2)
        return sorted(matrix for matrix in map(matrix_of, names) if matrix)


@contextmanager
def opened(path: Path, remedy: str = "fetch or copy it again") -> Iterator[Any]:
    """The file, memory-mapped. Raises UserError if it is no whole safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt ({error}); {remedy}") from None


# --------------------------------------------------------------------------- full checkpoints


class FullCheckpoint:
    """A checkpoint of the whole model, with the base's names and shapes."""

    is_low_rank = False

    def __init__(self, folder: Path, base: Weights) -> None:
        """Raises UserError for a checkpoint of another model."""
        self.folder = folder
        self.weights, self._base = Weights(folder), base
        self.other_head = self.weights.is_tied != base.is_tied  # tied in one of the two alone
        sides = self.weights, base
        self._names, self._base_names = (stored_names(side, self.other_head) for side in sides)
        self._compare()
        self.tensors = sorted(self._names)
        self.matrices = base.matrices()

    def _compare(self) -> None:
        names, base_names = self._names, self._base_names
        for others, what in (
            (set(base_names) - set(names), "lacks"),
            (set(names) - set(base_names), "has, and the base has not,"),
        ):
            if others:
                raise UserError(f"{self.folder} does not fit the base: it {what} {min(others)}")
        for name, stored in sorted(names.items()):
            shape, size = self.weights.shapes[stored], self._base.shapes[base_names[name]]
            if shape != size:
                raise UserError(
                    f"{self.folder} does not fit the base: {name} is {shape}, not {size}"
                )

    def weight(self, matrix: Matrix) -> Tensor:
        return self.weights.tensor(matrix.tensor)

    def mixed(self, name: str, share: float) -> Tensor:
        """The tensor that lies `share` of the way from the base's to the checkpoint's, in fp32.

        Those at 0 and 1 are exact, as stored: a sum keeps neither the sign of a zero nor, on every
        device, the last bit.
        """
        import torch

        if share == 0:
            return self._base.tensor(self._base_names[name])
        tuned = self.weights.tensor(self._names[name])
        if share == 1:
            return tuned
        return torch.lerp(self._base.tensor(self._base_names[name]).float(), tuned.float(), share)

    def squares(self, name: str) -> tuple[float, float]:
        """||dW||_F^2 and ||W0||_F^2 of any tensor, summed in fp64."""
        update = base = 0.0
        tuned_blocks = self.weights.blocks(self._names[name])
        start_blocks = self._base.blocks(self._base_names[name])
        for tuned, start in zip(tuned_blocks, start_blocks, strict=True):
            tuned, start = tuned.double(), start.double()
            base += float(start.square().sum())
            update += float(tuned.sub_(start).square_().sum())
        if not math.isfinite(update + base):
            raise ValueError("the tensor holds values that are not finite")
        return update, base


def stored_names(weights: Weights, both: bool = False) -> dict[str, str]:
    """Each of the model's tensors once, with the name under which it is stored.

    Of an embedding and the head that is tied to it, a file may hold either or both; with `both` the
    head is listed, too.
    """
    names = {name: name for name in weights.shapes}
    if not weights.is_tied:
        return names
    head = names.pop(HEAD, None)
    if embedding := names.get(EMBEDDING, head):
        names |= {EMBEDDING: embedding} | ({HEAD: embedding} if both else {})
    return names
