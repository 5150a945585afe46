"""Work for the tests of the runner, and its command: `python runner_jobs.py FOLDER key=value …`."""

import ctypes
import json
import logging
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpcgen.errors import HpcgenError
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import find_team
from hpcgen.runner.worker import Cursor

SIZE = 5


@dataclass(frozen=True)
class Work:
    """Writes one line per item; `bad` maps an item of the whole run to what it does."""

    bad: dict[int, str] = field(default_factory=dict)
    item_s: float = 0.0
    touch: str = ""  # a file that tells `raise once` that it has raised
    ballast: int = 0  # bytes that each block carries

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int | float]:
        lines = []
        for item in range(block.index * SIZE, block.index * SIZE + block.size):
            cursor.at(item)
            if item in cursor.culprits:
                lines.append(f"{item} rejected {cursor.culprits[item]}")
                continue
            self.misbehave(self.bad.get(item, ""))
            time.sleep(self.item_s)
            lines.append(f"{item} {item * item}")
        cursor.rest()
        draft.write_text("\n".join(lines) + "\n" + "-" * self.ballast)
        return {"items": block.size, "rejected": len(cursor.culprits)}

    def misbehave(self, how: str) -> None:
        if how == "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif how == "exit":
            os._exit(3)
        elif how == "loop":
            while True:
                pass
        elif how == "hang in C":
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter lock
        elif how == "raise":
            raise ValueError("an odd crystal")
        elif how == "raise once" and not Path(self.touch).exists():
            Path(self.touch).touch()
            raise ValueError("a passing trouble")


def blocks_in(folder: Path, number: int) -> list[Block]:
    return [Block(i, folder / "blocks" / f"{i:05}.txt", SIZE) for i in range(number)]


def expected(number: int, rejected: dict[int, str] | None = None) -> dict[str, str]:
    """Name and text of every block."""
    bad = rejected or {}
    return {
        f"{i:05}.txt": "".join(
            f"{k} rejected {bad[k]}\n" if k in bad else f"{k} {k * k}\n" for k in range(i * SIZE, i * SIZE + SIZE)
        )
        for i in range(number)
    }


def found(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "blocks").iterdir())}


class Launch:
    """One process (or one mpiexec) that runs this file; its family is marked, so that it can be found."""

    def __init__(self, folder: Path, *words: str, ranks: int = 0, env: dict[str, str] | None = None) -> None:
        self.mark = f"HPCGEN_TEST_FAMILY={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        mpi = [str(Path(sys.executable).parent / "mpiexec"), "-n", str(ranks)] if ranks else []
        self.process = subprocess.Popen(
            [*mpi, sys.executable, __file__, str(folder), *words],
            env={**os.environ, name: value, "OPENBLAS_NUM_THREADS": "1", **(env or {})},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self, timeout_s: float = 60) -> tuple[int, str]:
        """Exit status and all that was said."""
        try:
            text, _ = self.process.communicate(timeout=timeout_s or 0.1)
        except subprocess.TimeoutExpired:
            for pid in self.family():
                os.kill(pid, signal.SIGKILL)
            text, _ = self.process.communicate()
            raise AssertionError(f"still running after {timeout_s} s\n{text}") from None
        return self.process.returncode, text

    def family(self) -> list[int]:
        """Pids of this launch that live."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found


def wait_for(what: Callable[[], object], timeout_s: float = 20) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"waited {timeout_s} s in vain"
        time.sleep(0.02)


def litter(folder: Path) -> list[str]:
    """What a finished or stopped run must not leave behind."""
    known = ("events.jsonl", "sum.txt")
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in known]
    return [path.name for path in files if not (path.parent.name == "blocks" and path.suffix == ".txt")]


def main() -> None:
    folder = Path(sys.argv[1])
    settings = dict(word.split("=", 1) for word in sys.argv[2:])
    logging.basicConfig(level=logging.INFO, format=f"{os.getpid()} %(message)s", stream=sys.stderr)
    beat_s = float(settings.get("beat_s", 0.4))
    work = Work(
        json.loads(settings.get("bad", "{}"), object_hook=_numbered),
        float(settings.get("item_s", 0)),
        settings.get("touch", ""),
        int(settings.get("ballast", 0)),
    )
    how = How(
        int(settings.get("processes", 1)),
        item_timeout_s=float(settings.get("timeout", 60)),
        stop_grace_s=float(settings.get("grace", 10)),
    )
    with find_team() as team, StopFlag() as stop, Lease.take(folder, team, beat_s=beat_s) as lease:
        if settings.get("raise_on") == str(team.rank):
            raise RuntimeError("rank trouble")
        print(f"READY {team.kind} {team.rank} {team.size} {lease.is_taker}", flush=True)
        outcome = run_blocks(blocks_in(folder, int(settings.get("n", 8))), work, lease=lease, stop=stop, how=how)
        made = once(folder / "sum.txt", lambda draft: draft.write_text("one\n"), lease=lease, stop=stop)
        done = {"rank": team.rank, "done": outcome.done, "skipped": outcome.skipped, "made": made}
        print("DONE " + json.dumps(done | {"failed": len(outcome.failed)}), flush=True)


def _numbered(record: dict[str, str]) -> dict[int, str]:
    return {int(key): value for key, value in record.items()}


if __name__ == "__main__":
    try:
        main()
    except HpcgenError as fault:
        print(f"{type(fault).__name__}: {fault}", file=sys.stderr, flush=True)
        sys.exit(fault.exit_code)
