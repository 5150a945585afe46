"""Which crystals of a reference each crystal of a run is compared with, and what a campaign was asked to predict."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcgen.campaign.config import CONFIG, CampaignConfig, read_config
from hpcgen.campaign.targets import targets_of
from hpcgen.crystal.composition import formula_key
from hpcgen.errors import HpcgenError, InputError
from hpcgen.metrics.charge_balance import charge_balanced
from hpcgen.metrics.validity import validity
from hpcgen.store.arrays import pointers
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store

INDEX = "index"  # column of a campaign
BY_COMPOSITION = (
    "by reduced composition and number of atoms, with every such crystal of the reference, the nearest counting"
)


def campaign_of(run: Path) -> CampaignConfig | None:
    """The settings of the campaign that made a store; None for any other store. Raises InputError for broken ones."""
    if INDEX not in read_manifest(run).head.columns or not (run / CONFIG).exists():
        return None
    config = read_config(run)
    if config.n is None or config.n % config.per_formula:
        raise InputError(f"{run / CONFIG}: n = {config.n}, want a multiple of per_formula = {config.per_formula}")
    return config


def lines_of(config: CampaignConfig | None) -> int | None:
    """How many compositions a campaign was asked for: crystal i is one of line i % L. None for one without any."""
    if config is None or config.task != "predict":
        return None
    return config.asked // config.per_formula if config.formulas else 1


@dataclass(frozen=True)
class Pairs:
    """Which crystals of the reference each of N generated ones is compared with."""

    by: str  # in words
    asked_for: np.ndarray  # (N,) str: the id of the target, or formula and number of atoms
    line: np.ndarray  # (N,) int64: number of the target: of a campaign its line, else as the store first names them
    sample: np.ndarray  # (N,) int64: which of the crystals asked for of that target, else how many stand before it
    ptr: np.ndarray  # (N + 1,) int64: first candidate of each, and the end
    candidates: np.ndarray  # (C,) int64: places in the reference
    lost: np.ndarray  # (R,) int64: lines without any crystal, where what they asked for is still known
    lost_valid: np.ndarray  # (R,) bool: whether the target of each is valid

    def save(self, draft: Path) -> None:
        """Write the file that workers read."""
        with draft.open("wb") as file:
            np.savez(file, **vars(self))

    @staticmethod
    def load(path: Path) -> "Pairs":
        """What `save` wrote."""
        with np.load(path) as known:
            return Pairs(str(known["by"]), *(known[name] for name in list(Pairs.__dataclass_fields__)[1:]))


def pair(how: str | None, run: Path, reference: Store, count: int, asked: int) -> Pairs:
    """The first `count` crystals of a run, of the first `asked` it was asked for, by `target` or `composition`.

    how: None for target where the run has that column. Raises InputError if there is nothing to compare with.
    """
    config = campaign_of(run)
    if how is None:
        how = "target" if "target" in read_manifest(run).head.columns else "composition"
    by, names, known = {"target": _by_target, "composition": _by_composition}[how](run, reference, count)
    line, sample = _lines(run, count, lines_of(config), names)
    found = [known.get(name, []) for name in names]
    if count and not any(found):
        raise InputError(
            f"{run}: no {how} of its {count:,} crystals is one of {reference.path}"
            f"{f', split {reference.split}' if reference.split else ''}; the first is {names[0]!r}"
        )
    lost = _lost(config, line, asked, how)
    return Pairs(
        by,
        np.array(names, dtype=np.str_),
        line,
        sample,
        pointers(np.array([len(some) for some in found], dtype=np.int64)),
        np.array(list(itertools.chain.from_iterable(found)), dtype=np.int64),
        np.array(list(lost), dtype=np.int64),
        _any_valid(reference, [known.get(name, []) for name in lost.values()]),
    )


_Found = tuple[str, list[str], Mapping[str, Sequence[int]]]  # in words, name of each crystal, places of each name


def _by_target(run: Path, reference: Store, count: int) -> _Found:
    """With the one of the reference whose id stands in the column `target`."""
    names: list[str] = []
    if count:
        column = Store(run).column("target")
        names = np.where(column.missing, "", column.values)[:count].astype(str).tolist()
    return "by target id", names, {id: [at] for at, id in enumerate(reference.ids)}


def _by_composition(run: Path, reference: Store, count: int) -> _Found:
    """With every one of the reference of its reduced composition and size."""
    known: dict[str, list[int]] = defaultdict(list)
    for at, key in enumerate(_compositions(reference)):
        known[key].append(at)
    return BY_COMPOSITION, list(itertools.islice(_compositions(Store(run)), count)) if count else [], known


def _compositions(store: Store) -> Iterator[str]:
    for rows in Store(store.path, store.split, columns=[]).iter_rows():
        for numbers in rows.crystals.atomic_numbers.split(rows.crystals.num_atoms.tolist()):
            yield _composition(numbers.numpy())


def _composition(numbers: np.ndarray) -> str:
    return f"{formula_key(numbers.tolist())}, {len(numbers)} atoms"


def _lines(run: Path, count: int, lines: int | None, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Number of the target and of the sample of each crystal. (N,) int64 both."""
    if lines is not None and count:
        index = Store(run).column(INDEX).values[:count]
        return index % lines, index // lines
    numbers: dict[str, int] = {}
    line = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
    order = np.argsort(line, kind="stable")
    counts = np.bincount(line)
    sample = np.empty(len(line), dtype=np.int64)
    sample[order] = np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)
    return line, sample


def _lost(config: CampaignConfig | None, line: np.ndarray, asked: int, how: str) -> dict[int, str]:
    """Lines of which every crystal was rejected, with what they asked for; none if the formulas are gone or changed."""
    lines = lines_of(config)
    if config is None or lines is None:
        return {}
    lost = np.setdiff1d(np.arange(min(lines, asked)), line)
    if not len(lost):
        return {}
    try:
        targets = targets_of(config)
    except HpcgenError:
        return {}
    if targets is None or targets.sha256 != config.targets_sha256:
        return {}
    if how == "target":
        return dict(zip(lost.tolist(), targets.names(lost), strict=True))
    return {at: _composition(targets.atomic_numbers[targets.ptr[at] : targets.ptr[at + 1]]) for at in lost.tolist()}


def _any_valid(reference: Store, places: list[Sequence[int]]) -> np.ndarray:
    """Whether some crystal of the reference among those of each is valid. (R,) bool."""
    valid = dict.fromkeys(itertools.chain.from_iterable(places), False)
    wanted = list(valid)
    for start in range(0, len(wanted), 1024):
        some = wanted[start : start + 1024]
        crystals = reference.rows(some).crystals
        parts = crystals.atomic_numbers.split(crystals.num_atoms.tolist())
        sound = validity(crystals).distances
        valid |= {at: bool(sound[k]) and charge_balanced(parts[k]) for k, at in enumerate(some)}
    return np.array([any(valid[at] for at in some) for some in places], dtype=bool)
