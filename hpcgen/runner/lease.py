"""One run folder, one owner. The lease is a file that its holders keep fresh; three beats of silence end it.

`lease/owner-<g>.json` is the lease of generation g. To take over from a dead holder is to create g + 1, which
the file system lets exactly one contender do; so nobody ever removes a lease to get one. The highest
generation owns. All members of a launch share its token and so its lease; each beats in
`heartbeat/<rank>.json`.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcgen.errors import HpcgenError, SiteError, StoppedEarly, StorageError
from hpcgen.files import DRAFT, append_json_line, make_folder, storage_faults
from hpcgen.runner.events import EVENTS
from hpcgen.runner.owners import Life, Watch, create_whole, read_record, replace_quickly
from hpcgen.runner.team import Team

log = logging.getLogger(__name__)
CLAIM = ".claim"
MISSED_BEATS = 3
_COME_S = 600.0  # a rank of MPI that is to work here gets so long to come
HOUSEKEEPING = ("lease", "heartbeat", EVENTS, "submit")  # in any run folder, whatever is made there


class Lease:
    """The right to write into one run folder. Get it from `Lease.take`; use it as a context manager."""

    def __init__(self, folder: Path, team: Team, beat_s: float) -> None:
        self.folder, self.team, self.beat_s = folder, team, beat_s
        self.member = uuid.uuid4().hex[:8]  # tells this process from an earlier one of the same token and rank
        self.is_taker = False  # this process created the lease, it did not join it
        self.told_to_stop = False  # another rank of MPI was asked to stop
        self.report: Callable[[], dict[str, Any]] = dict  # what the heartbeat says about the work
        self.watch = Watch()
        self._life = Life.own()
        self._generation = 0
        self._lost = ""
        self._beats = 0
        self._last_touch = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    @property
    def token(self) -> str:
        """For drafts that no other member of this launch may sweep."""
        return f"{self.team.token}-{self.member}"

    @classmethod
    def take(cls, folder: Path, team: Team, *, sweep: Iterable[Path] = (), beat_s: float = 5.0) -> "Lease":
        """Own `folder`, or join the members of this launch that do. Waits three beats for a silent holder.

        sweep: folders from which drafts and claims of dead launches are removed.
        Raises StorageError, naming the holder, if the folder belongs to another run that is alive.
        """
        lease = cls(make_folder(Path(folder)), team, beat_s)
        make_folder(lease._beat_file.parent)
        lease._acquire()
        lease._beat()
        lease.check()  # a holder that seemed dead may have been replaced by a third in the meantime
        for path in sweep:
            lease.sweep(path)
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raise StorageError if the folder now belongs to another run. To be called before every rename."""
        if not self._lost and self._owner(self._generation + 1).exists():
            self._lost = self._describe_newest()
        if not self._lost:
            record = read_record(self._owner(self._generation))
            if record is None or record.get("token") != self.team.token:
                self._lost = self._describe_newest()
        if self._lost:
            raise StorageError(f"{self.folder}: lost the lease, {self._lost}; nothing more is written")

    def sweep(self, folder: Path) -> int:
        """Remove drafts and claims that other launches left in `folder`; only the taker of the lease does."""
        if not self.is_taker or not folder.is_dir():
            return 0
        own = f".{self.team.token}"
        left = [
            entry.name for entry in os.scandir(folder) if entry.name.endswith((DRAFT, CLAIM)) and own not in entry.name
        ]
        for name in left:
            with suppress(OSError):
                (folder / name).unlink()
        if left:
            log.info("%s: removed %d drafts and claims of earlier runs", folder, len(left))
        return len(left)

    def tell_stop(self) -> None:
        """Let the other ranks of MPI know of a stop within a beat; array tasks are independent."""
        if self.team.kind == "mpi" and not self.told_to_stop:
            with suppress(StorageError):
                create_whole(self._stop_mark, {"rank": self.team.rank}, self.team.token)

    def is_alive(self, rank: int, member: str) -> bool:
        """Whether a member of this launch still beats."""
        path = self._beat_of_rank(rank)
        record = read_record(path)
        if record is None or (record and record.get("member") != member) or record.get("left"):
            return False
        life = Life.of(record)
        gone = life.gone()
        if gone is not None and not life.is_suspended():
            return not gone
        sign = (record.get("beat"), _modified(path))
        return self.watch.look((rank, member), sign, MISSED_BEATS * self.beat_s) is not False

    def release(self) -> None:
        """Leave; the last member of the launch removes the lease."""
        self._stop_beating()
        with suppress(OSError, StorageError):
            own = read_record(self._beat_file) or {}
            if own.get("member") == self.member and not own.get("left"):  # that mark the others wait for
                self._beat_file.unlink()
            self.check()
            if not self.others_alive():
                self._stop_mark.unlink(missing_ok=True)
                for path in self._beat_file.parent.glob("*.json"):  # of members that were killed
                    path.unlink(missing_ok=True)
                self._owner(self._generation).unlink()
        for folder in (self._beat_file.parent, self._stop_mark.parent):
            with suppress(OSError):  # not empty: others still use it
                folder.rmdir()

    def _stop_beating(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.beat_s)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if fault is not None and not isinstance(fault, StoppedEarly | KeyboardInterrupt):
            origin = {"rank": self.team.rank, "kind": type(fault).__name__}
            self.note_error(str(fault), {**origin, **(fault.origin if isinstance(fault, HpcgenError) else {})})
        try:
            if self.team.kind == "mpi" and not self.is_lost:
                self._stop_beating()
                with suppress(OSError, StorageError):
                    self._beat(left=True)
                if fault is None:
                    self._await_others()
        finally:
            self.release()

    def note_error(self, message: str, origin: dict[str, Any]) -> None:
        """Add an error to the events of the run, if it still is this one's and can be written. origin: rank, kind."""
        if self.is_lost:
            return
        with suppress(StorageError):
            told = {"token": self.team.token, **origin, "message": message}
            append_json_line(self.folder / EVENTS, event="error", **told)

    @property
    def is_lost(self) -> bool:
        """Whether the last beat or check found another owner."""
        return bool(self._lost)

    @property
    def _beat_file(self) -> Path:
        return self._beat_of_rank(self.team.rank)

    def _beat_of_rank(self, rank: int) -> Path:
        return self.folder / "heartbeat" / f"{rank}.json"

    @property
    def _stop_mark(self) -> Path:
        return self.folder / "lease" / f"{self.team.token}.stop"

    def _owner(self, generation: int) -> Path:
        return self.folder / "lease" / f"owner-{generation}.json"

    def _generations(self) -> list[int]:
        try:
            names = [path.name for path in (self.folder / "lease").iterdir()]
        except FileNotFoundError:
            return []
        middles = [n[6:-5] for n in names if n.startswith("owner-") and n.endswith(".json")]
        return sorted(int(middle) for middle in middles if middle.isdigit())

    def _acquire(self) -> None:
        waiting = False
        while True:
            known = self._generations()
            newest = known[-1] if known else 0
            record = read_record(self._owner(newest)) if known else None
            if record is not None:
                if record.get("token") == self.team.token:
                    self._generation = newest
                    return
                alive = not self._follows(record) and self._holder_alive(newest, record)
                if alive:
                    raise StorageError(f"{self.folder}: belongs to another run, {self._describe(newest, record)}")
                if alive is None:
                    if not waiting:
                        log.warning(
                            "%s: held by another run, %s; waiting up to %.0f s for a sign of life",
                            self.folder, self._describe(newest, record), MISSED_BEATS * _beat_of(record),
                        )  # fmt: skip
                    waiting = True
                    time.sleep(min(0.5, self.beat_s / 5))
                    continue
                whom = "this job before it was started again" if self._follows(record) else "a dead run"
                log.warning("%s: taking over from %s, %s", self.folder, whom, self._describe(newest, record))
            if self._create(newest + 1):
                return

    def _create(self, generation: int) -> bool:
        team = self.team
        record = {
            "token": team.token, "member": self.member, "kind": team.kind, "size": team.size,
            "job": team.job, "restart": team.restart, "beat_s": self.beat_s, "taken": round(time.time(), 3),
            **self._life.record(),
        }  # fmt: skip
        make_folder(self._stop_mark.parent)
        try:
            if not create_whole(self._owner(generation), record, team.token):
                return False
        except FileNotFoundError:  # a leaving run removed the empty folder
            return False
        known = self._generations()
        if known and known[-1] > generation:  # we were slow: somebody took over from somebody we never saw
            self._owner(generation).unlink(missing_ok=True)
            return False
        self._generation, self.is_taker = generation, True
        for old in known:  # in rising order, see check()
            if old < generation:
                self._owner(old).unlink(missing_ok=True)
        for path in self._stop_mark.parent.glob("*.stop"):
            path.unlink(missing_ok=True)
        self.sweep(self._stop_mark.parent)
        self._sweep_beats()
        return True

    def _sweep_beats(self) -> None:
        self.sweep(self._beat_file.parent)
        for path in self._beat_file.parent.glob("*.json"):
            if (read_record(path) or {}).get("token") != self.team.token:
                path.unlink(missing_ok=True)

    def _follows(self, record: dict[str, Any]) -> bool:
        """Whether this is the holder's job, started again: what lives of it, on a node that Slurm lost, is to go."""
        same = bool(self.team.job) and record.get("job") == self.team.job
        return same and int(record.get("restart", 0)) < self.team.restart

    def _holder_alive(self, generation: int, record: dict[str, Any]) -> bool | None:
        """Whether the run that holds a lease lives; None while it cannot be told yet."""
        lives = [Life.of(record)] + [Life.of(beat) for beat in self._beats_of(str(record.get("token")))]
        gone = [life.gone() for life in lives]
        if False in gone:
            return True
        if None not in gone:
            return False
        path = self._owner(generation)
        who = (generation, record.get("token"))
        return self.watch.look(who, _modified(path), MISSED_BEATS * _beat_of(record))

    def _beats_of(self, token: str) -> list[dict[str, Any]]:
        with suppress(FileNotFoundError):
            found = [read_record(path) for path in self._beat_file.parent.glob("*.json")]
            return [record for record in found if record and record.get("token") == token]
        return []

    def others_alive(self) -> bool:
        """Whether other members of this launch are still at work here, as far as their signs of life tell."""
        return any(self.is_alive(int(beat["rank"]), str(beat["member"])) for beat in self._beats_of_others())

    def _beats_of_others(self) -> list[dict[str, Any]]:
        return [beat for beat in self._beats_of(self.team.token) if beat.get("member") != self.member]

    def leads(self) -> bool:
        """Whether no member of this launch of a lower rank is at work here now."""
        lower = [beat for beat in self._beats_of(self.team.token) if int(beat["rank"]) < self.team.rank]
        return not any(self.is_alive(int(beat["rank"]), str(beat["member"])) for beat in lower)

    def _await_others(self) -> None:
        """Rank 0 waits until all others have come and are done, they until it is: MPI waits too, but for ever.

        Raises SiteError naming one that neither works nor leaves, or never came.
        """
        began = looked = time.monotonic()
        awaited = set(range(1, self.team.size)) if self.team.rank == 0 else {0}
        while (read_record(self._beat_file) or {}).get("member") == self.member:  # else another one has cleared up
            if time.monotonic() - looked > self.beat_s:  # the job was suspended: all begin anew
                self.watch = Watch()
            looked = time.monotonic()
            for rank in sorted(awaited):
                beat = read_record(self._beat_of_rank(rank)) or {}
                if beat.get("token") != self.team.token:
                    beat = {}  # of an earlier launch
                if beat.get("left"):
                    awaited.remove(rank)
                elif beat and not self.is_alive(rank, str(beat.get("member"))):
                    newest = read_record(self._beat_of_rank(rank)) or {}
                    if newest.get("member") == beat.get("member") and not newest.get("left"):  # else it has just left
                        self._refuse_late(rank, f"on {Life.of(beat).host} gives no sign of life")
                elif not beat and time.monotonic() > began + _COME_S:
                    self._refuse_late(rank, "has not come")
            if not awaited:
                return
            time.sleep(0.1)

    def _refuse_late(self, rank: int, what: str) -> None:
        self.note_error(f"rank {rank} {what}", {"rank": rank, "kind": SiteError.__name__})
        raise SiteError(f"{self.folder}: rank {rank} {what}; the same command does what is missing, if anything")

    def _describe_newest(self) -> str:
        known = self._generations()
        record = read_record(self._owner(known[-1])) if known else None
        if record is None:
            return "its file is gone"
        return f"now held by {self._describe(known[-1], record)}"

    def _describe(self, generation: int, record: dict[str, Any]) -> str:
        job = f", job {record['job']}" if record.get("job") else ""
        age = max(time.time() - _modified(self._owner(generation)) / 1e9, 0.0)
        since = max(time.time() - float(record.get("taken", time.time())), 0.0)
        life = Life.of(record)
        return f"pid {life.pid} on {life.host}{job}, since {since:.0f} s, last sign of life {age:.0f} s ago"

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.beat_s):
            try:
                self.check()
                self._beat()
            except Exception as fault:  # whatever it is, a run that stops beating looks dead to all others
                if self._lost:
                    log.error("%s", fault)
                    return
                log.warning("heartbeat: %s: %s", type(fault).__name__, fault)

    def _beat(self, *, left: bool = False) -> None:
        self._beats += 1
        self._touch_owner()
        self.told_to_stop = self.told_to_stop or self._stop_mark.exists()
        last = read_record(self._beat_file) if self._beats > 1 else None
        if last and last.get("token") == self.team.token and last.get("member") != self.member:
            self._lost = f"rank {self.team.rank} was restarted as pid {last.get('pid')} on {last.get('host')}"
            return
        record = {
            "time": round(time.time(), 3), "rank": self.team.rank, "beat": self._beats, "beat_s": self.beat_s,
            "token": self.team.token, "member": self.member, **self._life.record(), **self.report(),
        }  # fmt: skip
        if left:
            record["left"] = True
        with storage_faults(self._beat_file):
            try:
                replace_quickly(self._beat_file, record, self.token)
            except OSError:
                with suppress(FileNotFoundError):
                    os.utime(self._beat_file)  # a full disk still takes a new time
                raise

    def _touch_owner(self) -> None:
        """The taker refreshes the lease at each beat, the others when nobody did since their last one."""
        path = self._owner(self._generation)
        seen = _modified(path)
        if self.is_taker or seen == self._last_touch:
            with suppress(FileNotFoundError):
                os.utime(path)
        self._last_touch = _modified(path)


def _beat_of(record: dict[str, Any]) -> float:
    return float(record.get("beat_s", 5.0))


def _modified(path: Path) -> int:
    """Time of change in ns, 0 if it is gone. Opened first: NFS then asks the server instead of its cache."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0
