"""Drift: leading singular triplets of W0 + dW against a dense SVD, and against PEFT's detector.

    python benchmarks/spectral_speed.py --json FILE

Matrices of Llama-3.2-1B's shapes (q_proj 2048 x 2048, v_proj 512 x 2048) with random singular
vectors and SmolLM2's singular values (the mean over its layers, resampled), and SmolLM2's own.
Updates are Gaussian: factors A and B of LoRA, or dense; ||dW|| / ||W0|| in Frobenius norm is 1e-2
or 1e-1, and a ratio is that of the slower. Both sides take turns. Ours starts from A and B (or from
the tuned weight) and the base's decomposition; torch.linalg.svd starts from the merged matrix in
fp64, and its time holds the products that give the cosines with the base's vectors, too; PEFT's
detector starts from a model in fp32. Beyond k = 256 it is looked at whether the choice of method
ever is slower than a dense decomposition. Last, what a whole study costs (drift_study.py).

    k10_r8 ...    k triplets at LoRA rank r, q_proj
    dense_k10 ... k triplets of a fully fine-tuned q_proj
    peft_k10      intruders at rank 8, k = 10, against reduce_intruder_dimension
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from drift_study import LAYERS, RANKS, SHAPES, SIZES, base_of, study_cost, update_of

from config import (
    INTRUDER_EPSILON,
    Parser,
    UserError,
    add_common_arguments,
    guarded,
    resolve_settings,
)

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
SHORT = 0.3


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of timings (default 3)")
    parser.add_argument(
        "--quick", action="store_true", help="only what the ratios need, in about two minutes"
    )
    parser.add_argument("--json", type=Path, help="write meta, ratios and rows to this file")
    return parser


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


def timed(function: Callable, *arguments: Any, **options: Any) -> tuple[Any, float, int]:
    """What it returns, its seconds, and the bytes by which memory grew at its peak.

    What takes less than SHORT seconds is timed five times, and the median taken: of milliseconds,
    whatever else the machine does makes a multiple.
    """
    from lora_tradeoffs.hardware import peak_memory, reset_peak_memory

    reset_peak_memory("cpu")
    before = peak_memory("cpu")
    seconds: list[float] = []
    while not seconds or (seconds[0] < SHORT and len(seconds) < 5):
        start = time.perf_counter()
        found = function(*arguments, **options)
        seconds.append(time.perf_counter() - start)
    return found, statistics.median(seconds), peak_memory("cpu") - before


def against_dense(
    name: str, base: Any, ranks: tuple, ks: tuple, pairs: int, sizes: tuple = SIZES
) -> list[dict[str, Any]]:
    """Rows of one matrix: every rank (0: dense), k, size and pair."""
    from tqdm import tqdm

    weight = base.U * base.S @ base.Vh
    cases = [(r, k, s) for r in ranks for k in ks for s in sizes if k <= len(base.S)]
    rows = []
    for rank, k, size in tqdm(cases, desc=name):
        update = update_of(base.shape, rank, size * float(base.S.norm()))
        merged = weight + update[-1]
        for pair in range(pairs):
            ours = timed(triplets, base, update, merged, k)
            dense = timed(decompose_densely, base, merged, k)
            errors = errors_of(ours[0], dense[0], k)
            rows.append(
                {"matrix": name, "shape": list(base.shape), "rank": rank, "k": k, "size": size}
                | {"pair": pair, "method": ours[0].method, **errors}
                | {"ours_seconds": ours[1], "dense_seconds": dense[1]}
                | {"ours_bytes": ours[2], "dense_bytes": dense[2]}
            )
    return rows


def triplets(base: Any, update: tuple, merged: Any, k: int) -> Any:
    from lora_tradeoffs.drift.solver import top_triplets_dense, top_triplets_lora

    if len(update) == 1:
        return top_triplets_dense(base, merged, k)
    return top_triplets_lora(base, update[0], update[1], 1.0, k)


def decompose_densely(base: Any, merged: Any, k: int) -> tuple[Any, Any, Any]:
    """The k leading values, and both sides' cosines with the base's vectors."""
    import torch

    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    return S[:k], base.U.T @ U[:, :k], base.Vh @ Vh[:k].T


def errors_of(found: Any, dense: tuple, k: int) -> dict[str, float]:
    """Largest relative error of a value and error of a largest cosine.

    Raises UserError where they are above 1e-9 and 1e-6, or the intruders are not the same.
    """
    from lora_tradeoffs.drift.measures import max_cosines

    values = dense[0]
    value_error = float(((found.values - values) / values).abs().max())
    pairs = (found.cosines, dense[1]), (found.right_cosines, dense[2])
    cosine_error = max(float((max_cosines(a) - max_cosines(b)).abs().max()) for a, b in pairs)
    if value_error > 1e-9 or cosine_error > 1e-6:
        raise UserError(f"wrong by {value_error:.1e} (values), {cosine_error:.1e} (cosines)")
    are_intruders = [max_cosines(part) < INTRUDER_EPSILON for part in pairs[0]]
    if (are_intruders[0] != are_intruders[1]).any():
        raise UserError("other intruders than those of the dense decomposition")
    return {"value_error": value_error, "cosine_error": cosine_error}


def count_intruders(base: Any, A: Any, B: Any, k: int) -> int:
    from lora_tradeoffs.drift.measures import intruders, max_cosines
    from lora_tradeoffs.drift.solver import top_triplets_lora

    return intruders(max_cosines(top_triplets_lora(base, A, B, 1.0, k).cosines), k)


def detect_with_peft(model: Any, k: int, tell: Callable[[str], None]) -> None:
    """Where it finds none, that is all it does; else it also mends the adapter."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    reduce_intruder_dimension(model, top_k=k, logging_sink=tell)
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
            said: list[str] = []
            ours = timed(count_intruders, base, A, B, k)
            theirs = timed(detect_with_peft, peft_model, k, said.append)
            counted = 0 if "No intruders" in said[0] else int(said[0].rsplit(" ", 1)[1])
            if counted != ours[0]:
                raise UserError(f"PEFT counts {counted} intruders, we {ours[0]}")
            rows.append(
                {"matrix": "q_proj", "rank": rank, "k": k, "size": size, "pair": pair}
                | {"intruders": counted, "ours_seconds": ours[1], "peft_seconds": theirs[1]}
                | {"ours_bytes": ours[2], "peft_bytes": theirs[2]}
            )
    return rows


# ------------------------------------------------------------------------------------ report


def ratios_of(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Per pair, the peer's seconds over ours, for the update on which that is less."""
    found: dict[str, list[float]] = {}
    for name, (rank, k) in {**NAMED, "peft_k10": (8, 10)}.items():
        peer = "peft_seconds" if name.startswith("peft") else "dense_seconds"
        sides: dict[int, list[float]] = {}
        for row in rows:
            case = (row.get("matrix"), row.get("rank"), row.get("k"))
            if case == ("q_proj", rank, k) and peer in row:
                sides.setdefault(row["pair"], []).append(row[peer] / row["ours_seconds"])
        found[name] = [round(min(both), 2) for _, both in sorted(sides.items())]
    return found


def print_table(rows: list[dict[str, Any]], ratios: dict[str, list[float]]) -> None:
    print(
        f"{'matrix':<16}{'update':>8}{'size':>7}{'k':>5}{'ours s':>9}{'dense s':>9}{'ratio':>8}"
        f"{'ours MB':>9}{'dense MB':>9}{'values':>9}{'cosines':>9}  method"
    )
    compared = [row for row in rows if "dense_seconds" in row]
    keys = ("matrix", "rank", "size", "k")
    for case in dict.fromkeys(tuple(row[key] for key in keys) for row in compared):
        own = [row for row in compared if tuple(row[key] for key in keys) == case]
        middle = {key: statistics.median(row[key] for row in own) for key in own[0] if "_" in key}
        ours, dense = middle["ours_seconds"], middle["dense_seconds"]
        update = f"r = {case[1]}" if case[1] else "dense"
        print(
            f"{case[0]:<16}{update:>8}{case[2]:>7.0e}{case[3]:>5}{ours:>9.4f}{dense:>9.3f}"
            f"{dense / ours:>8.1f}{middle['ours_bytes'] / 1e6:>9.0f}"
            f"{middle['dense_bytes'] / 1e6:>9.0f}{max(r['value_error'] for r in own):>9.0e}"
            f"{max(r['cosine_error'] for r in own):>9.0e}  {own[0]['method']}"
        )
    for row in rows:
        if "peft_seconds" in row:
            print(
                f"PEFT's detector, size {row['size']:.0e}: {row['intruders']} intruders,"
                f" ours {row['ours_seconds']:.4f} s, PEFT {row['peft_seconds']:.2f} s"
            )
        if "study" in row:
            print(
                f"{row['study']}, k = {row['k']}, {row['workers']} workers, after the base's SVD:"
                f" LoRA {row['projected_lora_seconds'] / 60:.1f} minutes"
                f" ({row['lora_peak_bytes'] / 1e9:.2f} GB), all"
                f" {row['projected_seconds'] / 60:.1f} ({row['peak_bytes'] / 1e9:.2f} GB)"
            )
    for name, values in ratios.items():
        listed = ", ".join(f"{v:.1f}" for v in values)
        print(f"{name:<10} median {statistics.median(values):.1f}   ({listed})")


@guarded
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.pairs < 3:
        raise UserError("--pairs takes at least 3: a median of fewer says nothing")
    args.preset, args.study = args.preset or "demo", args.study or "benchmark"
    settings = resolve_settings(args)
    import torch

    from lora_tradeoffs.drift.svd import svd
    from lora_tradeoffs.files import write_json
    from lora_tradeoffs.hardware import describe_environment
    from lora_tradeoffs.models.base import prepare_base

    torch.manual_seed(0)
    weights = real_weights(prepare_base(settings).folder)
    values = {m: mean_spectrum(weights, m, min(shape)) for m, shape in SHAPES.items()}
    bases = {m: base_of(values[m], shape) for m, shape in SHAPES.items()}
    against_dense("warm-up", base_of(values["v_proj"][:100], (100, 100)), (1, 0), (4,), 1)
    rows = []
    if args.quick:
        for rank, k in NAMED.values():
            rows += against_dense("q_proj", bases["q_proj"], (rank,), (k,), args.pairs)
    else:
        for module, base in bases.items():
            rows += against_dense(module, base, (*RANKS, 0), KS, args.pairs)
            rows += against_dense(module, base, (8, 64, 0), LARGE_KS, args.pairs)
        for (layer, module), weight in weights.items():
            if layer in REAL_LAYERS:
                name = f"SmolLM2 {layer} {module[0]}"
                rows += against_dense(name, svd(weight), (*RANKS, 0), KS, args.pairs)
    rows += against_peft(bases["q_proj"], args.pairs)
    rows += study_cost(bases, 1, (64,)) if args.quick else study_cost(bases, LAYERS, (64, 256))
    ratios = ratios_of(rows)
    print_table(rows, ratios)
    if args.json:
        meta = describe_environment("cpu", False, "none", 1)
        meta |= {"precision": "fp64", "shapes": SHAPES}
        meta.pop("git_commit")
        write_json(args.json, {"meta": meta, "ratios": ratios, "rows": rows})
        print(f"written: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
