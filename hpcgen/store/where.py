"""A small language to choose crystals: `band_gap > 1 and num_atoms <= 20 and "Li" in elements`.

Python's own syntax is parsed, never run. Names are the store's columns and NAMES; there are numbers, texts, and, or,
not, comparisons (chained too), + - * / %, `in` with a list or with elements, and `is None` for a missing value. As in
SQL, a missing value leaves a comparison undecided, and a crystal is chosen only where all is decided and true.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcgen.crystal.composition import ATOMIC_NUMBERS, reduced_formula
from hpcgen.errors import UsageError
from hpcgen.store.layout import ColumnSpec
from hpcgen.store.rows import Rows

NAMES = ("id", "formula", "elements", "num_elements", "num_atoms", "volume")  # a column of the same name goes before
LONGEST = 2000  # characters
_KINDS = {"float": "number", "int": "number", "bool": "yes or no", "str": "text"}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@dataclass(frozen=True)
class Term:
    """A value for each of B crystals, or one for all."""

    kind: str  # number, text, yes or no, elements, nothing
    values: Any  # (B,), elements (B, 119) bool, or a single value
    missing: Any = False  # (B,) bool, or one for all: undecided


class Condition:
    """A parsed expression. Raises UsageError for what is no condition on a store with these columns."""

    def __init__(self, text: str, columns: Mapping[str, ColumnSpec], empty: Rows) -> None:
        """empty: no rows, with all columns: what cannot be worked out on them is told at once."""
        self.text, self.columns = text, columns
        if len(text) > LONGEST:
            raise UsageError(f"--where: {len(text)} characters, want at most {LONGEST}")
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as fault:
            raise UsageError(f"--where {text!r}: {getattr(fault, 'msg', None) or fault}") from None
        self(empty)

    def __call__(self, rows: Rows) -> np.ndarray:
        """Which of B rows are chosen. (B,) bool."""
        try:
            found = _Evaluation(rows, self.columns).term(self._tree)
        except _Fault as fault:
            raise UsageError(f"--where {self.text!r}: {fault}") from None
        except RecursionError:
            raise UsageError(f"--where {self.text[:80]!r}…: too many nested operations; want fewer terms") from None
        if found.kind != "yes or no":
            raise UsageError(f"--where {self.text!r}: is a {found.kind}, want a condition, as band_gap > 1")
        return np.broadcast_to(np.asarray(found.values, dtype=bool) & ~np.asarray(found.missing), len(rows)).copy()


def named(rows: Rows, name: str, columns: Mapping[str, ColumnSpec]) -> Term:
    """The value of a column or of one of NAMES for every row. Raises UsageError for another name, with the nearest."""
    try:
        return _Evaluation(rows, columns).named(name)
    except _Fault as fault:
        raise UsageError(str(fault)) from None


class _Fault(Exception):
    pass


class _Evaluation:
    """Of one expression on some rows."""

    def __init__(self, rows: Rows, columns: Mapping[str, ColumnSpec]) -> None:
        self.rows, self.columns = rows, columns

    def term(self, node: ast.expr) -> Term:
        """The value of a part of the expression."""
        match node:
            case ast.Constant(value=bool() as value):
                return Term("yes or no", value)
            case ast.Constant(value=int() | float() as value):
                return Term("number", value)
            case ast.Constant(value=str() as value):
                return Term("text", value)
            case ast.Constant(value=None):
                return Term("nothing", None)
            case ast.Name() | ast.Attribute():
                return self.named(_dotted(node))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                part = self._of_kind(operand, "yes or no")
                return Term("yes or no", np.logical_not(part.values), part.missing)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                part = self._of_kind(operand, "number")
                return Term("number", -part.values if isinstance(sign, ast.USub) else part.values, part.missing)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _arithmetic(_ARITHMETIC[type(op)], self._of_kind(left, "number"), self._of_kind(right, "number"))
            case ast.BoolOp(op=op, values=parts):
                return _joined(isinstance(op, ast.And), [self._of_kind(part, "yes or no") for part in parts])
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [left, *others]
                return _joined(True, [self._compared(*each) for each in zip(sides, ops, others, strict=False)])
        raise _Fault(f"{ast.unparse(node)!r} is not understood; want names, numbers, texts, comparisons, and, or, not")

    def named(self, name: str) -> Term:
        """A column, or what every crystal has."""
        crystals = self.rows.crystals
        if name in self.columns:
            column = self.rows.columns[name]
            return Term(_KINDS[column.spec.kind], column.values, column.missing)
        if name == "id":
            return Term("text", np.array(self.rows.ids, dtype=object))
        if name == "num_atoms":
            return Term("number", crystals.num_atoms.numpy())
        if name == "volume":
            return Term("number", crystals.volume.numpy())
        if name == "formula":
            parts = crystals.atomic_numbers.split(crystals.num_atoms.tolist()) if len(crystals) else ()
            return Term("text", np.array([reduced_formula(numbers) for numbers in parts], dtype=object))
        if name in ("elements", "num_elements"):
            present = np.zeros((len(crystals), 119), dtype=bool)
            present[crystals.batch.numpy(), crystals.atomic_numbers.numpy()] = True
            return Term("elements", present) if name == "elements" else Term("number", present.sum(1))
        known = [*self.columns, *NAMES]
        near = difflib.get_close_matches(name, known, n=1)
        raise _Fault(
            f"no column {name!r}; " + (f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}")
        )

    def _of_kind(self, node: ast.expr, kind: str) -> Term:
        found = self.term(node)
        if found.kind != kind:
            raise _Fault(f"{ast.unparse(node)!r} is {found.kind}, want {kind}")
        return found

    def _compared(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Term:
        told = f"{ast.unparse(left)!r} and {ast.unparse(right)!r}"
        if isinstance(op, ast.In | ast.NotIn):
            found = self._within(left, right)
            return found if isinstance(op, ast.In) else Term(found.kind, np.logical_not(found.values), found.missing)
        one, other = self.term(left), self.term(right)
        if isinstance(op, ast.Is | ast.IsNot):
            if other.kind != "nothing" or one.kind in ("nothing", "elements"):
                raise _Fault(f"{told}: `is` asks for None alone")
            gone = np.broadcast_to(np.asarray(one.missing), len(self.rows))
            return Term("yes or no", gone if isinstance(op, ast.Is) else ~gone)
        if "nothing" in (one.kind, other.kind):
            raise _Fault(f"{told}: a missing value is asked for by `is None`")
        if one.kind != other.kind or one.kind == "elements":
            raise _Fault(f"{told} cannot be compared: {one.kind} and {other.kind}")
        values = _COMPARISONS[type(op)](one.values, other.values)
        return Term("yes or no", np.asarray(values, dtype=bool), np.logical_or(one.missing, other.missing))

    def _within(self, left: ast.expr, right: ast.expr) -> Term:
        if isinstance(right, ast.List | ast.Tuple | ast.Set):
            found = [self._compared(left, ast.Eq(), each) for each in right.elts]
            return _joined(False, found) if found else Term("yes or no", False)
        whole = self.term(right)
        symbol = self._of_kind(left, "text").values
        if whole.kind == "elements" and isinstance(symbol, str):
            if symbol not in ATOMIC_NUMBERS:
                raise _Fault(f"{symbol!r} is no element")
            return Term("yes or no", whole.values[:, ATOMIC_NUMBERS[symbol]])
        raise _Fault(
            f'`in` wants a list of values, or a symbol in elements, as "Li" in elements; not {ast.unparse(right)}'
        )


def _dotted(node: ast.expr) -> str:
    """spacegroup.number is one name."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise _Fault(f"{ast.unparse(node)!r} is no name")


def _arithmetic(operation: Callable[[Any, Any], Any], one: Term, other: Term) -> Term:
    """In float64; what has no finite value is missing."""
    try:
        sides = [np.asarray(side.values, dtype=np.float64) for side in (one, other)]
    except OverflowError:
        raise _Fault("a number is too large") from None
    with np.errstate(all="ignore"):
        values = operation(*sides)
    return Term("number", values, np.logical_or(one.missing, other.missing) | ~np.isfinite(values))


def _joined(every: bool, parts: list[Term]) -> Term:
    """All of them true, or any. Undecided where the undecided ones would decide it (Kleene)."""
    decided = False  # by a part that is false among `and`, true among `or`
    missing = False
    for part in parts:
        decided = np.logical_or(decided, (np.asarray(part.values, dtype=bool) != every) & ~np.asarray(part.missing))
        missing = np.logical_or(missing, part.missing)
    return Term("yes or no", np.logical_xor(decided, every), np.logical_and(missing, np.logical_not(decided)))
