"""Stores that are damaged, disks that fail, and processes that share a store."""

import dataclasses
import errno
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from store_rows import HEAD, RADIUS, a_store, everything, flip, read, rows, same

from hpcgen.errors import InputError, SiteError, StorageError, UsageError
from hpcgen.runner.blocks import Block
from hpcgen.store.build import Later
from hpcgen.store.inspect import check
from hpcgen.store.layout import read_manifest, shard_info, write_manifest
from hpcgen.store.read import Store
from hpcgen.store.staging import read_staged, write_staged
from hpcgen.store.write import StoreWriter, write_store, write_whole_shard

store = a_store


# broken stores


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-700])


def _other_version(file: Path) -> None:
    with h5py.File(file, "r+") as shard:
        shard.attrs.modify("format_version", np.int64(99))


BROKEN = {
    "truncated": (_truncate, r"train-00001.h5: the shard has \d+ bytes, the manifest lists \d+"),
    "flipped": (flip, "train-00001.h5: the shard is damaged"),
    "missing": (Path.unlink, "train-00001.h5: the shard is missing"),
    "no-hdf5": (
        lambda file: file.write_bytes(b"x" * file.stat().st_size),
        "train-00001.h5: the shard is damaged",
    ),
    "version": (_other_version, "train-00001.h5: format version 99 is newer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_shard_is_named_or_skipped(store: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    damage, message = BROKEN[name]
    damage(store / "train-00001.h5")
    some = read(store)
    assert some[0].ids == ["mp-0-é"]  # the others can still be read
    with pytest.raises(InputError, match=message):
        some[25]
    with pytest.raises(InputError, match=message):
        list(some.iter_rows())
    with caplog.at_level(logging.WARNING):
        rest = read(store, on_bad="skip")
    assert len(rest) == 35 and len(rest.rows(range(35))) == 35
    (warning,) = caplog.records
    assert "train-00001.h5" in warning.getMessage() and "1 bad shards with 20 crystals" in warning.getMessage()
    (fault,) = check(store)
    assert "train-00001.h5" in fault


def test_anyflipped_bit_is_noticed(tmp_path: Path) -> None:
    """Not only on the hash: on every read. Bits of unused bytes change nothing."""
    write_store(tmp_path, dataclasses.replace(HEAD, edges=RADIUS), [("all", rows(60, edges=True))])
    file = tmp_path / "all-00000.h5"
    good, wanted, chance = (
        file.read_bytes(),
        read(tmp_path, edges=True).rows(range(60)),
        np.random.default_rng(0),
    )
    noticed = 0
    for at in chance.integers(0, len(good), 60):
        data = bytearray(good)
        data[at] ^= 1 << chance.integers(0, 8)
        file.write_bytes(data)
        try:
            assert same(read(tmp_path, edges=True).rows(range(60)), wanted)
        except InputError:
            noticed += 1
    assert noticed > 40


def test_a_shard_of_other_settings_is_refused(store: Path) -> None:
    other = dataclasses.replace(HEAD, settings={"symprec": 0.2})
    shards = list(read_manifest(store).shards)
    shards[1] = write_whole_shard(store, rows(20), other, split="train", number=1)
    write_manifest(store, HEAD, shards)
    with pytest.raises(InputError, match="train-00001.h5: the shard was made with settings"):
        read(store)[25]


def test_folders_that_are_no_store(tmp_path: Path, store: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no folder"):
        Store(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no manifest.json"):
        Store(tmp_path)
    told = json.loads((store / "manifest.json").read_text())
    for change, message in (
        ({"format_version": 2}, "format version 2 is newer than this hpcgen reads"),
        ({"format": "zip"}, "format is 'zip'"),
        ({"columns": None}, "not a manifest"),
        ({"shards": []}, "holds no crystals"),
    ):
        (store / "manifest.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(InputError, match=message):
            Store(store)
    (store / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        Store(store)


def test_a_shard_listed_twice_is_refused(store: Path) -> None:
    shards = read_manifest(store).shards
    with pytest.raises(UsageError, match="train-00000.h5 is listed 2 times"):
        write_manifest(store, HEAD, [*shards, shards[0]])


# disks


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    return _mount(tmp_path / "tiny", "size=64k")


def _mount(folder: Path, options: str) -> Path:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    return folder


def test_a_full_disk_harms_nothing_written(tiny_disk: Path) -> None:
    try:
        first = write_whole_shard(tiny_disk, rows(100), HEAD, split="all", number=0)
        with pytest.raises(StorageError, match="all-00001.h5.*No space left"):
            write_whole_shard(tiny_disk, rows(2000), HEAD, split="all", number=1)
        assert [file.name for file in tiny_disk.iterdir()] == ["all-00000.h5"]
        assert shard_info(tiny_disk / "all-00000.h5") == first
        write_manifest(tiny_disk, HEAD, [first])
        assert check(tiny_disk) == []
    finally:
        subprocess.run(["umount", str(tiny_disk)], check=True)


def test_a_read_only_folder_is_a_storage_error_and_can_be_read(tmp_path: Path, store: Path) -> None:
    folder = _mount(tmp_path / "frozen", "size=1m")
    try:
        for file in store.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert same(everything(folder), everything(store))
        with pytest.raises(StorageError, match="Read-only"):
            write_whole_shard(folder, rows(1), HEAD, split="all", number=7)
        with pytest.raises(StorageError):
            write_store(folder / "sub", HEAD, [("all", rows(1))])
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_failing_write_leaves_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(StorageError, match="quota"):
        write_whole_shard(tmp_path, rows(1), HEAD, split="all", number=0)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_interrupted_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path, HEAD, shard_rows=2) as writer:
        writer.add("all", rows(3))
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["all-00000.h5"]


# processes


def test_a_store_travels_by_pickle_without_its_cache(store: Path) -> None:
    some = read(store)
    some.rows(range(55))
    packed = pickle.dumps(some)
    assert len(packed) < 5000
    assert same(pickle.loads(packed)[40], some[40])


def _ids_in_a_child(some: Store, answer: "multiprocessing.Queue[list[str]]") -> None:
    answer.put([some[k].ids[0] for k in range(len(some))])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_store_that_is_in_use_goes_into_children(store: Path, start: str) -> None:
    some, context = read(store), multiprocessing.get_context(start)
    wanted = [some[k].ids[0] for k in range(len(some))]
    answer = context.Queue()
    children = [context.Process(target=_ids_in_a_child, args=(some, answer)) for _ in range(2)]
    for child in children:
        child.start()
    assert [answer.get(timeout=60) for _ in children] == [wanted] * 2
    for child in children:
        child.join()
    assert same(some[7], read(store)[7])  # the parent's files are as they were


# faults of the system, not of the file


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (OSError(errno.EMFILE, "too many open files"), SiteError),
        (OSError("unable to read, errno = 12, error message = 'x', flags = 0"), SiteError),
        (MemoryError(), SiteError),
        (OSError(errno.EACCES, "permission denied"), StorageError),
        (OSError("file read failed: time = now, errno = 116, error message = 'Stale file handle'"), StorageError),
        (OSError(errno.EIO, "input/output error"), StorageError),
        (OSError("bad object header version number"), InputError),
    ],
)
def test_a_busy_system_is_no_damaged_shard(
    store: Path, fault: Exception, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(h5py, "File", fail)
    with pytest.raises(error, match="train-00000.h5"):
        read(store)[0]
    if error is InputError:
        with pytest.raises(InputError, match="holds no readable crystals"):
            read(store, on_bad="skip")
    else:
        with pytest.raises(error):
            read(store, on_bad="skip")
        with pytest.raises(error):
            check(store)


def test_too_many_open_files_is_told_by_the_system(store: Path) -> None:
    code = f"""
import resource; from hpcgen.errors import SiteError; from hpcgen.store.read import Store
some = Store({str(store)!r}); taken = []; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
try:
    while True: taken.append(open("/dev/null"))
except OSError: pass
try: some[0]
except SiteError as fault: assert "train-00000.h5: cannot be read now" in str(fault)
else: raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# what lies between the passes of a build


def test_a_damaged_staging_file_is_named_and_no_flip_goes_unseen(tmp_path: Path) -> None:
    file = tmp_path / "parsed-00000.npz"
    write_staged(file, rows(3), HEAD, [])
    whole, wanted = file.read_bytes(), read_staged(file, HEAD.columns)
    named = 0
    for at in range(0, len(whole), 3):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        try:
            found = read_staged(file, HEAD.columns)
            assert all(np.array_equal(found[name], wanted[name], equal_nan=found[name].dtype.kind == "f")
                       for name in wanted)  # fmt: skip
        except InputError as fault:
            named += 1
            assert "parsed-00000.npz" in str(fault)
    assert named > len(whole) // 6
    file.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"parsed-00000.npz: the shard is damaged"):
        read_staged(file, HEAD.columns)


def test_work_that_cannot_be_imported_is_the_environments_fault(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="hpcgen.store.nowhere cannot be imported here"):
        Later("nowhere", "Nothing", ())(Block(0, tmp_path / "a"), tmp_path / "b", None)
