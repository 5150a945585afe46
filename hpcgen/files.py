"""Whole files, and a log of JSON lines. A file under its own name is complete; a draft is somebody's work."""

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hpcgen.errors import HpcgenError, StorageError

DRAFT = ".draft"  # a draft of `a.h5` is called `a.h5.<token>.draft`
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOTDIR,
            errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE}  # fmt: skip


def is_storage_fault(fault: BaseException) -> bool:
    """Whether an error, or one it came from, speaks of space, quota, permissions or a failing disk."""
    while fault is not None and (isinstance(fault, StorageError) or not isinstance(fault, HpcgenError)):
        if isinstance(fault, OSError) and (fault.errno in _STORAGE or _names_storage(str(fault))):
            return True
        fault = fault.__cause__ or fault.__context__  # type: ignore[assignment]
    return False


def _names_storage(message: str) -> bool:
    """HDF5 hides errno in its message: 'errno = 28, error message = No space left on device'."""
    return any(f"errno = {code}," in message for code in _STORAGE)


@contextmanager
def storage_faults(path: Path) -> Iterator[None]:
    """Turn a failing disk, quota or permission inside the block into a StorageError that names `path`."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as fault:  # HDF5 raises both
        if is_storage_fault(fault):
            raise StorageError(f"{path}: cannot write ({reason(fault)}); what is already there is unharmed") from fault
        raise


def reason(fault: BaseException) -> str:
    """Why, in one line. HDF5 2 says it late, after a date with a line break: `error message = 'No space left …'`."""
    told = re.search(r"error message = '([^']+)'", str(fault))
    text = told[1] if told else getattr(fault, "strerror", None) or str(fault)
    return (text.strip() or type(fault).__name__).splitlines()[0]


def draft_of(path: Path, token: str) -> Path:
    """Where `path` is written before it is complete."""
    return path.with_name(f"{path.name}.{token}{DRAFT}")


@contextmanager
def whole(path: Path, *, token: str | None = None, before_rename: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a draft beside `path`; put it in place, on disk, only if the block went well.

    before_rename is called last before the file appears, and may raise to prevent it (a lost lease).
    Raises StorageError if the folder cannot be written; the draft is removed and an older `path` stays.
    """
    draft = draft_of(path, token or f"{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with storage_faults(path):
            yield draft
            _sync(draft)
            if before_rename is not None:
                before_rename()
            draft.replace(path)
            _sync(path.parent)
    finally:
        with suppress(OSError):  # a disk that failed the write may fail this too: the draft is swept later
            draft.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, text: str, *, token: str | None = None) -> None:
    """Write a small text file so that a reader sees the old or the new one, never a part."""
    with whole(path, token=token) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, token: str | None = None) -> None:
    """Write `value` as indented JSON, whole. Non-finite floats are refused: JSON has none."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n", token=token)


def append_json_line(path: Path, **record: Any) -> None:
    """Add one line to a JSON-lines log in a single write, so that many processes may share the file.

    `time` (seconds since the epoch) is added in front. Raises StorageError.
    """
    line = json.dumps({"time": round(time.time(), 3), **record}) + "\n"
    with storage_faults(path):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All complete records of a JSON-lines log; a torn last line (a kill in mid-write) is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def make_folder(path: Path) -> Path:
    """Make a folder and its parents. Raises StorageError where that is not allowed."""
    with storage_faults(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as fault:  # the parents are there by now: a place where nothing can be made
            raise StorageError(f"{path}: no folder can be made there ({fault.strerror})") from fault
    return path
