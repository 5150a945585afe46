"""What events.jsonl keeps of a launch: who, where, with which versions, and whether the code is still the same."""

import hashlib
import logging
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcgen.files import append_json_line, read_json_lines
from hpcgen.runner.team import Team

log = logging.getLogger(__name__)
EVENTS = "events.jsonl"
_PACKAGE = Path(__file__).resolve().parents[1]


def note_start(run: Path, facts: dict[str, Any], **more: Any) -> None:
    """Add a start to the events of a run folder. facts: launch_facts. Warns of code that is not that of the last start.

    A job that waits in a queue runs what is there when it begins. Raises StorageError.
    """
    starts = [event for event in read_json_lines(run / EVENTS) if event.get("event") == "start" and "code" in event]
    before = starts[-1]["code"] if starts else facts["code"]
    if before != facts["code"]:
        more["code_before"] = before
        log.warning("%s: the code of hpcgen is not that of the last start (%s, now %s)", run, before, facts["code"])
    append_json_line(run / EVENTS, event="start", **{**facts, **more})


def launch_facts(team: Team) -> dict[str, Any]:
    """What the event log keeps of a start: who, where, with which versions."""
    facts: dict[str, Any] = {
        "team": team.kind, "size": team.size, "rank": team.rank, "token": team.token, "job": team.job,
        "restart": team.restart, "host": platform.node(), "argv": sys.argv,
        "python": platform.python_version(),
    }  # fmt: skip
    for package in ("hpcgen", "numpy", "torch", "h5py", "pymatgen"):
        with suppress(metadata.PackageNotFoundError):
            facts[package] = metadata.version(package)
    facts["code"] = code_digest()
    revision = git_revision(_PACKAGE.parent)
    return facts | ({"git": revision} if revision else {})


def git_revision(root: Path) -> str:
    """The commit checked out at `root`, read from its files; empty if it is none."""
    with suppress(OSError):
        head = (root / ".git" / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        ref = head.removeprefix("ref: ")
        with suppress(OSError):
            return (root / ".git" / ref).read_text().strip()
        for line in (root / ".git" / "packed-refs").read_text().splitlines():
            if line.endswith(" " + ref):
                return line.split()[0]
    return ""


def code_digest() -> str:
    """Of every source file of the package: 12 hex digits."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
