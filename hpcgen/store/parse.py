"""Pass 1 of building a store: a block of source rows becomes checked, reduced crystals and a list of refusals."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcgen.crystal.check import check
from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import in_niggli_cell
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import purify, search
from hpcgen.errors import InputError
from hpcgen.runner.blocks import Block
from hpcgen.runner.guard import Cursor
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.rows import Rows
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Parsed, Raw, Source
from hpcgen.store.staging import KEYS, Refusal, make_column, no_crystals, write_staged

LONGEST_ID, LONGEST_TEXT = 200, 4096  # bytes
CULPRITS = {"crash": "the process reading it died", "timeout": "it took longer than the time allowed"}


@dataclass
class _Row:
    """A row of the source on its way through the steps."""

    at: int  # in the block
    row: int  # in the source
    raw: Raw
    culprit: str | None
    parsed: list[Parsed] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)  # of the symmetry search
    reduced: list[tuple[Crystals, int | None]] = field(default_factory=list)  # with the space group


@dataclass(frozen=True)
class ParseBlock:
    """Work of the runner: parse, check and reduce the rows of one block into a staging file."""

    source: Source
    settings: BuildSettings
    together: int = 128  # rows that go through one step before the next: half the time of row by row (caches)

    def __call__(self, block: Block, draft: Path, cursor: Cursor) -> dict[str, int]:
        start = block.index * self.settings.block_rows
        rows = (
            _Row(at, start + at, raw, cursor.culprits.get(at))
            for at, raw in enumerate(self.source.rows(start, start + block.size))
        )
        kept: list[_Row] = []
        refusals: list[Refusal] = []
        seen = 0
        while some := list(itertools.islice(rows, self.together)):
            seen += len(some)
            for step in (self._fits, self._parse, self._check, self._search, self._purify):
                some = [row for row in some if _went_well(step, row, cursor, refusals)]
            cursor.rest()
            kept += some
        if seen != block.size:
            raise InputError(
                f"{self.source.name}: rows {start} to {start + block.size} gave {seen}, want {block.size}: "
                "the input changed while it was read"
            )
        columns = staged_columns(self.source, self.settings)
        made = self._rows(kept, columns)
        write_staged(draft, made, Head(self.source.name, columns=columns), refusals)
        return {"crystals": len(made), "refused": len(refusals)}

    def _fits(self, row: _Row) -> None:
        """Refuse what no column of a store can hold."""
        if row.raw.fault is not None:
            raise Refused(*row.raw.fault)
        _refuse_text("id", row.raw.id, LONGEST_ID)
        for name, value in row.raw.columns.items():
            if isinstance(value, str):
                _refuse_text(name, value, LONGEST_TEXT)
            elif type(value) is int and not -(2**63) <= value < 2**63:
                raise Refused("bad-value", f"{name} is {value}, want a number of 64 bits")

    def _parse(self, row: _Row) -> None:
        if row.culprit is not None:
            raise Refused(row.culprit, CULPRITS.get(row.culprit, row.culprit))
        row.parsed = self.source.parse(row.raw)

    def _check(self, row: _Row) -> None:
        for parsed in row.parsed:
            check(parsed.crystal, min_distance=self.settings.min_distance, max_atoms=self.settings.max_atoms)

    def _search(self, row: _Row) -> None:
        if self.settings.purify:
            row.found = [search(parsed.crystal, self.settings.symprec) for parsed in row.parsed]

    def _purify(self, row: _Row) -> None:
        settings = self.settings
        if not settings.purify:
            row.reduced = [(parsed.crystal, None) for parsed in row.parsed]
            return
        for parsed, found in zip(row.parsed, row.found, strict=True):
            pure = purify(
                parsed.crystal,
                symprec=settings.symprec,
                found=found,
                niggli=settings.niggli,
                min_distance=settings.min_distance,
                max_atoms=settings.max_atoms,
            )
            row.reduced.append((pure.crystal, pure.space_group))

    def _rows(self, kept: list[_Row], columns: Mapping[str, ColumnSpec]) -> Rows:
        values = [
            {
                **row.raw.columns,
                **parsed.columns,
                "space_group": space_group,
                "key.id": parsed.id,
                "key.row": row.row,
                "key.formula": formula_key(crystal.atomic_numbers),
                "key.split": row.raw.split,
            }
            for row in kept
            for parsed, (crystal, space_group) in zip(row.parsed, row.reduced, strict=True)
        ]
        made = {name: make_column(spec, [each.get(name) for each in values]) for name, spec in columns.items()}
        all_reduced = [crystal for row in kept for crystal, _ in row.reduced]
        crystals = Crystals.cat(all_reduced) if all_reduced else no_crystals()
        if all_reduced and self.settings.niggli and not self.settings.purify:
            crystals = in_niggli_cell(crystals)
        return Rows(crystals, [str(number) for number in range(len(values))], made)


def _went_well(step: Callable[[_Row], None], row: _Row, cursor: Cursor, refusals: list[Refusal]) -> bool:
    """Take a row one step further. A refusal is noted; so is a third-party reader's own error, which costs this row."""
    cursor.at(row.at)
    try:
        step(row)
        return True
    except (ImportError, MemoryError):  # the machine's fault, not the row's
        raise
    except Refused as refused:
        code, message = refused.code, refused.message
    except Exception as fault:
        code, message = "parse-error", _first_line(fault)
    refusals.append(Refusal(row.row, _printable(row.raw.id), code, _printable(message)))
    return False


def _refuse_text(name: str, text: str, longest: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Refused("not-utf-8", f"{name} is not UTF-8 text") from None
    if size > longest or "\0" in text or (name == "id" and not text):
        raise Refused("bad-value", f"{name} has {size} bytes, want at most {longest}, without NUL")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:LONGEST_TEXT]


def staged_columns(source: Source, settings: BuildSettings) -> dict[str, ColumnSpec]:
    """Columns of a staging file: the source's, what pass 1 finds, the keys of pass 2."""
    space_group = {"space_group": ColumnSpec("int")} if settings.purify else {}
    return {**source.columns, **space_group, **KEYS}


def _first_line(fault: Exception) -> str:
    message = str(fault).strip()
    return f"{type(fault).__name__}: {message.splitlines()[0] if message else ''}"
