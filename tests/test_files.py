"""A file is whole or absent, whatever happens while it is written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcgen.errors import StorageError
from hpcgen.files import append_json_line, read_json_lines, reason, whole, write_json


def test_whole_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole(path) as draft:
        draft.write_text("new")
        assert not path.exists() and draft.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_fault_leaves_the_old_file_and_no_draft(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole(path) as draft:
        draft.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_veto_before_the_rename_keeps_the_old_file(tmp_path: Path) -> None:
    def veto() -> None:
        raise StorageError("lost the lease")

    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(StorageError, match="lost"), whole(path, before_rename=veto) as draft:
        draft.write_text("new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_sigkill_never_shows_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code = f"""
from pathlib import Path
from hpcgen.files import write_json
n = 0
while True:
    n += 1
    write_json(Path({str(path)!r}), [n] * 20000)
"""
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", code])
        time.sleep(0.5)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        values = json.loads(path.read_text())
        assert len(values) == 20000 and len(set(values)) == 1


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_json_lines_forgive_a_torn_last_line(tmp_path: Path) -> None:
    log = tmp_path / "events.jsonl"
    append_json_line(log, event="start")
    append_json_line(log, event="stop", reason="signal")
    with log.open("a") as file:
        file.write('{"event": "ha')
    assert [record["event"] for record in read_json_lines(log)] == ["start", "stop"]
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A real file system of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here (needs root)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_a_storage_error(tiny_disk: Path) -> None:
    write_json(tiny_disk / "old.json", 1)
    with pytest.raises(StorageError, match=r"big\.json.*No space"):
        write_json(tiny_disk / "big.json", ["x" * 1000] * 200)
    assert [p.name for p in tiny_disk.iterdir()] == ["old.json"]


def test_a_read_only_folder_is_a_storage_error(tiny_disk: Path) -> None:
    write_json(tiny_disk / "old.json", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match=r"new\.json.*[Rr]ead-only"):
        write_json(tiny_disk / "new.json", 1)
    with pytest.raises(StorageError):
        append_json_line(tiny_disk / "events.jsonl", event="x")
    assert [p.name for p in tiny_disk.iterdir()] == ["old.json"]


def test_the_reason_of_hdf5_is_not_its_date(tiny_disk: Path) -> None:
    import h5py

    def write(path: Path) -> None:
        with whole(path) as draft, h5py.File(draft, "w") as file:
            file["a"] = [0.0] * 20_000

    with pytest.raises(StorageError, match=r"a\.h5: cannot write \(No space left on device\)"):
        write(tiny_disk / "a.h5")
    said = "Can't write (file write failed: time = Sat Nov 21\n, errno = 5, error message = 'Input/output error', buf"
    assert reason(OSError(said)) == "Input/output error"
    assert reason(OSError(28, "No space left on device")) == "No space left on device"
    assert (reason(ValueError("one\ntwo")), reason(ValueError())) == ("one", "ValueError")
