"""Who holds what, and is the holder alive? Exclusive files and signs of life, without file locks."""

import errno
import json
import os
import socket
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcgen.files import draft_of, storage_faults

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@dataclass(frozen=True)
class Life:
    """One process on one machine; `started` (clock ticks since boot) tells it from a later one of its pid."""

    host: str
    machine: str  # host name, boot and pid name space: pids can be compared only where all three are equal
    pid: int
    started: int

    @classmethod
    def own(cls) -> "Life":
        """The process that asks."""
        return cls(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()) or 0)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Life":
        """From a lease or heartbeat file; what is missing never matches."""
        return cls(*(record.get(key, none) for key, none in _NOBODY.items()))

    def record(self) -> dict[str, Any]:
        """For a lease or heartbeat file."""
        return asdict(self)

    def gone(self) -> bool | None:
        """True: surely dead. False: surely alive. None: on another machine, cannot be told from here."""
        if self.machine != _machine():
            return None
        started = _started(self.pid)
        return started is None or (self.started != started and 0 not in (started, self.started))

    def is_suspended(self) -> bool:
        """Whether it lives on this machine, but a signal has stopped it: nobody knows whether it will go on."""
        return self.gone() is False and (_stat(self.pid) or [""])[0] in ("T", "t")


_NOBODY = {"host": "unknown", "machine": "", "pid": 0, "started": 0}


class Watch:
    """Notices when signs of life stop moving. Only the watcher's own clock counts, so clocks may differ."""

    def __init__(self) -> None:
        self._seen: dict[Any, tuple[Any, float, bool]] = {}

    def look(self, who: Any, sign: Any, patience_s: float) -> bool | None:
        """True: the sign moved since the first look. False: still for `patience_s`. None: too early."""
        now = time.monotonic()
        last, since, moved = self._seen.setdefault(who, (sign, now, False))
        if sign != last:
            since, moved = now, True
            self._seen[who] = (sign, now, True)
        if now - since >= patience_s:
            return False
        return True if moved else None


def create_whole(path: Path, record: dict[str, Any], token: str) -> bool:
    """Create `path` with all its content at once, or return False because it exists already.

    Exactly one of many callers on any number of hosts gets True. Raises StorageError.
    """
    text = json.dumps(record) + "\n"
    draft = draft_of(path, f"{token}-{uuid.uuid4().hex[:8]}")
    with storage_faults(path):
        try:
            draft.write_text(text)
            os.link(draft, path)
        except FileExistsError:
            return _text(path) == text  # NFS may repeat a request whose answer was lost
        except OSError as fault:
            if fault.errno not in _NO_LINKS:
                raise
            return _create_in_place(path, text)
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
    return True


def _create_in_place(path: Path, text: str) -> bool:
    """For file systems without hard links: a reader may see it empty for a moment."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(handle, text.encode())
    except OSError:  # a full disk: a name without content would hold the place for nobody
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return True


def replace_quickly(path: Path, record: dict[str, Any], token: str) -> None:
    """Rewrite a small file as a whole, without waiting for the disk: for signs of life, of no use later."""
    draft = draft_of(path, token)
    try:
        draft.write_text(json.dumps(record) + "\n")
        draft.replace(path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any] | None:
    """The record in a small JSON file; None if it is not there; empty if it is torn."""
    text = _text(path)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _machine() -> str:
    boot, space = "", ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return f"{socket.gethostname()} {boot} {space}".strip()


def _started(pid: int) -> int | None:
    """Start of a process in ticks since boot, 0 where the system does not tell, None if gone or a zombie."""
    if sys.platform.startswith("linux"):
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else int(fields[19])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0
    return 0


def _stat(pid: int) -> list[str] | None:
    """What Linux tells of a process, from its state on; None if it is gone, or on another system."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
