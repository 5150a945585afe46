"""Stores described, checked and merged into one."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_rows import HEAD, RADIUS, SPECS, a_store, flip, read, rows, same

from hpcgen.errors import InputError, StorageError, UsageError
from hpcgen.store.inspect import check, describe
from hpcgen.store.layout import Head, read_manifest, shard_info, write_manifest
from hpcgen.store.merge import merge
from hpcgen.store.rows import Column, ColumnSpec
from hpcgen.store.write import write_store, write_whole_shard

store = a_store


# merging, describing


def test_describe_counts_gaps(store: Path) -> None:
    told = describe(store)
    assert told["crystals"] == 55 and told["splits"] == {"train": 50, "val": 5} and told["edges"] is None
    gaps = read(store).column("formula").missing.sum()
    assert told["columns"]["formula"] == {"kind": "str", "unit": "", "missing": gaps}
    sizes = read(store).sizes().atoms
    assert told["atoms_per_crystal"]["max"] == sizes.max() and told["atoms"] == sizes.sum()
    json.dumps(told)


def test_merge_unites_columns_and_keeps_splits(tmp_path: Path, store: Path) -> None:
    density = Column(ColumnSpec("float", "g/cm³"), np.array([1.0, 2.0]), np.array([False, True]))
    other = dataclasses.replace(rows(2, first=500), columns={"density": density})
    write_store(tmp_path / "b", Head("b", columns={"density": density.spec}), [("train", other)])
    merge([store, tmp_path / "b"], tmp_path / "c", shard_rows=30)
    assert check(tmp_path / "c") == []
    found = read(tmp_path / "c", split="train")
    assert len(found) == 52 and set(found.head.columns) == {*SPECS, "density"}
    assert same(read(tmp_path / "c", columns=list(SPECS), split="val").rows(range(5)), rows(5, 2, first=90))
    assert found.column("density").missing.tolist() == [True] * 50 + [False, True]
    assert found.column("formula").missing[-2:].all()
    assert found[50].columns["density"].values[0] == 1.0
    assert [shard.crystals for shard in found.shards] == [30, 22]


def test_merge_refuses_ids_that_collide_or_prefixes_them(tmp_path: Path, store: Path) -> None:
    write_store(tmp_path / "b", HEAD, [("train", rows(2))])
    with pytest.raises(InputError, match="'mp-0-é' stands in .*store and .*b"):
        merge([store, tmp_path / "b"], tmp_path / "c")
    assert not (tmp_path / "c").exists()
    merge([store, tmp_path / "b"], tmp_path / "c", prefix_ids=True)
    assert {"store/mp-0-é", "b/mp-0-é"} <= set(read(tmp_path / "c").ids)


def test_merge_wants_the_same_edges_or_none(tmp_path: Path, store: Path) -> None:
    with_edges = dataclasses.replace(HEAD, edges=RADIUS)
    for k in (1, 2):
        write_store(tmp_path / f"e{k}", with_edges, [("all", rows(3, first=100 * k, edges=True))])
    with pytest.raises(InputError, match="keep different edges"):
        merge([store, tmp_path / "e1"], tmp_path / "c")
    merge([store, tmp_path / "e1"], tmp_path / "c", drop_edges=True)
    merge([tmp_path / "e1", tmp_path / "e2"], tmp_path / "d")
    assert same(read(tmp_path / "d", edges=True).rows([3, 4, 5]), rows(3, first=200, edges=True))


def test_merge_is_whole_or_absent(tmp_path: Path, store: Path) -> None:
    write_store(tmp_path / "b", HEAD, [("train", rows(50, first=500))])
    flip(tmp_path / "b" / "train-00000.h5")
    with pytest.raises(InputError, match="damaged"):
        merge([store, tmp_path / "b"], tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "store"]
    with pytest.raises(UsageError, match="exists already"):
        merge([store], tmp_path / "b")
    gap = {"band_gap": ColumnSpec("float", "J")}
    write_store(tmp_path / "j", Head("j", columns=gap), [("all", dataclasses.replace(rows(1), columns={}))])
    with pytest.raises(InputError, match="column band_gap is in .*store float 'eV', here float 'J'"):
        merge([store, tmp_path / "j"], tmp_path / "c")


def test_looking_at_a_store_imports_no_torch(store: Path) -> None:
    code = f"""
import sys; from pathlib import Path; from hpcgen.store.inspect import check, describe
describe(Path({str(store)!r})); check(Path({str(store)!r})); assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ids_that_stand_in_two_shards_are_a_fault(tmp_path: Path, store: Path) -> None:
    (tmp_path / "b").mkdir()
    shards = [write_whole_shard(tmp_path / "b", rows(3), HEAD, split="all", number=k) for k in range(2)]
    write_manifest(tmp_path / "b", HEAD, shards)
    (fault,) = check(tmp_path / "b")
    assert "id 'mp-0-é' stands in all-00000.h5 and all-00001.h5 (3 ids stand twice" in fault
    with pytest.raises(InputError, match=r"b: id 'mp-0-é' stands in all-00000.h5 and all-00001.h5 .*store check"):
        merge([tmp_path / "b", store], tmp_path / "c")


def test_advice_names_the_flags(tmp_path: Path, store: Path) -> None:
    write_store(tmp_path / "e", dataclasses.replace(HEAD, edges=RADIUS), [("all", rows(3, first=100, edges=True))])
    with pytest.raises(InputError, match="or --drop-edges"):
        merge([store, tmp_path / "e"], tmp_path / "c")
    write_store(tmp_path / "b", HEAD, [("train", rows(2))])
    with pytest.raises(InputError, match="or --prefix-ids"):
        merge([store, tmp_path / "b"], tmp_path / "c")
    with pytest.raises(UsageError, match="no stores to merge"):
        merge([], tmp_path / "c")


def _merging(out: Path, *sources: Path) -> "subprocess.Popen[str]":
    """A merge that takes for ever over its first shard."""
    code = f"""
import sys, time; from hpcgen import cli; from hpcgen.store import merge
def slow(*_, **how):
    print("at work", flush=True); time.sleep(0.2); return copy(*_, **how)
copy, merge.load = merge.load, slow; merge.STEP = 1
sys.exit(cli.main(["store", "merge", *{[str(source) for source in sources]!r}, "--out", {str(out)!r}]))
"""
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "at work\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_merge_that_is_stopped_leaves_nothing(tmp_path: Path, store: Path, number: int) -> None:
    merging = _merging(tmp_path / "c", store)
    merging.send_signal(number)
    _, told = merging.communicate(timeout=60)
    assert merging.returncode == 75 and "stopped early" in told
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_what_a_killed_merge_left_is_cleared_by_the_next(tmp_path: Path, store: Path) -> None:
    merging = _merging(tmp_path / "c", store)
    merging.kill()
    merging.communicate(timeout=60)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.merge.draft", "store"]
    merge([store], tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "store"]
    assert len(read(tmp_path / "c")) == 55 and check(tmp_path / "c") == []


@pytest.mark.slow
def test_of_two_merges_to_one_place_one_gives_way(tmp_path: Path, store: Path) -> None:
    merging = _merging(tmp_path / "c", store)
    with pytest.raises(StorageError, match="belongs to another run"):
        merge([store], tmp_path / "c")
    assert merging.poll() is None
    merging.communicate(timeout=60)
    assert merging.returncode == 0 and check(tmp_path / "c") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "store"]


def _rewritten(store: Path, change: Callable[[h5py.File], None]) -> list[str]:
    """What check says of a store whose first shard was changed and is listed so."""
    file = store / "all-00000.h5"
    with h5py.File(file, "r+") as shard:
        change(shard)
    manifest = read_manifest(store)
    write_manifest(store, manifest.head, [shard_info(file), *manifest.shards[1:]])
    return check(store)


def _replace(name: str, made: Callable[[np.ndarray], np.ndarray]) -> Callable[[h5py.File], None]:
    def change(shard: h5py.File) -> None:
        values = made(shard[name][...])
        del shard[name]
        shard[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replace("lattice", lambda lattice: lattice * [[[1], [1], [0]]]), "mp-0-é: a cell without volume"),
        (_replace("missing/stable", lambda missing: missing[:-1]), r"missing/stable has shape \(2,\), want \(3,\)"),
        (_replace("edges/image", lambda image: image[:, :2]), r"edges/image has shape \(\d+, 2\), want \(\d+, 3\)"),
        (_replace("edges/degree", lambda degree: degree[:-1]), "edges/degree has shape"),
        (_replace("edges/neighbour", lambda n: n.astype(np.int32) - 1), "beyond its crystal"),
    ],
)
def test_check_looks_at_every_array(tmp_path: Path, change: Callable[[h5py.File], None], message: str) -> None:
    head = dataclasses.replace(HEAD, edges=RADIUS)
    write_store(tmp_path / "e", head, [("all", rows(3, edges=True))])
    assert _rewritten(tmp_path / "e", lambda shard: None) == []
    (fault,) = _rewritten(tmp_path / "e", change)
    assert re.search(message, fault), fault
