"""Periodic neighbours by radius and by count: every image, exact for any cell and any cut-off."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import heights, inverse_transform, multiply, niggli_reduce, refuse_flat, volume

MOST_EDGES = 100_000_000  # of one crystal, as expected from its density; more is a collapsed cell
LONGEST = 1e9  # Å, of a lattice vector; its square must be well inside single precision
MARGIN = 1e-6  # Å; the search goes this far beyond the cut-off, and what lies so near is measured anew
SKEWED = 4.0  # cells of a·b·c / volume above this are searched in their Niggli cell
TIE = 1e-3  # distances within this share of the k-th are ties: equal ones in coordinates of four digits
CHUNK = 1 << 20  # candidates that method "torch" measures at a time, about 200 bytes each
GROUP = 1 << 15  # images that method "cpu" lays out at a time, about 150 bytes each
PRODUCTS = 1 << 20  # pairs that it measures at a time, 5 bytes each: what a core's cache holds
ROUNDING = 32 * 2.0**-23  # of its squared distances in float32: five products of at most |x|² + radius²


@dataclass(frozen=True, eq=False)
class Edges:
    """E directed edges i <- j of a batch: ‖r_i − (r_j + image @ lattice)‖, without i = j, image = 0."""

    index: Tensor  # (2, E) int64: centre i, neighbour j, counted through the batch; sorted by i, j, image
    image: Tensor  # (E, 3) int64 lattice translation of j


def radius_edges(crystals: Crystals, cutoff: float, method: str | None = None) -> Edges:
    """All edges of distance < `cutoff` Å, every image and self-images included; computed in float64.

    Measured as `edge_distances` does in float64, so a pair at the cut-off itself is out by the last bit, and
    an edge is there if and only if its reverse is.
    method: "cpu" (matrix products, a group of crystals at a time) or "torch" (the batch at once, on the device of
    `crystals`); None takes "torch" on a GPU, else "cpu". Both give equal edges, on the device of `crystals`.
    Raises ValueError for a bad cut-off, and names the crystal of a bad coordinate or cell.
    """
    if not 0 < cutoff < math.inf:
        raise ValueError(f"cutoff {cutoff!r} Å, want a positive finite number")
    exact = _checked(crystals)
    return _search(method, exact)(exact, exact.lattice.new_full((len(exact),), cutoff))


def nearest_edges(crystals: Crystals, k: SupportsIndex, method: str | None = None, tie: float = TIE) -> Edges:
    """The k nearest images of each atom, self-images included, and all that tie with the k-th.

    Kept is what is at most (1 + tie) times as far as the k-th nearest: k edges or more from each atom, the
    same ones for any order of atoms and any choice of cell. Not symmetric: j may be near i, but not i near j.
    method as for radius_edges. Raises ValueError as radius_edges, and for k < 1.
    """
    k = _count(k)
    if not 0 <= tie < 1:
        raise ValueError(f"tie {tie!r}, want a share from 0 to below 1")
    exact = _checked(crystals)
    search = _search(method, exact)
    # a sphere that holds k + 1 atoms of the mean density, a quarter more for good measure
    radius = 1.25 * (0.75 / math.pi * (k + 1) * exact.volume / exact.num_atoms).pow(1 / 3)
    pending = torch.arange(len(exact), device=radius.device)
    parts = [Edges(pending.new_zeros(2, 0), pending.new_zeros(0, 3))]
    while len(pending):
        some = exact[pending]
        edges, complete = _nearest(some, search(some, radius[pending]), k, tie, radius[pending])
        parts.append(_of_whole(edges, some, pending[complete], exact, complete))
        pending = pending[~complete]
        radius = radius * 1.3
    index, image = torch.cat([part.index for part in parts], 1), torch.cat([part.image for part in parts])
    order = index[0].argsort(stable=True)  # each crystal is in one part, sorted
    return Edges(index[:, order], image[order])


def edge_vectors(crystals: Crystals, edges: Edges) -> Tensor:
    """From centre i to neighbour j: r_j + image @ lattice − r_i. -> (E, 3) Å, differentiable."""
    centre, neighbour = edges.index
    # in this order an edge and its reverse are exactly opposite; and one operation at a time, so that every
    # device and NumPy round alike
    frac = crystals.frac_coords
    step = (frac.index_select(0, neighbour) - frac.index_select(0, centre)) + edges.image
    rows = crystals.lattice.index_select(0, crystals.batch[centre])  # (E, 3, 3)
    x, y, z = step.split(1, dim=-1)
    return (x * rows[:, 0] + y * rows[:, 1]) + z * rows[:, 2]


def edge_distances(crystals: Crystals, edges: Edges) -> Tensor:
    """Lengths of the edges. -> (E,) Å, differentiable; the gradient of a length of 0 is 0."""
    x, y, z = edge_vectors(crystals, edges).unbind(-1)
    square = (x * x + y * y) + z * z
    nought = square == 0
    return torch.where(nought, 1.0, square).sqrt().masked_fill(nought, 0.0)


def _count(k: SupportsIndex) -> int:
    """A whole number of any type, NumPy's among them, but no bool. Raises ValueError unless it is positive."""
    try:
        count = 0 if isinstance(k, bool) else operator.index(k)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(f"k {k!r}, want a positive whole number of neighbours")
    return count


def _checked(crystals: Crystals) -> Crystals:
    """The crystals in float64 without gradient. Raises ValueError for what cannot be searched."""
    frac, lattice = crystals.frac_coords.detach().double(), crystals.lattice.detach().double()
    exact = Crystals(frac, lattice, crystals.atomic_numbers, crystals.num_atoms)
    for atom in (~frac.isfinite().all(-1)).nonzero().flatten().tolist():
        crystal = int(exact.batch[atom])
        raise ValueError(
            f"crystal {crystal}: fractional coordinates {frac[atom].tolist()} of its atom "
            f"{atom - int(exact.ptr[crystal])}, want finite numbers"
        )
    refuse_flat(lattice)
    for i in (~(lattice.abs() < LONGEST)).flatten(1).any(1).nonzero().flatten().tolist():
        raise ValueError(f"crystal {i}: lattice {lattice[i].tolist()}, want components below {LONGEST:g} Å")
    return exact


def _refuse_crowded(crystals: Crystals, radius: Tensor) -> None:
    """Raise ValueError, naming the crystal, where the density promises more than MOST_EDGES edges."""
    expected = crystals.num_atoms**2 * (4 / 3 * math.pi) * radius**3 / volume(crystals.lattice)
    for i in (~(expected < MOST_EDGES)).nonzero().flatten().tolist():
        raise ValueError(
            f"crystal {i}: {crystals.num_atoms[i]} atoms in {crystals.volume[i]:.3g} Å³ have about "
            f"{expected[i]:.1e} edges within {radius[i]:.3g} Å, want fewer than {MOST_EDGES:.0e}"
        )


Search = Callable[[Crystals, Tensor], Edges]


def _search(method: str | None, crystals: Crystals) -> Search:
    """The search that `method` names: crystals and their radii (B,) to edges."""
    name = method or ("torch" if crystals.frac_coords.is_cuda else "cpu")
    searches: dict[str, Search] = {"cpu": _search_cpu, "torch": _search_torch}
    if name not in searches:
        raise ValueError(f"method {method!r}, want one of {', '.join(searches)}")

    def run(some: Crystals, radius: Tensor) -> Edges:
        _refuse_crowded(some, radius)
        if len(some) == 0:
            return Edges(some.num_atoms.new_zeros(2, 0), some.num_atoms.new_zeros(0, 3))
        return searches[name](some, radius)

    return run


# ---- the k nearest ---------------------------------------------------------------------------------------


def _nearest(crystals: Crystals, edges: Edges, k: int, tie: float, radius: Tensor) -> tuple[Edges, Tensor]:
    """Of all edges within `radius` (B,) the k nearest of each atom and their ties, and whether the radius was
    wide enough for a crystal: (B,) bool."""
    distance, centre = edge_distances(crystals, edges), edges.index[0]
    order = distance.argsort()
    order = order[centre[order].argsort(stable=True)]  # by centre, then distance
    counts = torch.bincount(centre, minlength=len(crystals.batch))
    kth = counts.cumsum(0) - counts + k - 1
    enough = counts >= k
    reach = torch.full_like(crystals.frac_coords[:, 0], torch.inf)
    reach[enough] = distance[order[kth[enough]]] * (1 + tie)
    lacking = ~(reach < radius[crystals.batch])
    complete = torch.bincount(crystals.batch[lacking], minlength=len(crystals)) == 0
    keep = (distance <= reach[centre]) & complete[crystals.batch[centre]]
    return Edges(edges.index[:, keep], edges.image[keep]), complete


def _of_whole(edges: Edges, some: Crystals, which: Tensor, whole: Crystals, complete: Tensor) -> Edges:
    """Edges of `some` crystals, atoms counted as in the `whole` batch, `which` being the complete ones."""
    shift = some.num_atoms.new_zeros(len(some))
    shift[complete] = whole.ptr[which] - some.ptr[:-1][complete]
    return Edges(edges.index + shift[some.batch[edges.index[0]]], edges.image)


# ---- a compact description of the cells, common to both searches ----------------------------------------


@dataclass(frozen=True)
class _Compact:
    """The same crystals with atoms inside cells that are little skewed."""

    frac_coords: Tensor  # (A, 3) in [0, 1)
    lattice: Tensor  # (B, 3, 3) Å
    shift: Tensor  # (A, 3) int64: how many cells each atom was moved by
    transform: Tensor  # (B, 3, 3) int64: lattice = transform @ the given lattice

    def of(self, crystals: Crystals, start: int, stop: int) -> "_Compact":
        """Of crystals start to stop alone."""
        atoms = slice(int(crystals.ptr[start]), int(crystals.ptr[stop]))
        frac, shift = self.frac_coords[atoms], self.shift[atoms]
        return _Compact(frac, self.lattice[start:stop], shift, self.transform[start:stop])


def _compact(crystals: Crystals) -> _Compact:
    """Skewed cells to Niggli cells, atoms into the cell."""
    lengths = torch.linalg.vector_norm(crystals.lattice, dim=-1)
    skewed = (lengths.prod(-1) > SKEWED * crystals.volume).nonzero().flatten()
    transform = torch.eye(3, dtype=torch.int64, device=skewed.device).repeat(len(crystals), 1, 1)
    lattice, frac = crystals.lattice, crystals.frac_coords
    if len(skewed):
        transform[skewed] = niggli_reduce(lattice[skewed])[1]
        lattice = transform.double() @ lattice
        frac = torch.einsum("ai,aij->aj", frac, inverse_transform(transform).double()[crystals.batch])
    whole = frac.floor()
    return _Compact(frac - whole, lattice, whole.long(), transform)


# ---- on the CPU, a group of crystals at a time -----------------------------------------------------------


def _search_cpu(crystals: Crystals, radius: Tensor) -> Edges:
    """Each atom beside every image in reach of its cell: matrix products in float32 propose, and what lies as
    near to the cut-off as they may err is measured anew.

    Measured at 6 Å beside pymatgen's cell lists, in µs: 45 and 72 for 4 atoms, 135 and 174 for 20, 2200 and 2200
    for 300, 72,000 and 32,000 for 4000, the products growing with the square.
    """
    frac, lattice = crystals.frac_coords.cpu(), crystals.lattice.cpu()
    here = Crystals(frac, lattice, crystals.atomic_numbers.cpu(), crystals.num_atoms.cpu())  # .to() would wrap
    compact, reach = _compact(here), radius.cpu()
    expected = here.num_atoms * (1 + 2 * reach[:, None] / heights(compact.lattice)).prod(-1)
    turn = (expected.cumsum(0) / GROUP).floor()
    bounds = [0, *(turn.diff().nonzero().flatten() + 1).tolist(), len(here)]
    index, image = [], []
    for start, stop in itertools.pairwise(bounds):
        images = _images(here[start:stop], reach[start:stop], compact.of(here, start, stop))
        for edges in images.near():
            index.append(edges.index.add_(here.ptr[start]))
            image.append(edges.image)
    return Edges(torch.cat(index, 1).to(radius.device), torch.cat(image).to(radius.device))


@dataclass(frozen=True)
class _Images:
    """A atoms of some crystals, and all P images that spheres round them can reach.

    left[i] @ right[:, p] is the squared distance less the squared radius, if p is an image in i's crystal.
    """

    crystals: Crystals  # as given
    radius: Tensor  # (B,) Å
    left: np.ndarray  # (A, 5) float32: -2 x, -2 y, -2 z, x² + y² + z² - radius², 1
    right: np.ndarray  # (5, P) float32: x, y, z, 1, x² + y² + z²
    slack: float  # Å²: below it may be an edge, below its negative is one
    atom: np.ndarray  # (P,) int64: of which atom, rising
    image: np.ndarray  # (P, 3) int64: its translation in the given cell, rising for each atom
    shift: np.ndarray  # (A, 3) int64: translation of the atom itself, to be added
    own: np.ndarray  # (A,) int64: which images are the atoms themselves

    def near(self) -> Iterator[Edges]:
        """All edges, found from PRODUCTS or so at a time."""
        ptr = self.crystals.ptr.numpy()
        runs, size = [], 0
        for (start, stop), (low, high) in zip(_spans(ptr), _spans(np.searchsorted(self.atom, ptr)), strict=True):
            rows = max(1, PRODUCTS // (high - low))
            for row in range(start, stop, rows):
                runs.append((row, min(row + rows, stop), low, high))
                size += (runs[-1][1] - row) * (high - low)
                if size >= PRODUCTS:
                    yield self._near(runs)
                    runs, size = [], 0
        if runs:
            yield self._near(runs)

    def _near(self, runs: list[tuple[int, int, int, int]]) -> Edges:
        """Edges of atoms start to stop with images low to high, run after run without a gap."""
        start, stop, low, high = np.array(runs).T
        width = np.repeat(high - low, stop - start)  # of each row, which is an atom
        ends = np.cumsum(width)
        begin, first = ends - width, np.repeat(low, stop - start)
        square = self._squares(runs, ends[-1])
        near = square < self.slack
        near[begin + self.own[start[0] : stop[-1]] - first] = False
        found = np.flatnonzero(near)
        doubtful = np.flatnonzero(square[found] > -self.slack)
        row = np.searchsorted(begin, found[doubtful], side="right") - 1
        some = self._edges(start[0] + row, found[doubtful] - (begin - first)[row])
        outside = edge_distances(self.crystals, some) >= self.radius[self.crystals.batch[some.index[0]]]
        found = np.delete(found, doubtful[outside.numpy()])
        degree = np.diff(np.searchsorted(found, begin), append=len(found))
        return self._edges(np.repeat(np.arange(start[0], stop[-1]), degree), found - np.repeat(begin - first, degree))

    def _squares(self, runs: list[tuple[int, int, int, int]], size: int) -> np.ndarray:
        """Squared distances less the squared radius, atom after atom. -> (size,) float32 Å²."""
        square, done = np.empty(size, dtype=np.float32), 0
        for start, stop, low, high in runs:
            part = square[done : done + (stop - start) * (high - low)].reshape(stop - start, -1)
            np.matmul(self.left[start:stop], self.right[:, low:high], out=part)
            done += part.size
        return square

    def _edges(self, i: np.ndarray, p: np.ndarray) -> Edges:
        """From atoms i (E,) to images p (E,)."""
        image = np.take(self.image, p, axis=0)
        if self.shift.any():
            image += np.take(self.shift, i, axis=0)
        return Edges(torch.from_numpy(np.stack([i, self.atom[p]])), torch.from_numpy(image))


def _spans(ptr: np.ndarray) -> Iterator[tuple[int, int]]:
    return itertools.pairwise(ptr.tolist())


def _images(crystals: Crystals, radius: Tensor, compact: _Compact) -> _Images:
    """All images within radius (B,) of the box that holds the atoms of each cell."""
    frac, lattice, ptr = compact.frac_coords.numpy(), compact.lattice.numpy(), crystals.ptr.numpy()
    batch, reach = crystals.batch.numpy(), ((radius[:, None] + MARGIN) / heights(compact.lattice) + MARGIN).numpy()
    low = (np.minimum.reduceat(frac, ptr[:-1]) - reach)[batch] - frac
    high = (np.maximum.reduceat(frac, ptr[:-1]) + reach)[batch] - frac
    atom, moves = _between(np.ceil(low).astype(np.int64), np.floor(high).astype(np.int64))
    place = np.repeat(frac.T - 0.5, np.bincount(atom), axis=1) + moves  # from the middle of the cell
    right = np.ones((5, len(atom)))
    for cell, (start, stop) in zip(lattice, _spans(np.searchsorted(atom, ptr)), strict=True):
        np.matmul(cell.T, place[:, start:stop], out=right[:3, start:stop])
    np.einsum("ij,ij->j", right[:3], right[:3], out=right[4])
    shift, transform = compact.shift.numpy(), compact.transform.numpy()
    turned = (transform != np.eye(3, dtype=np.int64)).any((1, 2))[batch[atom]]
    if turned.any():
        some = np.flatnonzero(turned)
        given = np.einsum("ip,pij->jp", moves[:, some], transform[batch[atom[some]]])
        order = np.lexsort((*given[::-1], atom[some]))
        moves[:, some], right[:, some] = given[:, order], right[:, some[order]]
        shift = np.einsum("ai,aij->aj", shift, transform[batch])
    own = np.flatnonzero(~moves.any(0))
    if shift.any():
        moves = moves - shift.T[:, atom]
    left = np.column_stack([-2 * right[:3, own].T, right[4, own] - radius.numpy()[batch] ** 2, np.ones(len(own))])
    largest = float(radius.max())
    slack = 2 * MARGIN * largest + ROUNDING * (float(right[4].max()) + largest**2)
    sides = left.astype(np.float32), right.astype(np.float32)
    return _Images(crystals, radius, *sides, slack, atom, np.ascontiguousarray(moves.T), shift, own)


def _between(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All t with low <= t <= high of each atom, both (A, 3) int64, in order -> atom (P,), t (3, P) int64."""
    atom, table = np.arange(len(low)), np.empty((0, len(low)), dtype=np.int64)
    for axis in range(3):
        number = (high - low + 1)[atom, axis]
        ends = np.cumsum(number)
        move = np.repeat(low[atom, axis] - ends + number, number) + np.arange(ends[-1])
        atom, table = np.repeat(atom, number), np.vstack([np.repeat(table, number, axis=1), move])
    return atom, table


# ---- in torch, the whole batch at once -------------------------------------------------------------------


def _search_torch(crystals: Crystals, radius: Tensor) -> Edges:
    """Every pair of atoms times every translation that can be in reach, CHUNK of them at a time.

    With each coordinate of a step rounded into [-1/2, 1/2], a translation t can bring it within the radius
    only if |t_k| <= radius / height_k + 1/2. Candidates are listed in the order of the edges.
    """
    compact = _compact(crystals)
    reach = torch.floor((radius[:, None] + MARGIN) / heights(compact.lattice) + 0.5 + MARGIN).long()
    moves, first_move, num_moves = _translations(reach, compact.transform)
    total = crystals.num_atoms**2 * num_moves
    ends = total.cumsum(0)
    found = []
    for low in range(0, int(ends[-1]), CHUNK):
        flat = torch.arange(low, min(low + CHUNK, int(ends[-1])), device=ends.device)
        b = torch.searchsorted(ends, flat, right=True)
        rank = flat - (ends - total)[b]
        pair, move = rank // num_moves[b], rank % num_moves[b]
        i = crystals.ptr[b] + pair // crystals.num_atoms[b]
        j = crystals.ptr[b] + pair % crystals.num_atoms[b]
        whole = (compact.frac_coords[j] - compact.frac_coords[i]).round().long()
        image = moves[first_move[b] + move] - whole - compact.shift[j] + compact.shift[i]
        image = multiply(image.unsqueeze(-2), compact.transform[b]).squeeze(-2)
        edges = Edges(torch.stack([i, j]), image)
        near = edge_distances(crystals, edges) < radius[b]
        near &= (i != j) | (image != 0).any(-1)
        found.append(Edges(edges.index[:, near], image[near]))
    return Edges(torch.cat([part.index for part in found], 1), torch.cat([part.image for part in found]))


def _translations(reach: Tensor, transform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All t with |t_k| <= reach_k (B, 3), crystal after crystal -> (T, 3), first (B,), number (B,).

    In multiples of the compact vectors, ordered as t @ transform, the same in the given cell, is ordered.
    """
    width = 2 * reach + 1
    number = width.prod(-1)
    first = number.cumsum(0) - number
    b = torch.arange(len(reach), device=reach.device).repeat_interleave(number)
    rank = torch.arange(len(b), device=reach.device) - first[b]
    x = rank // (width[b, 1] * width[b, 2])
    moves = torch.stack([x, rank // width[b, 2] % width[b, 1], rank % width[b, 2]], 1) - reach[b]
    given = multiply(moves.unsqueeze(-2), transform[b]).squeeze(-2)
    order = torch.arange(len(b), device=reach.device)
    for key in (given[:, 2], given[:, 1], given[:, 0], b):
        order = order[key[order].argsort(stable=True)]
    return moves[order], first, number
