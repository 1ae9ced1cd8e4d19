"""How long svd_analysis.py takes for a study of Llama-3.2-1B's shape, on made-up checkpoints.

Used by spectral_speed.py. A base of 16 layers of q_proj and v_proj, LoRA checkpoints of every rank
and a fully fine-tuned one are written as safetensors, then analysed by the command's functions with
two workers: manifest, reading, all measures, writing. The study has 100 LoRA checkpoints (20 of
each rank, each measured as the last of its run) and 20 of full fine-tuning, 2 of them the last. If
fewer layers are made, the time of the others is projected from theirs, and so is the time for the
other tensors of a full checkpoint.
"""

from __future__ import annotations

import json
import time
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SHAPES = {"q_proj": (2048, 2048), "v_proj": (512, 2048)}
RANKS, SIZES = (4, 8, 16, 32, 64), (1e-2, 1e-1)
LAYERS, WORKERS = 16, 2
LORA_A_RANK, FULL, LAST = 20, 20, 2  # checkpoints of the study
PARAMETERS = 1_235_814_400  # of Llama-3.2-1B
TOP_K = (4, 8, 10, 16, 32, 64, 128, 256)


def base_of(values: Any, shape: tuple[int, int]) -> Any:
    """A base with these singular values and random vectors."""
    import torch

    from lora_tradeoffs.drift.svd import SVD

    m, n = shape
    left, right = (
        torch.linalg.qr(torch.randn(size, len(values), dtype=torch.double))[0] for size in (m, n)
    )
    return SVD(left, values, right.T.contiguous())


def update_of(shape: tuple[int, int], rank: int, norm: float) -> tuple[Any, ...]:
    """A, B and B A, or for rank 0 only a dense update, with that Frobenius norm."""
    import torch

    m, n = shape
    if not rank:
        update = torch.randn(m, n, dtype=torch.double)
        return (update * (norm / update.norm()),)
    A = torch.randn(rank, n, dtype=torch.double)
    B = torch.randn(m, rank, dtype=torch.double)
    B *= norm / (B @ A).norm()
    return A, B, B @ A


def write_study(folder: Path, bases: dict[str, Any], layers: int) -> None:
    """Write `base/`, `lora_r<rank>_<size>/` and `full_<size>/`; layers differ in their vectors."""
    import torch

    weights = {}
    for module, base in bases.items():
        weight = base.U * base.S @ base.Vh
        for layer in range(layers):
            signs = torch.randn(len(weight), 1, dtype=torch.double).sign()
            weights[_name(layer, module)] = (signs * weight).float()
    _save(folder / "base", "model", {f"{name}.weight": w for name, w in weights.items()})
    for size in SIZES:
        tuned = {
            f"{name}.weight": w + update_of(w.shape, 0, size * float(w.norm()))[0].float()
            for name, w in weights.items()
        }
        _save(folder / f"full_{size:g}", "model", tuned)
        for rank in RANKS:
            factors = {}
            for name, weight in weights.items():
                A, B, _ = update_of(weight.shape, rank, size * float(weight.norm()))
                prefix = f"base_model.model.{name}.lora_"
                factors |= {f"{prefix}A.weight": A.float(), f"{prefix}B.weight": B.float()}
            config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
            config["target_modules"] = list(SHAPES)
            _save(folder / f"lora_r{rank}_{size:g}", "adapter_model", factors, config)


def _name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.self_attn.{module}"


def _save(folder: Path, name: str, tensors: dict[str, Any], config: dict | None = None) -> None:
    from safetensors.torch import save_file

    from lora_tradeoffs.checkpoints import write_manifest

    folder.mkdir()
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    write_manifest(folder)


class _Analysis:
    """The command's analysis of that folder, timed."""

    def __init__(self, folder: Path, k: int, pool: Any) -> None:
        from config import resolve_settings
        from lora_tradeoffs.drift.analysis import DriftAnalysis, DriftOptions
        from lora_tradeoffs.models.base import Base

        self.folder, self.pool = folder, pool
        base = Base("made-up", folder / "base", folder, {"digest": ""})
        settings = resolve_settings(Namespace(preset="demo", study=f"benchmark-{k}"))
        settings = replace(settings, output_dir=folder / "results")
        options = DriftOptions(tuple(each for each in TOP_K if each <= k), workers=WORKERS)
        self.drift = DriftAnalysis(settings, base, options)

    def decompose(self, matrix: Any) -> None:
        """Decompose a matrix of the base."""
        self.drift.spectra.svd(matrix)

    def seconds(self, run: str, is_last: bool) -> float:
        """Seconds of one checkpoint, from its manifest to its records."""
        from checkpoint_utils import Checkpoint, checkpoint_weights
        from lora_tradeoffs.drift.analysis import DriftUnit
        from lora_tradeoffs.measuring.subjects import Subject, no_arm

        fields = {"base_model": "made-up", "study": "benchmark", **no_arm(run.split("_")[0])}
        checkpoint = Checkpoint(run, 0, self.folder / run)
        unit = DriftUnit(Subject(run, 0, checkpoint, fields, None, is_last, False))
        start = time.perf_counter()
        _, (_, weights) = checkpoint_weights(self.drift.base, [checkpoint])
        self.drift.write(unit, self.drift.measure(weights, unit))
        return time.perf_counter() - start

    def reading(self, run: str) -> float:
        """Seconds of verifying a full checkpoint and of the norms of all its tensors."""
        from lora_tradeoffs.checkpoints import Checkpoint, check_whole
        from lora_tradeoffs.models.weights import FullCheckpoint

        start = time.perf_counter()
        check_whole(Checkpoint(run, 0, self.folder / run), (".safetensors",))
        full = FullCheckpoint(self.folder / run, self.drift.weights)
        list(self.pool.map(full.squares, full.tensors))
        return time.perf_counter() - start


def analyse_study(folder: Path, k: int, layers: int) -> dict[str, Any]:
    """Seconds of every kind of checkpoint (the slower update size) and of the whole study."""
    from lora_tradeoffs.drift.analysis import worker_threads
    from lora_tradeoffs.hardware import peak_memory

    with worker_threads(WORKERS) as pool:
        analysis = _Analysis(folder, k, pool)
        start = time.perf_counter()
        list(pool.map(analysis.decompose, analysis.drift.weights.matrices()))
        base = time.perf_counter() - start
        analysis.seconds(f"lora_r{RANKS[0]}_{SIZES[0]:g}", False)  # imports, and the base's norms
        lora = {
            rank: max(analysis.seconds(f"lora_r{rank}_{size:g}", True) for size in SIZES)
            for rank in RANKS
        }
        lora_peak = peak_memory("cpu")
        runs = [f"full_{size:g}" for size in SIZES]
        full, last = (max(analysis.seconds(run, end) for run in runs) for end in (False, True))
        reading = max(map(analysis.reading, runs))
    known = layers * sum(m * n for m, n in SHAPES.values())
    whole = LAYERS / layers
    others = (PARAMETERS / known - whole) * reading
    lora_study = whole * LORA_A_RANK * sum(lora.values())
    full_study = (FULL - LAST) * (whole * full + others) + LAST * (whole * last + others)
    return {
        "k": k,
        "layers_measured": layers,
        "workers": WORKERS,
        "base_seconds": base,
        "lora_seconds": {str(rank): seconds for rank, seconds in lora.items()},
        "full_seconds": full,
        "full_last_seconds": last,
        "full_reading_seconds": reading,
        "projected_lora_seconds": lora_study,
        "projected_seconds": lora_study + full_study,
        "lora_peak_bytes": lora_peak,
        "peak_bytes": peak_memory("cpu"),
    }


def study_cost(bases: dict[str, Any], layers: int, ks: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row per k, each measured in a process of its own; the first decomposes the base."""
    name = f"{LORA_A_RANK * len(RANKS)} LoRA and {FULL} full checkpoints, {2 * LAYERS} matrices"
    rows = []
    with TemporaryDirectory() as folder:
        write_study(Path(folder), bases, layers)
        for k in ks:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(analyse_study, Path(folder), k, layers).result()
            rows.append({"study": name, **row})
    return rows
