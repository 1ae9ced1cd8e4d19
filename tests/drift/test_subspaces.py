"""Pairs of runs: phi is that of two loops over all pairs, and what is computed is kept."""

import json
import zlib
from itertools import combinations, product

import pytest
from reference import random_similarity, subspace_similarities
from safetensors.torch import save_file
from synthetic_spectra import orthonormal

from config import UserError
from lora_tradeoffs.drift.subspaces import records_between
from lora_tradeoffs.drift.svd import digest

# Rank, modules and family: dense runs (0) of many directions, one from elsewhere of no family.
RUNS = {
    "a_r4": (4, ("q_proj", "v_proj"), "similar"),
    "b_r8": (8, ("q_proj", "v_proj", "up_proj"), "similar"),
    "c_full": (0, ("q_proj", "v_proj"), "similar"),
    "d_full": (0, ("q_proj",), "dissimilar"),
    "e_r2": (2, ("v_proj", "up_proj"), "dissimilar"),
    "f": (6, ("q_proj", "v_proj"), ""),
}
LAYERS = 3
NAME = "model.layers.{}.self_attn.{}"


def write_directions(folder, run, step=20, seed=0, base="made-up", widths=(24, 40)):
    """A run's file in directions/, the right side wider than the left; its vectors by name."""
    rank, modules, family = RUNS[run]
    method = "full" if rank == 0 else "lora"
    vectors = {
        f"{NAME.format(layer, module)}.{side}": orthonormal(
            d, rank or 12, seed=zlib.crc32(repr((layer, module, side, seed, run)).encode()) % 10_000
        )
        .float()
        .contiguous()
        for layer, module in product(range(LAYERS), modules)
        for side, d in zip(("left", "right"), widths, strict=True)
    }
    fields = {"run": run, "step": step, "family": family, "method": method, "rank": rank}
    fields["base_model"] = base
    (folder / "directions").mkdir(exist_ok=True)
    path = folder / "directions" / f"{run}-{step}.safetensors"
    save_directions(path, vectors, {**fields, "tasks": family, "variant": ""})
    return vectors


def save_directions(path, vectors, fields):
    update = "dense" if fields["method"] == "full" else "low rank"
    metadata = {"fields": json.dumps(fields), "update": update}
    save_file(vectors, path, metadata | {"content": digest(list(vectors.values()))})


def expected_between(vectors):
    """phi, random, i, j and n by pair, module, side and kind."""
    values = {}
    for (run, first), (other, second) in combinations(sorted(vectors.items()), 2):
        for name in [name for name in first if name in second]:
            module, side = name.split(".")[-2:]
            phi = subspace_similarities(first[name], second[name])
            i, j = phi.shape
            sizes = (i, j)
            if (RUNS[run][0] == 0) != (RUNS[other][0] == 0):
                sizes = (i, min(i, j)) if RUNS[run][0] else (min(i, j), j)
            leading = (min(i, j, 4),) * 2
            for kind, (a, b) in {"all": sizes, "leading": leading}.items():
                row = float(phi[a - 1, b - 1]), random_similarity(a, b, len(first[name])), a, b
                for key in {module, "both" if module != "up_proj" else module}:
                    values.setdefault((run, other, key, side, kind), []).append(row)
    both = {"q_proj", "v_proj"}
    return {
        key: [sum(column) / len(rows) for column in zip(*rows)] + [len(rows)]
        for key, rows in values.items()
        if key[2] != "both" or all(both <= set(RUNS[run][1]) for run in key[:2])
    }


def found_between(folder, **options):
    records = list(records_between(folder, **options))
    keys = ("run", "other", "module", "side", "directions")
    figures = ("value", "random", "k", "other_k", "n")
    found = {tuple(r[k] for k in keys): [r[f] for f in figures] for r in records}
    assert len(found) == len(records)
    return found


def is_related(key):
    families = {RUNS[run][2] for run in key[:2]} - {""}
    return len(families) < 2


def test_pairs_have_the_similarity_of_two_loops(tmp_path):
    vectors = {run: write_directions(tmp_path, run) for run in RUNS}
    expected = expected_between(vectors)
    found = found_between(tmp_path, all_pairs=True)
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, abs=1e-12), key
    within = found_between(tmp_path)
    assert within == {key: values for key, values in found.items() if is_related(key)}
    assert 0 < len(within) < len(found)


def test_a_pair_is_computed_once_and_again_when_a_side_has_changed(tmp_path):
    vectors = {run: write_directions(tmp_path, run) for run in RUNS if run != "b_r8"}
    first = found_between(tmp_path)
    kept = sorted((tmp_path / "between" / "records").glob("*.json"))
    for path in kept:  # a mark that only what is kept has
        unit = json.loads(path.read_text())
        unit["records"] = [{**record, "value": -1.0} for record in unit["records"]]
        path.write_text(json.dumps(unit))
    assert {values[0] for values in found_between(tmp_path).values()} == {-1.0}
    vectors["b_r8"] = write_directions(tmp_path, "b_r8")  # a new run
    vectors["c_full"] = write_directions(tmp_path, "c_full", seed=1)  # the same, trained anew
    (tmp_path / "directions" / "d_full-20.safetensors").unlink()
    del vectors["d_full"]
    second = found_between(tmp_path)
    expected = {k: v for k, v in expected_between(vectors).items() if is_related(k)}
    assert second.keys() == expected.keys()
    for key, values in second.items():
        if {"b_r8", "c_full"} & set(key[:2]):
            assert values == pytest.approx(expected[key], abs=1e-12)
        else:
            assert values == [-1.0, *first[key][1:]]
    write_directions(tmp_path, "f", step=40, seed=2)  # the last checkpoint is another one
    third = found_between(tmp_path)
    assert {key for key in third if third[key][0] == -1.0} == {
        key for key in second if second[key][0] == -1.0 and "f" not in key[:2]
    }


def test_runs_of_different_bases_are_not_compared(tmp_path):
    for run in RUNS:
        of_other = {"base": "wider", "widths": (48, 80)} if run in ("c_full", "f") else {}
        write_directions(tmp_path, run, **of_other)
    pairs = {(r["run"], r["other"]) for r in records_between(tmp_path, all_pairs=True)}
    of_one = {*combinations(("a_r4", "b_r8", "d_full", "e_r2"), 2)} - {("d_full", "e_r2")}
    assert pairs == {("c_full", "f"), *of_one}  # the two that are left out share no module


def test_runs_without_a_direction_have_no_pairs(tmp_path):
    (tmp_path / "directions").mkdir()
    assert found_between(tmp_path) == {}
    write_directions(tmp_path, "a_r4")
    fields = {"run": "z", "step": 20, "family": "similar", "method": "lora", "variant": ""}
    path = tmp_path / "directions" / "z-20.safetensors"
    save_directions(path, {}, fields)
    assert found_between(tmp_path) == {}


@pytest.mark.parametrize("metadata", [None, {"fields": "{}"}, {"fields": "{"}])
def test_a_file_that_does_not_say_what_it_holds_is_named(tmp_path, metadata):
    write_directions(tmp_path, "a_r4")
    path = tmp_path / "directions" / "z-20.safetensors"
    save_file({}, path, metadata)
    with pytest.raises(UserError, match=r"z-20\.safetensors is damaged: .*; delete it"):
        found_between(tmp_path)
