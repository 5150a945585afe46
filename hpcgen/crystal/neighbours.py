"""Periodic neighbours by radius and by count: every image, exact for any cell and any cut-off."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import heights, inverse_transform, multiply, niggli_reduce, refuse_flat, volume

MOST_EDGES = 100_000_000  # of one crystal, as expected from its density; more is a collapsed cell
MARGIN = 1e-6  # Å; the search goes this far beyond the cut-off, and what lies so near is measured anew
SKEWED = 4.0  # cells of a·b·c / volume above this are searched in their Niggli cell
TIE = 1e-3  # distances within this share of the k-th are ties: equal ones in coordinates of four digits
CHUNK = 1 << 20  # candidates that method "torch" measures at a time, about 200 bytes each


@dataclass(frozen=True, eq=False)
class Edges:
    """E directed edges i <- j of a batch: ‖r_i − (r_j + image @ lattice)‖, without i = j, image = 0."""

    index: Tensor  # (2, E) int64: centre i, neighbour j, counted through the batch; sorted by i, j, image
    image: Tensor  # (E, 3) int64 lattice translation of j


def radius_edges(crystals: Crystals, cutoff: float, method: str | None = None) -> Edges:
    """All edges of distance < `cutoff` Å, every image and self-images included; computed in float64.

    Measured as `edge_distances` does in float64, so a pair at the cut-off itself is out by the last bit, and
    an edge is there if and only if its reverse is.
    method: "cpu" (pymatgen's cell lists, crystal by crystal) or "torch" (the batch at once, on the device of
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


# ---- on the CPU, crystal by crystal ----------------------------------------------------------------------


def _search_cpu(crystals: Crystals, radius: Tensor) -> Edges:
    """pymatgen's cell lists for each crystal; then all edges of the batch, as packed integers, sorted.

    The cell lists only propose: what is within MARGIN of the cut-off is measured anew.
    """
    packing = _packing(crystals, radius)
    if packing is None:
        return _halves(crystals, radius)
    key, doubtful = _proposed(crystals, radius, packing)
    key.sort()
    measured = packing.edges(doubtful, crystals)
    outside = edge_distances(crystals, measured) >= radius[crystals.batch[measured.index[0]]]
    drop = np.concatenate([packing.itself(crystals), doubtful[outside.cpu().numpy()]])
    return packing.edges(np.delete(key, np.searchsorted(key, drop)), crystals)


def _proposed(crystals: Crystals, radius: Tensor, packing: "_Packing") -> tuple[np.ndarray, np.ndarray]:
    """Keys of all pairs up to MARGIN beyond `radius` (B,), each atom with itself among them, and of these the
    ones within MARGIN of it. -> (E,), (D,) int64."""
    from pymatgen.optimization.neighbors import find_points_in_spheres  # 60 ms, and not needed on a GPU

    compact = _compact(crystals)
    cart = torch.einsum("ai,aij->aj", compact.frac_coords, compact.lattice[crystals.batch])
    moved = (compact.transform != torch.eye(3, device=cart.device)).flatten(1).any(1)
    moved[crystals.batch[(compact.shift != 0).any(1)]] = True

    points, cells = cart.cpu().numpy(), np.ascontiguousarray(compact.lattice.cpu().numpy())
    shift, transform = compact.shift.cpu().numpy(), compact.transform.cpu().numpy().astype(np.float64)
    starts, is_moved, periodic = crystals.ptr.tolist(), moved.tolist(), np.ones(3, dtype=np.int64)
    weights = packing.weights()
    keys, doubtful = [], [np.empty(0, dtype=np.int64)]
    for b, reach in enumerate(radius.tolist()):
        start, end = starts[b], starts[b + 1]
        xyz = points[start:end]
        key, j, image, distance = find_points_in_spheres(xyz, xyz, reach + MARGIN, periodic, cells[b])
        if is_moved[b]:
            image = (image - shift[start:end][j] + shift[start:end][key]) @ transform[b]
        key += start  # in place, since most of the time here goes by in small arrays
        key <<= packing.neighbour
        key += j
        key <<= 3 * packing.image
        key += (image @ weights).astype(np.int64)
        keys.append(key)
        far = distance > reach - MARGIN
        if far.any():
            doubtful.append(key[far])
    return np.concatenate(keys) + packing.zero, np.concatenate(doubtful) + packing.zero


def _halves(crystals: Crystals, radius: Tensor) -> Edges:
    """The edges of both halves of a batch that is too large, or too skewed, to be packed together.

    A single crystal so skewed goes to the search in torch, which needs no packing.
    """
    half = len(crystals) // 2
    if half == 0:
        return _search_torch(crystals, radius)
    first = _search_cpu(crystals[:half], radius[:half])
    second = _search_cpu(crystals[half:], radius[half:])
    index = torch.cat([first.index, second.index + crystals.ptr[half]], 1)
    return Edges(index, torch.cat([first.image, second.image]))


@dataclass(frozen=True)
class _Packing:
    """An edge as one integer that sorts like (i, j, image): bits of j in its crystal and of each image."""

    neighbour: int
    image: int

    @property
    def zero(self) -> int:
        """What makes images count from 0."""
        return sum(1 << (axis * self.image + self.image - 1) for axis in range(3))

    def weights(self) -> np.ndarray:
        """(3,) float64, exact for whole numbers below 2^53."""
        return np.array([float(1 << (axis * self.image)) for axis in (2, 1, 0)])

    def itself(self, crystals: Crystals) -> np.ndarray:
        """Keys of all atoms with their own image 0. (A,) int64."""
        i = torch.arange(len(crystals.batch), device=crystals.batch.device)
        j = i - crystals.ptr[crystals.batch]
        return ((((i << self.neighbour) + j) << (3 * self.image)) + self.zero).cpu().numpy()

    def edges(self, keys: np.ndarray, crystals: Crystals) -> Edges:
        """(E,) int64 -> edges on the device of the crystals."""
        image = np.empty((len(keys), 3), dtype=np.int64)
        for axis in range(3):
            np.right_shift(keys, (2 - axis) * self.image, out=image[:, axis])
        image &= (1 << self.image) - 1
        image -= 1 << (self.image - 1)
        index = np.empty((2, len(keys)), dtype=np.int64)
        pair = keys >> (3 * self.image)
        np.right_shift(pair, self.neighbour, out=index[0])
        np.bitwise_and(pair, (1 << self.neighbour) - 1, out=index[1])
        index[1] += crystals.ptr[crystals.batch].cpu().numpy()[index[0]]
        device = crystals.ptr.device
        return Edges(torch.from_numpy(index).to(device), torch.from_numpy(image).to(device))


def _packing(crystals: Crystals, radius: Tensor) -> _Packing | None:
    """Bits that hold every edge of the batch, or None if 63 are too few."""
    spread = crystals.frac_coords.amax(0) - crystals.frac_coords.amin(0)
    reach = ((radius[:, None] + 1.0) / heights(crystals.lattice) + spread).amax()
    if not reach < 2**16:
        return None
    neighbour = int(crystals.num_atoms.max()).bit_length()
    image = int(reach.item() + 2).bit_length() + 1
    if len(crystals.batch).bit_length() + neighbour + 3 * image > 62:
        return None
    return _Packing(neighbour, image)


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
