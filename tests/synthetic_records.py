"""Made-up adaptation.json and retention.json, for the tests of figures and notebook.

Their numbers mean nothing.
"""

from __future__ import annotations

import json
import math
import random

from config import DOCUMENTS, FAMILIES
from dataset_descriptions import DESCRIPTIONS
from training_configs import rate_name

BASELINES = {
    **dict.fromkeys(("sst2", "mnli", "qqp"), ("majority class", 0.5)),
    "squad_v2": ("always abstain", 0.5),
    "codexglue": ("nearest code", 12.0),
    "cnn_dailymail": ("lead-3", 0.24),
}
LEVELS = {
    "sst2": (0.62, 0.92),
    "mnli": (0.36, 0.78),
    "qqp": (0.55, 0.84),
    "squad_v2": (0.31, 0.68),
    "codexglue": (6.0, 21.0),
    "cnn_dailymail": (0.14, 0.23),
}
# What the base knows of each benchmark, and what guessing does.
KNOWN = {"hellaswag": (0.63, 0.25), "arc_challenge": (0.36, 0.25), "winogrande": (0.61, 0.5)}
SCALES = (0.0, 0.25, 0.5, 0.75, 1.25)
GRID = (*(("lora", rank) for rank in (4, 8, 16, 32, 64)), ("full_qv", 0), ("full", 0))


def record(run, task, value, method="lora", rank=8, seed=42, step=100, fraction=1.0, **others):
    """One flat record; the interval is value ± 0.02 and more, uneven on purpose."""
    family = next(name for name, tasks in FAMILIES.items() if task in tasks)
    scale = 100 if DESCRIPTIONS[task].metrics[0] == "codexglue_bleu" else 1
    return {
        "study": "demo",
        "base_model": "made-up",
        "run": run,
        "family": family,
        "method": method,
        "rank": rank if method == "lora" else 0,
        "alpha": 2 * rank if method == "lora" else 0,
        "scaling": "2r",
        "target_modules": "qv",
        "learning_rate": 1e-4,
        "seed": seed,
        "step": step,
        "fraction": fraction,
        "split": "validation",
        "task": task,
        "metric": DESCRIPTIONS[task].metrics[0],
        "value": value,
        "stderr": 0.012 * scale,
        "low": value - 0.02 * scale,
        "high": value + 0.025 * scale,
        "n": 200,
        "shots": 0,
        "prompt": 0,
    } | others


def study(seeds=(42,), grid=GRID, points=5, families=tuple(FAMILIES)):
    """Base, baselines and a whole grid; the secondary metrics too."""
    noise = random.Random(0)
    records = []
    for family in families:
        for task in FAMILIES[family]:
            start, end = LEVELS[task]
            name, level = BASELINES[task]
            for split in ("validation", "test"):
                base = dict(method="base", step=0, fraction=0, split=split)
                records.append(record("base", task, start, **base))
                records.append(record("base", task, start * 1.1, **base, shots=4))
                records.append(record(name, task, level, **base | {"method": "baseline"}))
            for method, rank in grid:
                for seed in seeds:
                    arm = f"lora_r{rank}" if method == "lora" else method
                    best = end - (end - start) * (0.25 / math.sqrt(rank) if rank else 0.02)
                    shift = noise.gauss(0, 0.02) * end
                    for i in range(1, points + 1):
                        value = best - (best - start) * math.exp(-4 * i / points) + shift
                        value += noise.gauss(0, 0.008) * end
                        common = dict(method=method, rank=rank, seed=seed, step=20 * i)
                        common |= dict(fraction=i / points)
                        run = f"{family}_{arm}_seed{seed}"
                        records.append(record(run, task, value, **common))
                        other = DESCRIPTIONS[task].metrics[1]
                        records.append(record(run, task, value * 0.9, **common, metric=other))
                        if i == points:
                            lower = value - abs(noise.gauss(0, 0.02)) * end
                            records.append(record(run, task, lower, **common, split="test"))
    return records


def kept(run, task, metric, value, family="similar", half=0.02, **others):
    """One flat record of retention, as of an arm's last checkpoint; its interval is uneven."""
    own = record(run, "sst2", value, **others) | {"family": family, "task": task, "metric": metric}
    own |= {"stderr": half / 2, "low": value - half, "high": value + 1.25 * half}
    over = {"over": ",".join(KNOWN)} if task == "mean" else {}
    return own | {"update_scale": 1.0} | over | others


def shrunk_study(effect, seeds=(42, 43, 44), directions=9):
    """What is lost where intruders are shrunk: `effect` more than with the control, by task."""
    kinds = ("intruders", "control"), ("intruders", "checkpoint"), ("control", "checkpoint")
    pairs = dict(zip(kinds, (1, 2, 1)))
    for i, seed in enumerate(seeds):
        run = f"similar_lora_r8_seed{seed}"
        for factor in (0.0, 0.5):
            own = {"seed": seed, "shrink": factor}
            about = own | {"shrunk": "intruders", "directions": directions}
            yield kept(run, "intruders", "intruders", 3.0, **about)
            for (kind, against), share in pairs.items():
                for task, lost in effect.items():
                    value = (1 - factor) * (share * lost + 1e-4 * i)
                    about = own | {"shrunk": kind, "against": against, "half": 1e-3}
                    yield kept(run, task, "shrink_effect", value, **about)


def retention_study(
    seeds=(42,), grid=GRID, points=5, families=tuple(FAMILIES), scales=SCALES, half=0.02
):
    """The base and a whole grid: benchmarks, text, forgetting, CKA, scaled updates."""
    noise = random.Random(1)
    base = dict(method="base", step=0, fraction=0.0, half=half)
    records = []
    for task, (level, chance) in KNOWN.items():
        weak = {"chance": chance, "at_chance": task == "arc_challenge"}
        acc = level if task == "winogrande" else 0.9 * level
        records.append(kept("base", task, "acc", acc, None, **base | weak))
        if task != "winogrande":
            records.append(kept("base", task, "acc_norm", level, None, **base | weak))
    records.append(kept("base", "mean", "retention", 0.53, None, **base))
    for source, level in (("text_prose", -2.9), ("text_wikitext", -2.6)):
        records.append(kept("base", source, "log_likelihood", level, None, **base))
    for family in families:
        records.append(kept("base", "mean", "adaptation", 0.45, family, **base))
        for method, rank in grid:
            power = math.log2(rank) / 6 if rank else {"full_qv": 0.9, "full": 1.15}[method]
            arm = f"lora_r{rank}" if method == "lora" else method
            for seed in seeds:
                run = f"{family}_{arm}_seed{seed}"
                own = dict(method=method, rank=rank, seed=seed, family=family, half=half)
                gain = (0.24 if family == "similar" else 0.17) * power**0.3 + noise.gauss(0, 0.008)
                lost = (0.02 if family == "similar" else 0.05) * power**1.6 + noise.gauss(0, 0.006)
                for i in range(1, points + 1):
                    common = own | dict(step=20 * i, fraction=i / points)
                    way = 1 - math.exp(-4 * i / points)
                    records += _point(run, way * gain, way**2 * lost, noise, common)
                for t in scales:
                    common |= {"update_scale": t}
                    records += _point(run, gain * t * (2.1 - t) / 1.1, lost * t**2, noise, common)
                common |= {"update_scale": 1.0}
                for layer in range(16):
                    drift = 1 - lost * (1 + layer) / 4
                    records.append(kept(run, "text", "cka", drift, **common | {"layer": layer}))
                if method != "full":
                    fields = {"other_run": f"{family}_full_seed{seed}", "score": 0.6}
                    fields |= {"p_value": 0.2}
                    value = lost / 2 - 0.02 + noise.gauss(0, 0.005)
                    records.append(
                        kept(run, "mean", "matched_forgetting", value, **common | fields)
                    )
    return records


def _point(run, gain, lost, noise, common):
    """A checkpoint, or its update scaled: what was gained, kept and forgotten."""
    jitter = 0 if common.get("update_scale") == 0 else 0.15 * common["half"]
    found = []
    for task, (level, _) in KNOWN.items():
        own = lost + noise.gauss(0, jitter)
        metric = "acc" if task == "winogrande" else "acc_norm"
        found.append(kept(run, task, metric, level - own, **common))
        if metric != "acc":
            found.append(kept(run, task, "acc", 0.9 * level - own, **common))
        found.append(kept(run, task, "forgetting", own, **common | {"p_value": 0.03}))
    own = lost + noise.gauss(0, jitter / 2)
    found.append(kept(run, "mean", "retention", 0.53 - own, **common))
    found.append(kept(run, "mean", "forgetting", own, **common | {"p_value": 0.03}))
    for source, level in (("text_prose", -2.9), ("text_wikitext", -2.6)):
        found.append(kept(run, source, "log_likelihood", level - 4 * lost, **common))
        found.append(kept(run, source, "forgetting", 4 * lost, **common))
    value = 0.45 + gain + noise.gauss(0, jitter / 3)
    found.append(kept(run, "mean", "adaptation", value, **common | {"half": 0.7 * common["half"]}))
    return found


def rate_points(points, family="similar", seeds=(42,), error=0.01, default=1e-3):
    """Records of adaptation, of retention and of drift of a sweep's points.

    `points` is {(method, rank): {rate: (score, forgetting)}}; every task has the score at the last
    checkpoint (one part in a thousand more a seed), and drift is a hundred times the rate.
    """
    base = dict(method="base", step=0, fraction=0.0, learning_rate=0.0)
    adaptation = [record("base", task, 0.5, **base) for task in FAMILIES[family]]
    retention = [kept("base", "mean", "retention", 0.53, None, **base)]
    drift = []
    for (method, rank), rates in points.items():
        arm = f"lora_r{rank}" if method == "lora" else method
        for rate, (score, lost) in rates.items():
            name = "" if rate == default else f"_{rate_name(rate)}"
            for i, seed in enumerate(seeds):
                run = f"{family}_{arm}{name}_seed{seed}"
                own = dict(method=method, rank=rank, seed=seed, learning_rate=rate)
                value = score * (1 + i / 1000)
                for task in FAMILIES[family]:
                    scaled = 100 * value if task == "codexglue" else value
                    found = record(run, task, scaled, **own)
                    found["stderr"] = error * math.sqrt(3) * (100 if task == "codexglue" else 1)
                    adaptation.append(found)
                half = 2 * error
                metric = "forgetting"
                retention.append(kept(run, "mean", metric, lost, family, half=half, **own))
                for layer in (-1, 0):
                    size = kept(run, "", "relative_frobenius", 100 * rate, family, **own)
                    size |= {"module": "both", "layer": layer, "k": None, "eps": None, "side": ""}
                    drift += [size, size | {"module": "q_proj"}, size | {"module": "v_proj"}]
    return adaptation, retention, drift


def write_study(folder, records, preset="demo", study="demo", script="adaptation"):
    """A document of DOCUMENTS below the folder."""
    path = folder / DOCUMENTS[script].format(study=study)
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"study": study, "base_model": "made-up", "preset": preset, "created": "2026-01-01"}
    path.write_text(json.dumps({"meta": meta, "records": records}), encoding="utf-8")
    return path
