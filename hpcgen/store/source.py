"""What a source of crystals must be able to do: say how many rows it has, give a run of them, parse one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from hpcgen.store.layout import ColumnSpec

if TYPE_CHECKING:
    from hpcgen.crystal.crystals import Crystals

Value = float | int | bool | str | None  # None: missing


@dataclass(frozen=True)
class Raw:
    """One row of a source, unparsed: cheap to make, safe to hold."""

    id: str
    body: Any  # CIF text, a document, ...: what Source.parse understands
    columns: Mapping[str, Value] = field(default_factory=dict)  # under the house's names
    split: str | None = None  # train, val or test, where the source brings its own
    fault: tuple[str, str] | None = None  # (code, message) where the row itself is broken: refused unparsed


@dataclass(frozen=True)
class Parsed:
    """One crystal of a row. A row may give several (orderings of a disordered structure)."""

    id: str
    crystal: "Crystals"  # one crystal, float64
    columns: Mapping[str, Value] = field(default_factory=dict)  # added to the row's


class Source(Protocol):
    """A source of crystals. Picklable; holds settings and paths, opens files only inside `rows`."""

    name: str  # as in the manifest: mp20, icsd, ...
    columns: Mapping[str, ColumnSpec]  # of every column that `rows` or `parse` may give

    def identity(self) -> dict[str, Any]:
        """JSON values that differ where the input differs; with the settings they determine the store."""
        ...

    def size(self) -> int:
        """Number of rows. Called by one process of a launch. Raises InputError."""
        ...

    def rows(self, start: int, stop: int) -> Iterator[Raw]:
        """Rows start to stop, always the same ones in the same order; called with growing `start` by a process."""
        ...

    def parse(self, raw: Raw) -> list[Parsed]:
        """The crystals of a row. Raises Refused; runs where a crash or an endless loop costs this row alone."""
        ...
