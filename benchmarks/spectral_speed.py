"""Drift: leading singular triplets of W0 + dW against a dense SVD, and against PEFT's detector.

    python -m benchmarks.spectral_speed --json FILE

Matrices of Llama-3.2-1B's shapes (q_proj 2048 x 2048, v_proj 512 x 2048) with random singular
vectors and SmolLM2's singular values (the mean over its layers, resampled), and SmolLM2's own.
Updates are Gaussian: factors A and B of LoRA, or dense; ||dW|| / ||W0|| in Frobenius norm is 1e-2
or 1e-1, and a ratio is that of the slower. Both sides take turns. Ours starts from A and B (or from
the tuned weight) and the base's decomposition; torch.linalg.svd starts from the merged matrix in
fp64, and its time includes the products that give the cosines with the base's vectors; PEFT's
detector starts from a model in fp32. A call that takes less than a second is warmed up and then
repeated. Beyond k = 256 the question is whether the chosen method is ever slower than a dense
decomposition. The last part is the cost of a whole study (drift_study.py).

    k10_r8 ...    k triplets at LoRA rank r, q_proj
    dense_k10 ... k triplets of a fully fine-tuned q_proj
    peft_k10      intruders at rank 8, k = 10, against reduce_intruder_dimension
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.comparison import benchmark_settings, build_parser, print_ratios, write
from benchmarks.drift_study import LAYERS, RANKS, SHAPES, SIZES, base_of, study_cost, update_of
from config import INTRUDER_EPSILON, UserError
from lora_tradeoffs.command_line import guarded, positive_int

KS, LARGE_KS = (10, 64, 256), (512, 1024)
# rank (0: dense) and k of the ratios, on q_proj
NAMED = {
    "k10_r8": (8, 10),
    "k64_r8": (8, 64),
    "k64_r64": (64, 64),
    "k256_r8": (8, 256),
    "dense_k10": (0, 10),
    "dense_k64": (0, 64),
}
REAL_LAYERS = (0, 15, 29)
SHORT, REPEATS = 1.0, 5


# ---------------------------------------------------------------------------------- matrices


def real_weights(folder: Path) -> dict[tuple[int, str], Any]:
    """SmolLM2's q_proj and v_proj of every layer."""
    from safetensors import safe_open

    weights = {}
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            parts = name.split(".")
            if parts[-2] in SHAPES:
                weights[int(parts[2]), parts[-2]] = file.get_tensor(name)
    return weights


def mean_spectrum(weights: dict, module: str, count: int) -> Any:
    """Singular values over the Frobenius norm, mean over the layers, at `count` points."""
    import numpy as np
    import torch

    spectra = []
    for (_, name), weight in weights.items():
        if name == module:
            values = torch.linalg.svdvals(weight.double())
            spectra.append((values / values.norm()).numpy())
    mean = np.mean(spectra, axis=0)
    points, known = (np.arange(count) + 0.5) / count, (np.arange(len(mean)) + 0.5) / len(mean)
    values = torch.from_numpy(np.interp(points, known, mean))
    return values / values.norm()


# ----------------------------------------------------------------------------------- timings


def timed(function: Callable, *arguments: Any) -> tuple[Any, float, int]:
    """What it returns, its seconds, and the bytes by which memory grew at its peak.

    If the first call takes less than SHORT seconds it is a warm-up, and the median of REPEATS more
    is taken: other load on the machine changes calls of milliseconds several-fold.
    """
    from lora_tradeoffs.hardware import peak_memory, reset_peak_memory

    def call() -> tuple[float, Any]:
        start = time.perf_counter()
        value = function(*arguments)
        return time.perf_counter() - start, value

    reset_peak_memory("cpu")
    before = peak_memory("cpu")
    seconds, value = call()
    grown = peak_memory("cpu") - before
    if seconds < SHORT:
        seconds = statistics.median(call()[0] for _ in range(REPEATS))
    return value, seconds, grown


def against_dense(
    name: str, base: Any, ranks: tuple, ks: tuple, pairs: int, sizes: tuple = SIZES
) -> list[dict[str, Any]]:
    """Rows of one matrix: every rank (0: dense), size, pair and k.

    One dense decomposition of a pair serves all k, whose products with the base's vectors are timed
    apart and added.
    """
    from tqdm import tqdm

    ks = tuple(k for k in ks if k <= len(base.S))
    weight, rows = base.U * base.S @ base.Vh, []
    for rank, size in tqdm([(r, s) for r in ranks for s in sizes], desc=name):
        update = update_of(base.shape, rank, size * float(base.S.norm()))
        merged = weight + update[-1]
        for pair in range(pairs):
            dense, dense_seconds, dense_bytes = timed(decompose, merged)
            for k in ks:
                cosines, cosine_seconds, _ = timed(cosines_of, base, dense, k)
                ours, our_seconds, our_bytes = timed(triplets, base, update, merged, k)
                errors = errors_of(ours, (dense[1][:k], *cosines))
                rows.append(
                    {"matrix": name, "shape": list(base.shape), "rank": rank, "k": k, "size": size}
                    | {"pair": pair, "method": ours.method, **errors}
                    | {"ours_seconds": our_seconds, "dense_seconds": dense_seconds + cosine_seconds}
                    | {"ours_bytes": our_bytes, "dense_bytes": dense_bytes}
                )
    return rows


def triplets(base: Any, update: tuple, merged: Any, k: int) -> Any:
    from lora_tradeoffs.drift.solver import top_triplets_dense, top_triplets_lora

    if len(update) == 1:
        return top_triplets_dense(base, merged, k)
    return top_triplets_lora(base, update[0], update[1], 1.0, k)


def decompose(merged: Any) -> tuple[Any, Any, Any]:
    import torch

    return torch.linalg.svd(merged, full_matrices=False)


def cosines_of(base: Any, decomposition: tuple, k: int) -> tuple[Any, Any]:
    """Both sides' cosines of the k leading vectors with the base's."""
    U, _, Vh = decomposition
    return base.U.T @ U[:, :k], base.Vh @ Vh[:k].T


def errors_of(ours: Any, dense: tuple) -> dict[str, float]:
    """Largest relative error of a value and error of a largest cosine.

    Raises UserError if they are above 1e-9 and 1e-6, or the intruders are not the same.
    """
    from lora_tradeoffs.drift.measures import max_cosines

    values = dense[0]
    value_error = float(((ours.values - values) / values).abs().max())
    pairs = (ours.cosines, dense[1]), (ours.right_cosines, dense[2])
    cosine_error = max(float((max_cosines(a) - max_cosines(b)).abs().max()) for a, b in pairs)
    if value_error > 1e-9 or cosine_error > 1e-6:
        raise UserError(f"wrong by {value_error:.1e} (values), {cosine_error:.1e} (cosines)")
    are_intruders = [max_cosines(part) < INTRUDER_EPSILON for part in pairs[0]]
    if (are_intruders[0] != are_intruders[1]).any():
        raise UserError("the intruders differ from those of the dense decomposition")
    return {"value_error": value_error, "cosine_error": cosine_error}


def count_intruders(base: Any, A: Any, B: Any, k: int) -> int:
    from lora_tradeoffs.drift.measures import intruders, max_cosines
    from lora_tradeoffs.drift.solver import top_triplets_lora

    return intruders(max_cosines(top_triplets_lora(base, A, B, 1.0, k).cosines), k)


def detect_with_peft(model: Any, k: int, log: Callable[[str], None]) -> None:
    """PEFT's detector; if it finds intruders, it also reduces them."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    reduce_intruder_dimension(model, top_k=k, logging_sink=log)
    model.delete_adapter("intruder_reduced")


def against_peft(base: Any, pairs: int, rank: int = 8, k: int = 10) -> list[dict[str, Any]]:
    """PEFT's detector on a model of one linear layer; the counts must agree."""
    import torch
    from peft import LoraConfig, get_peft_model

    rows = []
    for size in SIZES:
        model = torch.nn.Sequential(torch.nn.Linear(*reversed(base.shape), bias=False))
        model[0].weight.data = (base.U * base.S @ base.Vh).float()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
        peft_model = get_peft_model(model, config)
        layer = peft_model.base_model.model[0]
        A, B, _ = (part.float() for part in update_of(base.shape, rank, size * base.S.norm()))
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
        for pair in range(pairs):
            log: list[str] = []
            ours = timed(count_intruders, base, A, B, k)
            peer = timed(detect_with_peft, peft_model, k, log.append)
            counted = 0 if "No intruders" in log[0] else int(log[0].rsplit(" ", 1)[1])
            if counted != ours[0]:
                raise UserError(f"PEFT counts {counted} intruders, this suite {ours[0]}")
            rows.append(
                {"matrix": "q_proj", "rank": rank, "k": k, "size": size, "pair": pair}
                | {"intruders": counted, "ours_seconds": ours[1], "peft_seconds": peer[1]}
                | {"ours_bytes": ours[2], "peft_bytes": peer[2]}
            )
    return rows


# ------------------------------------------------------------------------------------ report


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per pair, the peer's seconds over ours, for the update on which that is less."""
    ratios: dict[str, list[float]] = {}
    for name, (rank, k) in {**NAMED, "peft_k10": (8, 10)}.items():
        peer = "peft_seconds" if name.startswith("peft") else "dense_seconds"
        sides: dict[int, list[float]] = {}
        for row in rows:
            case = (row.get("matrix"), row.get("rank"), row.get("k"))
            if case == ("q_proj", rank, k) and peer in row:
                sides.setdefault(row["pair"], []).append(row[peer] / row["ours_seconds"])
        ratios[name] = [round(min(both), 2) for _, both in sorted(sides.items())]
    return {name: values for name, values in ratios.items() if values}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the medians over the pairs, and what a study costs."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    keys = ["matrix", "rank", "size", "k"]
    for peer in ("dense_seconds", "peft_seconds"):
        if peer in frame:
            part = frame[frame[peer].notna()].dropna(axis=1, how="all").drop(columns="pair")
            medians = part.groupby(keys, sort=False).median(numeric_only=True)
            print(medians.to_string(float_format="{:.3g}".format), end="\n\n")
    for row in rows:
        if "study" in row:
            print(
                f"{row['study']}, k = {row['k']}, {row['workers']} workers, after the base's SVD:"
                f" LoRA {row['projected_lora_seconds'] / 60:.1f} minutes"
                f" ({row['lora_peak_bytes'] / 1e9:.2f} GB), all"
                f" {row['projected_seconds'] / 60:.1f} ({row['peak_bytes'] / 1e9:.2f} GB)"
            )


def measure_all(weights: dict, bases: dict[str, Any], pairs: int) -> list[dict[str, Any]]:
    """Every matrix, rank and k; then a whole study."""
    from lora_tradeoffs.drift.svd import svd

    rows = []
    for module, base in bases.items():
        rows += against_dense(module, base, (*RANKS, 0), KS, pairs)
        rows += against_dense(module, base, (8, 64, 0), LARGE_KS, pairs)
    for (layer, module), weight in weights.items():
        if layer in REAL_LAYERS:
            name = f"SmolLM2 {layer} {module[0]}"
            rows += against_dense(name, svd(weight), (*RANKS, 0), KS, pairs)
    return rows + study_cost(bases, LAYERS, (64, 256))


def measure_named(bases: dict[str, Any], pairs: int) -> list[dict[str, Any]]:
    """What the ratios need, on the largest update, and a study of one layer."""
    rows = []
    for rank in dict.fromkeys(rank for rank, _ in NAMED.values()):
        ks = tuple(k for r, k in NAMED.values() if r == rank)
        rows += against_dense("q_proj", bases["q_proj"], (rank,), ks, pairs, SIZES[-1:])
    return rows + study_cost(bases, 1, (64,))


@guarded
def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--shrink", type=positive_int, default=1, metavar="N", help="divide the shapes by N"
    )
    args = parser.parse_args(argv)
    settings = benchmark_settings(args)
    import torch

    from lora_tradeoffs.hardware import describe_environment
    from lora_tradeoffs.models.base import prepare_base

    torch.manual_seed(0)
    shapes = {name: tuple(d // args.shrink for d in shape) for name, shape in SHAPES.items()}
    weights = real_weights(prepare_base(settings).folder)
    values = {m: mean_spectrum(weights, m, min(shape)) for m, shape in shapes.items()}
    bases = {m: base_of(values[m], shape) for m, shape in shapes.items()}
    rows = (
        measure_named(bases, args.pairs) if args.quick else measure_all(weights, bases, args.pairs)
    )
    rows += against_peft(bases["q_proj"], args.pairs)
    ratios = ratios_of(rows)
    print_table(rows)
    print_ratios(ratios)
    meta = describe_environment("cpu", False, "none", 1) | {"precision": "fp64", "shapes": shapes}
    write(args.json, meta, ratios, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
