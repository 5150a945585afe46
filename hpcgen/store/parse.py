"""Pass 1 of building a store: a block of source rows becomes checked, reduced crystals and a list of refusals."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpcgen.crystal.cells import Cells
from hpcgen.crystal.check import faults
from hpcgen.crystal.clear import Symmetric, clear_symmetry
from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.crystals import Crystals, no_crystals
from hpcgen.crystal.lattice import in_niggli_cell
from hpcgen.crystal.purify import purify, search
from hpcgen.crystal.refused import Refused
from hpcgen.errors import InputError
from hpcgen.runner.blocks import Block
from hpcgen.runner.guard import Cursor
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.rows import Rows
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Parsed, Raw, Source
from hpcgen.store.staging import Refusal, make_column, staged_columns, write_staged

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
    is_clear: list[bool] = field(default_factory=list)  # whether the symmetry of each crystal is
    found: list[Any] = field(default_factory=list)  # of the search for that of the others
    refused: Refused | None = None

    def refuse(self, refused: Refused | None) -> None:
        """Note the first refusal."""
        self.refused = self.refused or refused


@dataclass(frozen=True)
class _Reduced:
    """Some rows' crystals after the last step."""

    rows: list[_Row]  # none of them refused
    crystals: Crystals
    space_group: list[int | None]


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
        parts: list[_Reduced] = []
        refusals: list[Refusal] = []
        seen = 0
        while some := list(itertools.islice(rows, self.together)):
            seen += len(some)
            parts.append(self._through(some, cursor))
            refusals += [_refusal(row, row.refused) for row in some if row.refused]
        if seen != block.size:
            raise InputError(
                f"{self.source.name}: rows {start} to {start + block.size} gave {seen}, want {block.size}: "
                "the input changed while it was read"
            )
        columns = staged_columns(self.source, self.settings)
        made = self._rows(parts, columns)
        write_staged(draft, made, Head(self.source.name, columns=columns), refusals)
        return {"crystals": len(made), "refused": len(refusals)}

    def _through(self, some: list[_Row], cursor: Cursor) -> _Reduced:
        """All steps for some rows. Readers and symmetry search see one row at a time: the culprit is known."""
        for step in (self._fits, self._parse):
            some = [row for row in some if _went_well(step, row, cursor)]
        cursor.rest()
        some, crystals = self._check(some)
        if not self.settings.purify:
            return self._reduce(some, crystals)
        clear = self._clear(some, crystals)
        for row in some:
            _went_well(self._search, row, cursor)
        cursor.rest()
        return self._purify(some, crystals, clear)

    def _fits(self, row: _Row) -> None:
        """Refuse what no column of a store can hold."""
        if row.raw.fault is not None:
            raise Refused(*row.raw.fault)
        _refuse_unfit(row.raw)

    def _parse(self, row: _Row) -> None:
        if row.culprit is not None:
            raise Refused(row.culprit, CULPRITS.get(row.culprit, row.culprit))
        row.parsed = self.source.parse(row.raw)
        if not row.parsed:
            raise Refused("no-atoms", "the source gave no crystal")
        for parsed in row.parsed:
            _refuse_unfit(parsed)

    def _check(self, some: list[_Row]) -> tuple[list[_Row], Crystals]:
        """The rows that pass, and their crystals."""
        settings, crystals = self.settings, _batch(some)
        told = faults(crystals, min_distance=settings.min_distance, max_atoms=settings.max_atoms)
        for row, fault in zip(_owners(some), told, strict=True):
            row.refuse(fault)
        left = [row for row in some if row.refused is None]
        return left, crystals if len(left) == len(some) else _batch(left)

    def _clear(self, some: list[_Row], crystals: Crystals) -> Symmetric:
        """Those of the crystals whose symmetry is clear; their rows note it."""
        cells = Cells.of(crystals)
        clear = clear_symmetry(cells if self.settings.niggli else cells[np.arange(0)], self.settings.symprec)
        places = set(clear.places.tolist())
        for at, row in enumerate(_owners(some)):
            row.is_clear.append(at in places)
        return clear

    def _search(self, row: _Row) -> None:
        for parsed, is_clear in zip(row.parsed, row.is_clear, strict=True):
            row.found.append(None if is_clear else search(parsed.crystal, self.settings.symprec))

    def _purify(self, some: list[_Row], crystals: Crystals, clear: Symmetric) -> _Reduced:
        settings, owners = self.settings, _owners(some)
        nothing = [None] * max((len(row.parsed) for row in some), default=0)
        pure = purify(
            crystals,
            clear,
            [found for row in some for found in (row.found if row.refused is None else nothing[: len(row.parsed)])],
            symprec=settings.symprec,
            niggli=settings.niggli,
            min_distance=settings.min_distance,
            max_atoms=settings.max_atoms,
        )
        for at, fault in pure.refused.items():
            owners[at].refuse(fault)
        whole = [k for k, at in enumerate(pure.kept.tolist()) if owners[at].refused is None]
        kept = pure.crystals if len(whole) == len(pure.kept) else pure.crystals[whole]
        return _Reduced([row for row in some if row.refused is None], kept, pure.space_group[whole].tolist())

    def _reduce(self, some: list[_Row], crystals: Crystals) -> _Reduced:
        left, crystals = _in_niggli_cells(some) if self.settings.niggli else (some, crystals)
        return _Reduced(left, crystals, [None] * len(crystals))

    def _rows(self, parts: list[_Reduced], columns: Mapping[str, ColumnSpec]) -> Rows:
        values = [
            {
                **row.raw.columns,
                **parsed.columns,
                "space_group": space_group,
                "key.id": parsed.id,
                "key.row": row.row,
                "key.split": row.raw.split,
            }
            for part in parts
            for (row, parsed), space_group in zip(_pairs(part.rows), part.space_group, strict=True)
        ]
        crystals = Crystals.cat([no_crystals(), *(part.crystals for part in parts)])
        numbers, ends = crystals.atomic_numbers.numpy(), crystals.ptr.tolist()
        for each, (first, end) in zip(values, itertools.pairwise(ends), strict=True):
            each["key.formula"] = formula_key(numbers[first:end])
        made = {name: make_column(spec, [each.get(name) for each in values]) for name, spec in columns.items()}
        return Rows(crystals, [str(number) for number in range(len(values))], made)


def _pairs(some: list[_Row]) -> list[tuple[_Row, Parsed]]:
    return [(row, parsed) for row in some for parsed in row.parsed]


def _owners(some: list[_Row]) -> list[_Row]:
    """The row of each crystal."""
    return [row for row, _ in _pairs(some)]


def _batch(some: list[_Row]) -> Crystals:
    return Crystals.cat([no_crystals(), *(parsed.crystal for _, parsed in _pairs(some))])


def _in_niggli_cells(some: list[_Row]) -> tuple[list[_Row], Crystals]:
    """The rows with their crystals in Niggli cells; a row with one that cannot be reduced is refused, alone."""
    try:
        return some, in_niggli_cell(_batch(some))
    except ValueError as fault:
        if len(some) == 1:
            some[0].refuse(Refused("no-niggli-cell", str(fault).partition(": ")[2]))  # without "crystal 0"
            return [], no_crystals()
    half = len(some) // 2
    (first, one), (second, other) = _in_niggli_cells(some[:half]), _in_niggli_cells(some[half:])
    return first + second, Crystals.cat([one, other])


def _went_well(step: Callable[[_Row], None], row: _Row, cursor: Cursor) -> bool:
    """Take a row one step further. A refusal is noted; so is a third-party reader's own error, which costs this row."""
    cursor.at(row.at)
    try:
        step(row)
    except (ImportError, MemoryError):  # the machine's fault, not the row's
        raise
    except Refused as refused:
        row.refuse(refused)
    except Exception as fault:
        row.refuse(Refused("parse-error", _first_line(fault)))
    return row.refused is None


def _refusal(row: _Row, refused: Refused) -> Refusal:
    return Refusal(row.row, _printable(row.raw.id), refused.code, _printable(refused.message))


def _refuse_unfit(told: Raw | Parsed) -> None:
    """Refuse an id or a value that no store can hold."""
    _refuse_text("id", told.id, LONGEST_ID)
    for name, value in told.columns.items():
        if isinstance(value, str):
            _refuse_text(name, value, LONGEST_TEXT)
        elif type(value) is int and not -(2**63) <= value < 2**63:
            raise Refused("bad-value", f"{name} is {value}, want a number of 64 bits")


def _refuse_text(name: str, text: str, longest: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise Refused("not-utf-8", f"{name} is not UTF-8 text") from None
    if size > longest or "\0" in text or (name == "id" and not text):
        raise Refused("bad-value", f"{name} has {size} bytes, want at most {longest}, without NUL")


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")[:LONGEST_TEXT]


def _first_line(fault: Exception) -> str:
    message = str(fault).strip()
    return f"{type(fault).__name__}: {message.splitlines()[0] if message else ''}"
