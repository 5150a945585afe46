"""`hpcgen report`: one page of one or more runs, its figures as PNG and its tables as CSV in a folder beside it."""

import csv
import io
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcgen import __version__
from hpcgen.errors import UsageError
from hpcgen.files import draft_of, make_folder, storage_faults, write_whole
from hpcgen.report.cards import STYLE, candidates_part, script
from hpcgen.report.compare import MOST_RUNS
from hpcgen.report.gather import Gathered, gather
from hpcgen.report.parts import fact_list, section, text, whole_page
from hpcgen.report.run import Run, read_runs
from hpcgen.report.sections import Part, Table, asked_part, distributions_part, training_part, validity_part
from hpcgen.report.style import style
from hpcgen.store.read import Store

log = logging.getLogger(__name__)
CONTENTS = "contents.txt"  # of the folder beside the page: the files that it made


@dataclass(frozen=True)
class Request:
    """What is to be shown. Raises UsageError for what cannot be."""

    runs: Sequence[Path]
    out: Path
    reference: Path | None = None
    split: str | None = None  # of the reference
    sample: int = 2000  # crystals of each store looked at one by one
    seed: int = 0  # of the sample
    top: int = 8  # candidates of each run

    def __post_init__(self) -> None:
        if self.out.suffix not in (".html", ".htm") or self.out.is_dir():
            raise UsageError(f"--out {self.out}: want the name of an HTML file, as page.html")
        if self.split is not None and self.reference is None:
            raise UsageError(f"--split {self.split}: means nothing without --reference")
        if len({run.resolve() for run in self.runs}) < len(self.runs):
            raise UsageError(f"{', '.join(map(str, self.runs))}: want every run once")
        if len(self.runs) > MOST_RUNS:
            raise UsageError(f"{len(self.runs)} runs: want at most {MOST_RUNS} on one page")
        for name, least in (("sample", 1), ("top", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} {getattr(self, name)}: want at least {least}")
        if not 0 <= self.seed < 2**64:
            raise UsageError(f"--seed {self.seed}: want a whole number from 0 to 2**64 - 1")

    @property
    def folder(self) -> Path:
        """For figures and tables; never the name of a run."""
        return self.out.with_name(f"{self.out.stem}_files")


def write_report(request: Request) -> Path:
    """Write page, figures and tables, each whole; the folder of the latter two.

    Raises UsageError, InputError for what is no run or no reference, SiteError without matplotlib, StorageError.
    """
    runs = read_runs(request.runs)
    if request.reference is not None:
        Store(request.reference, request.split)  # one that cannot be read is told before anything is done
    with style():
        make_folder(request.folder)
        parts = _parts(request, runs)
    files = {f"{shown.name}.png": shown.png for part in parts for shown in part.pictures if shown.name}
    files |= {f"{name}.csv": _as_csv(told) for part in parts for name, told in part.tables.items()}
    for name, content in files.items():
        _put(request.folder / name, content)
    _clear_up(request.folder, files)
    title = " and ".join(run.name for run in runs)
    body = [f"<header><h1>{text(title)}</h1>\n<p>{text(_lead(runs))}</p></header>", *(part.html for part in parts)]
    write_whole(request.out, whole_page(title, [*body, _made_with(request, len(files))], script(), STYLE))
    return request.folder


def _parts(request: Request, runs: Sequence[Run]) -> list[Part]:
    """The sections, in order. A run that holds no crystals has only the first and the training."""
    reference = None
    if request.reference is not None:
        name = f"reference {request.reference.resolve().name}" + (f" ({request.split})" if request.split else "")
        reference = gather(request.reference, name, request.split, request.sample, request.seed)
    filled = [run for run in runs if run.crystals]
    gathered: list[Gathered] = [gather(run.path, run.name, None, request.sample, request.seed) for run in filled]
    parts = [asked_part(runs)]
    if any(run.manifest is not None for run in runs):
        parts.append(validity_part(runs, request.reference))
    if filled:
        log.info("drawing")
        parts.append(distributions_part(gathered, reference))
    parts.append(training_part(runs))
    if filled and request.top:
        parts.append(candidates_part(filled, request.top, request.sample, request.seed))
    return parts


def _lead(runs: Sequence[Run]) -> str:
    return " ".join(f"{run.name}: {_said_of(run)}." if len(runs) > 1 else f"{_said_of(run)}." for run in runs)


def _said_of(run: Run) -> str:
    if run.manifest is None:
        return "a training run, which holds no crystals"
    if not run.crystals:
        return f"no crystals: all {run.asked:,} asked for were rejected"
    return f"{run.crystals:,} crystals" + (f" of {run.asked:,} asked for" if run.rejected else "")


def _made_with(request: Request, files: int) -> str:
    return section("Made with", fact_list([
        ("hpcgen", __version__),
        ("runs", ", ".join(map(str, request.runs))),
        ("reference", f"{request.reference or 'none'}" + (f", split {request.split}" if request.split else "")),
        ("sample of each store", f"at most {request.sample:,}, seed {request.seed}"),
        ("figures as PNG, tables as CSV", f"{files} files in {request.folder.name}/"),
    ]))  # fmt: skip


def _as_csv(told: Table) -> bytes:
    text_file = io.StringIO()
    csv.writer(text_file, lineterminator="\n").writerows([told.heads, *told.rows])
    return text_file.getvalue().encode()


def _put(path: Path, content: bytes) -> None:
    """Whole or absent for every reader, without waiting for the disk: it can be drawn again. Raises StorageError."""
    draft = draft_of(path, uuid.uuid4().hex[:8])
    with storage_faults(path):
        try:
            draft.write_bytes(content)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _clear_up(folder: Path, files: dict[str, bytes]) -> None:
    """Remove what an earlier page of this name left and this one has not: nothing but its own files."""
    contents = folder / CONTENTS
    earlier = contents.read_text(encoding="utf-8").split("\n") if contents.exists() else []
    for name in earlier:
        if name and name not in files and Path(name).name == name:
            (folder / name).unlink(missing_ok=True)
    write_whole(contents, "\n".join(sorted(files)) + "\n")
