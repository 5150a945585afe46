"""Partial occupancy: what becomes of a structure whose sites are shared or partly empty.

drop       refuse it (code disordered)
majority   a site occupied to more than one half in all takes its most frequent element (of equals the lighter
           one), any other site becomes empty. One crystal, of another composition than the sample's: a host
           without its dopants, and without atoms that are spread over more places than there are atoms.
order:K    up to K distinct ordered crystals with the sample's composition: the smallest supercell in which
           whole numbers of atoms meet every occupancy within OCCUPANCY_STEP, filled at random from the seed.
           Sites with equal occupants are filled as one set. Fillings equal by symmetry are given once.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from hpcgen.crystal.check import one_crystal
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.refused import Refused
from hpcgen.crystal.symmetry import find_symmetry, site_permutations
from hpcgen.errors import UsageError

OCCUPANCY_STEP = 0.02  # largest difference between an occupancy and the share of sites that stands for it
LARGEST_SUPERCELL = 8
SPLIT_DISTANCE = 0.7  # Å; two sites closer than this are places of one atom and never filled together
TRIES = 20  # random fillings looked at for each ordering asked for
VACANCY = 0

Occupants = dict[int, float]  # atomic number -> occupancy; what is missing to 1 is empty


@dataclass(frozen=True)
class Sites:
    """One structure with S sites, each shared by the elements of its kind."""

    frac_coords: np.ndarray  # (S, 3)
    lattice: np.ndarray  # (3, 3) Å
    kind: np.ndarray  # (S,) index into occupants
    occupants: list[Occupants]


def orderings_of(policy: str) -> int | None:
    """The K of order:K; None for drop and majority. Raises UsageError for any other word."""
    if policy in ("drop", "majority"):
        return None
    kind, _, count = policy.partition(":")
    if kind == "order" and count.isascii() and count.isdigit() and int(count) > 0:
        return int(count)
    raise UsageError(f"disorder policy {policy!r}: want drop, majority or order:K, as order:3")


def resolve(
    sites: Sites, policy: str, *, seed: str | int, max_atoms: int, notes: Counter[str] | None = None
) -> list[Crystals]:
    """The crystals that stand for a disordered structure under `policy`. notes counts sites changed.

    Raises Refused: disordered, no-atoms, not-orderable, too-many-atoms.
    """
    orderings = orderings_of(policy)
    if policy == "drop":
        shared = next(o for o in sites.occupants if not is_full(o))
        raise Refused("disordered", f"a site holds {_words(shared)}, want whole atoms")
    if orderings is None:
        return [_majority(sites, notes)]
    return _orderings(sites, orderings, str(seed), max_atoms)


def is_full(occupants: Occupants) -> bool:
    """Whether a site is one whole atom. Occupancies are exact here: rounding was undone on reading."""
    return len(occupants) == 1 and next(iter(occupants.values())) == 1.0


def _words(occupants: Occupants) -> str:
    return ", ".join(f"{share:.3g} of element {number}" for number, share in sorted(occupants.items()))


def _majority(sites: Sites, notes: Counter[str] | None) -> Crystals:
    winner = np.array([_most_frequent(occupants) for occupants in sites.occupants], dtype=np.int64)
    numbers = winner[sites.kind]
    kept = numbers != VACANCY
    if not kept.any():
        raise Refused("no-atoms", "under majority every site is empty: none is occupied by more than one half")
    if notes is not None:
        full = np.array([is_full(occupants) for occupants in sites.occupants])[sites.kind]
        notes["majority-filled"] += int((kept & ~full).sum())
        notes["majority-emptied"] += int((~kept).sum())
    return one_crystal(sites.frac_coords[kept], sites.lattice, numbers[kept])


def _most_frequent(occupants: Occupants) -> int:
    if not sum(occupants.values()) > 0.5:
        return VACANCY
    return min(occupants, key=lambda number: (-occupants[number], number))


def _orderings(sites: Sites, wanted: int, seed: str, max_atoms: int) -> list[Crystals]:
    groups = _groups(sites)
    size = _smallest_supercell(sites, groups, max_atoms)
    cell = _supercell(sites, _shape(sites.lattice, size))
    plan = [(np.flatnonzero(np.isin(cell.kind, kinds)), _counts(o, size * n)) for kinds, o, n in groups]
    blocked = _blocked(cell)
    same = _equivalences(cell)
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16], "little")
    chance = np.random.Generator(np.random.Philox(key=key))
    found: dict[bytes, Crystals] = {}
    for _ in range(TRIES * wanted):
        numbers = _filling(plan, blocked, len(cell.kind), chance)
        if numbers is None:
            continue
        name = _canonical(numbers, same)
        if name in found:
            continue
        kept = numbers != VACANCY
        found[name] = one_crystal(cell.frac_coords[kept], cell.lattice, numbers[kept])
        if len(found) == wanted:
            break
    if not found:
        raise Refused("not-orderable", f"no filling in {TRIES * wanted} keeps atoms {SPLIT_DISTANCE} Å apart")
    return list(found.values())


def _groups(sites: Sites) -> list[tuple[list[int], Occupants, int]]:
    """Kinds with equal occupants, filled together: kinds, occupants, number of sites."""
    members: dict[tuple[tuple[int, float], ...], list[int]] = {}
    for kind, occupants in enumerate(sites.occupants):
        members.setdefault(tuple((z, round(o, 6)) for z, o in sorted(occupants.items())), []).append(kind)
    counts = np.bincount(sites.kind, minlength=len(sites.occupants))
    return [(kinds, sites.occupants[kinds[0]], int(counts[kinds].sum())) for kinds in members.values()]


def _counts(occupants: Occupants, places: int) -> dict[int, int] | None:
    """Whole atoms of each element on so many places; None if they miss an occupancy or lose an element."""
    counts = {number: round(share * places) for number, share in sorted(occupants.items())}
    if min(counts.values()) < 1 or sum(counts.values()) > places:
        return None
    off = [abs(counts[number] / places - share) for number, share in occupants.items()]
    off.append(abs(sum(counts.values()) / places - sum(occupants.values())))
    return counts if max(off) <= OCCUPANCY_STEP + 1e-9 else None


def _smallest_supercell(sites: Sites, groups: list[tuple[list[int], Occupants, int]], max_atoms: int) -> int:
    atoms = sum(sum(o.values()) * n for _, o, n in groups)
    for size in range(1, LARGEST_SUPERCELL + 1):
        if size * atoms > max_atoms:
            break
        if all(_counts(occupants, size * places) for _, occupants, places in groups):
            return size
    raise Refused(
        "not-orderable",
        f"no supercell of up to {LARGEST_SUPERCELL} cells and {max_atoms} atoms meets every occupancy "
        f"within {OCCUPANCY_STEP} and keeps every element",
    )


def _shape(lattice: np.ndarray, size: int) -> tuple[int, int, int]:
    """Repeats along a, b, c with product `size`: the shortest edge as long as can be, then the longest short."""
    edges = np.linalg.norm(lattice, axis=1)
    shapes = [(i, j, size // (i * j)) for i in range(1, size + 1) for j in range(1, size + 1) if size % (i * j) == 0]
    return min(shapes, key=lambda s: (round(-min(edges * s), 6), round(max(edges * s), 6), s))


def _supercell(sites: Sites, shape: tuple[int, int, int]) -> Sites:
    repeats = np.array(shape)
    offsets = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1).reshape(-1, 1, 3)
    frac = (sites.frac_coords + offsets).reshape(-1, 3) / repeats
    return Sites(frac, sites.lattice * repeats[:, None], np.tile(sites.kind, len(offsets)), sites.occupants)


def _blocked(cell: Sites) -> list[np.ndarray]:
    """For each site the sites too close to be filled at the same time."""
    inverse_heights = np.linalg.norm(np.linalg.inv(cell.lattice), axis=0)
    reach = np.ceil(SPLIT_DISTANCE * inverse_heights).astype(int)
    images = np.stack(np.meshgrid(*[np.arange(-n, n + 1) for n in reach], indexing="ij"), -1).reshape(-1, 3)
    blocked = []
    for site, frac in enumerate(cell.frac_coords):
        step = cell.frac_coords - frac
        step -= np.rint(step)
        apart = np.linalg.norm((step[:, None] + images) @ cell.lattice, axis=-1).min(1)
        apart[site] = np.inf
        blocked.append(np.flatnonzero(apart < SPLIT_DISTANCE))
    return blocked


def _filling(
    plan: list[tuple[np.ndarray, dict[int, int] | None]],
    blocked: list[np.ndarray],
    places: int,
    chance: np.random.Generator,
) -> np.ndarray | None:
    """Atomic numbers (places,), 0 for empty; None where the atoms do not find room."""
    numbers = np.zeros(places, dtype=np.int64)
    for members, counts in plan:
        assert counts is not None
        species = [number for number, count in counts.items() for _ in range(count)]
        order = members[np.argsort(chance.random(len(members)), kind="stable")].tolist()
        for site in order:
            if not species:
                break
            if not numbers[blocked[site]].any():
                numbers[site] = species.pop()
        if species:
            return None
    return numbers


def _equivalences(cell: Sites) -> np.ndarray | None:
    """Permutations (G, S) of the sites by the symmetry of the disordered structure; None if not found."""
    labels = {tuple(sorted(o.items())): n + 1 for n, o in enumerate(cell.occupants)}
    colour = np.array([labels[tuple(sorted(o.items()))] for o in cell.occupants], dtype=np.int64)[cell.kind]
    crystal = one_crystal(cell.frac_coords, cell.lattice, colour)
    try:
        return site_permutations(crystal, find_symmetry(crystal, symprec=0.01)).numpy()
    except Refused:
        return None


def _canonical(numbers: np.ndarray, same: np.ndarray | None) -> bytes:
    """A name equal for two fillings that a symmetry operation turns into each other."""
    if same is None:
        return numbers.astype(np.uint8).tobytes()
    return min(row.tobytes() for row in numbers.astype(np.uint8)[same])
