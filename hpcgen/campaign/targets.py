"""What is to be predicted: compositions of whole cells, one line each, with an id that stays with their crystals."""

import csv
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.campaign.config import MOST_ATOMS, CampaignConfig
from hpcgen.crystal.composition import ATOMIC_NUMBERS, BadFormula, parse_formula
from hpcgen.errors import InputError, UsageError
from hpcgen.store.arrays import pointers, ranges
from hpcgen.store.write import LONGEST_TEXT


@dataclass(frozen=True)
class Targets:
    """L compositions. Crystal i of a campaign is one of line i % L, so that more of each come behind those there are.

    The atoms of a cell stand by atomic number: nothing depends on how a formula was written.
    """

    ids: np.ndarray  # (L,) UTF-8 bytes
    ptr: np.ndarray  # (L + 1,) int64
    atomic_numbers: np.ndarray  # (A,) uint8

    def __len__(self) -> int:
        return len(self.ids)

    def num_atoms(self, index: np.ndarray) -> np.ndarray:
        """Of the crystals at `index`. (B,) -> (B,) int64."""
        line = index % len(self)
        return self.ptr[line + 1] - self.ptr[line]

    def species(self, index: np.ndarray, length: int) -> np.ndarray:
        """Their elements, 0 behind them. (B,) -> (B, length) int64."""
        counts = self.num_atoms(index)
        rows = np.zeros((len(index), length), dtype=np.int64)
        rows[np.arange(length) < counts[:, None]] = self.atomic_numbers[ranges(self.ptr[index % len(self)], counts)]
        return rows

    def names(self, index: np.ndarray) -> list[str]:
        """Ids of their lines."""
        return [name.decode() for name in self.ids[index % len(self)].tolist()]

    @property
    def sha256(self) -> str:
        """Hash of ids and compositions."""
        told = hashlib.sha256()
        for part in (self.ptr.tobytes(), self.atomic_numbers.tobytes(), b"\n".join(self.ids.tolist())):
            told.update(part)
        return told.hexdigest()


def targets_of(config: CampaignConfig) -> Targets | None:
    """What a campaign is to predict, None if it is to generate freely.

    Raises UsageError for a formula or a split that cannot be, InputError naming file and line.
    """
    if config.formula:
        return _targets("--formula", [(config.formula, _cell(config.formula))])
    if not config.formulas:
        return None
    path = Path(config.formulas)
    if path.is_dir():
        made = _of_store(path, config.split or None, config.limit or None)
    else:
        if config.split:
            raise UsageError(f"--split {config.split}: {path} is no store")
        made = _targets(str(path), list(itertools.islice(_lines(path), config.limit or None)))
    if not len(made):
        raise InputError(f"{path}: holds no formulas")
    return made


def _of_store(path: Path, split: str | None, limit: int | None) -> Targets:
    from hpcgen.store.read import Store

    parts, left = [], limit
    for rows in Store(path, split, columns=[]).iter_rows():
        part = rows.crystals if left is None else rows.crystals[:left]
        ids, counts = rows.ids[: len(part)], part.num_atoms.numpy()
        cell = np.repeat(np.arange(len(part)), counts)
        numbers = part.atomic_numbers.numpy()
        parts.append((ids, counts, numbers[np.lexsort((numbers, cell))]))
        if left is not None and (left := left - len(part)) <= 0:
            break
    ids, counts, numbers = zip(*parts, strict=True)
    return _checked(str(path), [id for some in ids for id in some], np.concatenate(counts), np.concatenate(numbers))


def _targets(source: str, cells: Sequence[tuple[str, dict[int, int]]]) -> Targets:
    """Of ids and, for each, atoms by atomic number."""
    numbers = [np.repeat(np.array(list(cell), dtype=np.uint8), list(cell.values())) for _, cell in cells]
    counts = np.array([len(part) for part in numbers], dtype=np.int64)
    return _checked(source, [name for name, _ in cells], counts, np.concatenate([np.zeros(0, np.uint8), *numbers]))


def _checked(source: str, ids: Sequence[str], counts: np.ndarray, numbers: np.ndarray) -> Targets:
    for id in ids:
        if len(id.encode()) > LONGEST_TEXT:
            raise InputError(f"{source}: id {id[:80]!r}…: {len(id.encode()):,} bytes, want at most {LONGEST_TEXT}")
    encoded = np.array([id.encode() for id in ids], dtype=np.bytes_) if ids else np.zeros(0, dtype="S1")
    return Targets(encoded, pointers(counts), numbers.astype(np.uint8))


def _cell(formula: str) -> dict[int, int]:
    """Atoms by atomic number, the lowest first. Raises BadFormula."""
    counts = parse_formula(formula)
    if sum(counts.values()) > MOST_ATOMS:
        raise BadFormula(f"formula {formula!r}: {sum(counts.values()):,} atoms; want at most {MOST_ATOMS:,}")
    return dict(sorted((ATOMIC_NUMBERS[symbol], count) for symbol, count in counts.items()))


def _repeated(cell: dict[int, int], atoms: str) -> dict[int, int]:
    """The cell as often as it takes to hold so many atoms; as it is where none are told. Raises BadFormula."""
    if not atoms:
        return cell
    shared = math.gcd(*cell.values())  # a formula such as O2 or Na2O2 may stand for a cell of O or NaO
    cell = {number: count // shared for number, count in cell.items()}
    times, rest = divmod(int(atoms) if atoms.isdecimal() else 0, sum(cell.values()))
    if rest or not 0 < times * sum(cell.values()) <= MOST_ATOMS:
        raise BadFormula(f"num_atoms is {atoms!r}; want a multiple of the formula's {sum(cell.values())}")
    return {number: count * times for number, count in cell.items()}


def _lines(path: Path) -> Iterator[tuple[str, dict[int, int]]]:
    """Id and cell of each line of a file: formulas, or comma-separated values under names with `formula` in them.

    Where there is a column `num_atoms` too, as `hpcgen export` writes it, the formula is one of several in the cell.
    """
    named: set[str] = set()
    columns: list[str] | None = None
    for number, cells in _rows(path):
        if columns is None:
            columns = [cell.lower() for cell in cells] if "formula" in [cell.lower() for cell in cells] else [""]
            if columns != [""]:
                continue
        told = dict(zip(columns, cells, strict=False)) if columns != [""] else {"formula": ",".join(cells)}
        formula = told.get("formula", "")
        try:
            cell = _repeated(_cell(formula), told.get("num_atoms", ""))
        except BadFormula as fault:
            raise InputError(f"{path}, line {number}: {fault}") from None
        name = told.get("id", formula)
        if "id" in columns and (not name or name in named):
            raise InputError(f"{path}, line {number}: id {name!r} {'stands twice' if name else 'is empty'}")
        named.add(name)
        yield name, cell


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and cells of each line that says something."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if any(cells) and not cells[0].startswith("#"):
                    yield reader.line_num, cells
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise InputError(f"{path}: cannot read formulas ({getattr(fault, 'strerror', None) or fault})") from fault
