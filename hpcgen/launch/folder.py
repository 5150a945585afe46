"""What a run folder tells of its launches: read from names and the ends of logs, without anything heavy."""

import json
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hpcgen.errors import InputError
from hpcgen.runner.lease import MISSED_BEATS
from hpcgen.runner.owners import Life, read_record

_TAIL = 2**19  # bytes read of metrics.jsonl, and eight times that of events.jsonl
ENDS = ("stop", "done", "failed", "error")  # events


@dataclass
class Launch:
    """What events.jsonl tells of one launch."""

    start: dict[str, Any]
    end: dict[str, Any] | None = None  # its last word

    @property
    def job(self) -> str:
        return str(self.start.get("job") or "")

    @property
    def time(self) -> float:
        return number_of(self.start, "time")

    def is_same(self, start: dict[str, Any]) -> bool:
        """Whether a start event is that of the next pass of this launch."""
        return all(self.start.get(key) == start.get(key) for key in ("token", "restart"))


class Folder:
    """A run folder, each part of it read once."""

    def __init__(self, run: Path) -> None:
        self.run, self.now = run, time.time()
        self.names = {entry.name for entry in os.scandir(run)}
        # keys at the left margin; YAML puts n into quotes, where it would mean no
        self.settings = dict(re.findall(r"^'?(\w+)'?: *(.*)$", text_of(run / "config.yaml"), re.MULTILINE))
        self.events = tail_of(run / "events.jsonl", 8 * _TAIL)
        outer = run.parent.parent if run.suffix == ".work" else run  # evaluate works two folders below
        found = [record_of(path) for path in listed(outer / "submit", ".json")]
        self.submitted = [told for told in found if told and (outer == run or told.get("verb") == "evaluate")]
        self.launches: list[Launch] = []
        self.passing: dict[str, Any] = {}  # start event of the newest pass
        for event in self.events:
            self._note(event)
        owners = sorted(listed(run / "lease", ".json"), key=lambda path: (len(path.name), path.name))
        self.lease = record_of(owners[-1]) if owners else None
        self.beats = [beat for path in listed(run / "heartbeat", ".json") if (beat := self._beat(path))]
        if self.lease is not None and not self.beats:
            self.beats = [beat for beat in [self._beat(owners[-1])] if beat]

    def _note(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        if name == "start":
            if not self.launches or not self.launches[-1].is_same(event):
                self.launches.append(Launch(event))
            self.passing = event
        elif self.launches and name in ENDS:
            self.launches[-1].end = event

    def _beat(self, path: Path) -> dict[str, Any]:
        """A heartbeat with its age; empty if it is that of another launch, or gone."""
        beat = record_of(path)
        if beat is None or (beat and self.lease and beat.get("token") != self.lease.get("token")):
            return {}
        with suppress(FileNotFoundError):
            times = path.stat().st_mtime, number_of(beat, "time")
            return {**beat, "age_s": max(self.now - max(times), 0.0), "gone": Life.of(beat).gone()}
        return {}

    @property
    def newest(self) -> float:
        """Time of the newest event, in seconds since the epoch."""
        return max((number_of(event, "time") for event in self.events), default=0.0)

    @property
    def beating(self) -> list[dict[str, Any]]:
        """Heartbeats of processes that live."""
        return [b for b in self.beats if not b["gone"] and b["age_s"] <= MISSED_BEATS * (number_of(b, "beat_s") or 5.0)]

    @cached_property
    def verb(self) -> str:
        """What was run here. Raises InputError."""
        begun = bool(self.launches) or self.lease is not None
        if (self.run.suffix == ".work" and self.names) or self.is_read:
            return "evaluate"
        if "build.json" in self.names or ("work" in self.names and begun):
            return "preprocess"
        for verb, marks in (("campaign", {"checkpoint", "tile"}), ("train", {"store", "steps"})):
            if marks <= self.settings.keys():
                return verb
        submitted = {str(told.get("verb")) for told in self.submitted} - {"evaluate", "report"}
        if not submitted and not begun:
            raise InputError(f"{self.run}: holds no run of hpcgen preprocess, train, campaign or evaluate")
        return min(submitted, default="")

    @property
    def is_read(self) -> bool:
        """Whether somebody else's crystals are read here, to be evaluated."""
        return any(name.startswith("read-") for name in self.names)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The newest lines of a training."""
        return tail_of(self.run / "metrics.jsonl", _TAIL) if self.verb == "train" else []

    @cached_property
    def failed(self) -> list[Path]:
        """Marks of blocks that the newest launch gave up."""
        return listed(self.run, ".failed") + listed(self.run / "work", ".failed")

    @property
    def end(self) -> dict[str, Any] | None:
        """The last word of the newest launch."""
        return self.launches[-1].end if self.launches else None

    def number(self, name: str) -> int | None:
        """A whole number from the settings."""
        text = self.settings.get(name, "")
        return int(text) if text.isdecimal() else None

    @cached_property
    def is_complete(self) -> bool:
        """Whether all that was asked for is there."""
        if self.verb == "train":
            return (self.end or {}).get("event") == "done"
        if self.verb == "campaign":
            asked = (record_of(self.run / "summary.json") or {}).get("asked")
            return "manifest.json" in self.names and asked is not None and asked == self.number("n")
        if self.verb == "preprocess" or self.is_read:
            return "manifest.json" in self.names
        return self.verb == "evaluate" and "done.json" in self.names


def text_of(path: Path, last: int = _TAIL) -> str:
    """The last bytes of a file; '' if it is not there."""
    try:
        with path.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - last, 0))
            return file.read().decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def tail_of(path: Path, last: int) -> list[dict[str, Any]]:
    """The newest records of a JSON-lines log; torn lines are left out."""
    records = []
    for line in text_of(path, last).split("\n"):
        with suppress(ValueError):
            record = json.loads(line)
            records += [record] if isinstance(record, dict) else []
    return records


def record_of(path: Path) -> dict[str, Any] | None:
    with suppress(UnicodeDecodeError):
        return read_record(path)
    return {}


def number_of(record: dict[str, Any], name: str) -> float:
    """A number of a record, 0 where it is none."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def listed(folder: Path, ending: str) -> list[Path]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder / entry.name for entry in os.scandir(folder) if entry.name.endswith(ending))
    return []


def is_stop(event: dict[str, Any]) -> bool:
    """Whether a run left early of its own will; training calls its errors a stop too."""
    early = str(event.get("reason", "")).startswith("stopped early")
    return event.get("event") == "stop" and (event["kind"] == "StoppedEarly" if event.get("kind") else early)
