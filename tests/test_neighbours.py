"""Neighbours by radius and by count: the contract of edges, laws, both searches alike, refusals."""

import numpy as np
import pytest
import torch
from known_crystals import (
    cell,
    crystal,
    in_other_cell,
    random_cells,
    random_crystals,
    random_transforms,
    relabelled,
    rotated,
    special,
    supercell,
    translated,
)

import hpcgen.crystal.neighbours as neighbours
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_from_parameters, niggli_reduce
from hpcgen.crystal.neighbours import Edges, edge_distances, edge_vectors, nearest_edges, radius_edges

SPECIAL = special()
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
METHODS = ["cpu", "torch"]


def rows(edges: Edges) -> list[list[int]]:
    """Each edge as [i, j, image]."""
    return torch.cat([edges.index.T, edges.image], 1).tolist()


def same(one: Edges, other: Edges) -> bool:
    return torch.equal(one.index, other.index) and torch.equal(one.image, other.image)


def brute_force(crystals: Crystals, cutoff: float, reach: int) -> list[list[int]]:
    """[i, j, image] of one crystal from all images up to `reach`, measured as edge_distances does."""
    atoms, images = torch.arange(len(crystals.frac_coords)), torch.arange(-reach, reach + 1)
    every = torch.cartesian_prod(atoms, atoms, images, images, images)  # in the order of edges
    every = every[(every[:, 0] != every[:, 1]) | (every[:, 2:] != 0).any(1)]
    edges = Edges(every[:, :2].T, every[:, 2:])
    return every[edge_distances(crystals, edges) < cutoff].tolist()


# ---- the contract of Edges -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECIAL)
def test_equal_to_brute_force_and_sorted(name, method):
    reduced = niggli_reduce(SPECIAL[name].lattice)[0]
    crystals = Crystals(SPECIAL[name].frac_coords, reduced, SPECIAL[name].atomic_numbers, SPECIAL[name].num_atoms)
    cutoff = 4.1 if name == "sixty" else 6.0
    found = radius_edges(crystals, cutoff, method)
    assert rows(found) == brute_force(crystals, cutoff, 4)
    assert found.index.dtype == found.image.dtype == torch.int64
    assert (edge_distances(crystals, found) < cutoff).all()


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("cutoff", [0.3, 3.0, 7.3, 12.0])
def test_both_searches_alike(name, cutoff):
    found = radius_edges(SPECIAL[name], cutoff, "cpu")
    assert same(found, radius_edges(SPECIAL[name], cutoff, "torch"))
    assert rows(found) == sorted(rows(found))


def test_coordination_of_known_crystals():
    counts = {
        "NaCl": (2.83, 6),
        "fcc": (2.57, 12),
        "diamond": (1.55, 4),
        "hcp": (3.21, 12),
        "one atom": (3.01, 6),
    }
    for name, (cutoff, neighbours_each) in counts.items():
        edges = radius_edges(SPECIAL[name], cutoff)
        assert (edges.index[0].bincount() == neighbours_each).all(), name


@pytest.mark.parametrize("method", METHODS)
def test_the_cutoff_itself_is_out(method):
    simple = crystal(torch.eye(3, dtype=torch.float64) * 3, [[0.25, 0.5, 0]], [84])
    assert len(radius_edges(simple, 3.0, method).image) == 0
    assert len(radius_edges(simple, float(np.nextafter(3.0, 4.0)), method).image) == 6
    assert len(radius_edges(simple, 9.0, method).image) == len(radius_edges(simple, 9.0 - 1e-9, method).image)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECIAL)
def test_every_edge_has_its_reverse_also_at_ties_with_the_cutoff(name, method):
    first = radius_edges(SPECIAL[name], 5.0)
    for tie in edge_distances(SPECIAL[name], first).unique()[:40:4].tolist():
        edges = radius_edges(SPECIAL[name], tie, method)
        reverse = Edges(edges.index.flip(0), -edges.image)
        assert sorted(rows(reverse)) == rows(edges)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_crystals_side_by_side(method):
    batch = Crystals.cat(list(SPECIAL.values()))
    for found, search in (
        (radius_edges(batch, 4.5, method), lambda single: radius_edges(single, 4.5, method)),
        (nearest_edges(batch, 9, method), lambda single: nearest_edges(single, 9, method)),
    ):
        parts = [search(single) for single in SPECIAL.values()]
        index = torch.cat([part.index + first for part, first in zip(parts, batch.ptr, strict=False)], 1)
        assert same(found, Edges(index, torch.cat([part.image for part in parts])))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_gives_nothing(method):
    nobody = SPECIAL["fcc"][:0]
    assert radius_edges(nobody, 6.0, method).index.shape == nearest_edges(nobody, 3, method).index.shape == (2, 0)
    assert radius_edges(SPECIAL["fcc"], 0.5, method).image.shape == (0, 3)


@pytest.mark.parametrize("method", METHODS)
def test_atoms_in_one_place_are_neighbours(method):
    twin = crystal(cell(4, 4, 4), [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]], [1, 1])
    assert rows(radius_edges(twin, 1.0, method)) == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert rows(nearest_edges(twin, 1, method)) == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize("method", METHODS)
def test_float32_is_searched_in_float64(method):
    single = SPECIAL["skewed"].to(dtype=torch.float32)
    assert same(radius_edges(single, 6.0, method), radius_edges(single.to(dtype=torch.float64), 6.0, method))


@pytest.mark.parametrize("method", METHODS)
def test_atoms_on_the_edge_of_the_cell(method):
    hair = 1 - 2.0**-53
    sites = torch.tensor([[0, 0, 0], [hair, 0.5, 0], [0.5, hair, hair], [1e-17, 0.25, 1e-300]]).double()
    crystals = crystal(cell(4, 5, 6, 80, 95, 110), [[0, 0, 0]] * 4, [1] * 4)
    crystals = Crystals(sites.clamp(max=hair), crystals.lattice, crystals.atomic_numbers, crystals.num_atoms)
    assert rows(radius_edges(crystals, 6.0, method)) == brute_force(crystals, 6.0, 4)


def extreme_cells() -> torch.Tensor:
    """Angles from 15° to 165° and sides of ratio 20. -> (B, 3, 3)."""
    generator = torch.Generator().manual_seed(11)
    angles = 15 + 150 * torch.rand(4000, 3, generator=generator, dtype=torch.float64)
    sides = torch.tensor([[2.0, 40, 9], [40, 3, 3], [5, 100, 5], [4, 4, 80]], dtype=torch.float64)
    real = (angles.sum(-1) < 350) & (2 * angles.amax(-1) < angles.sum(-1) - 5)
    angles = angles[real][:40]
    return lattice_from_parameters(sides.repeat(10, 1), angles)


def test_extreme_cells_alike_in_both_searches_and_in_niggli_cells():
    crystals = random_crystals(extreme_cells(), seed=12, most=3)
    for cutoff in (3.0, 6.0, 12.0):
        found = radius_edges(crystals, cutoff)
        assert same(found, radius_edges(crystals, cutoff, "torch"))
    flat = in_other_cell(crystals, niggli_reduce(crystals.lattice)[1])
    assert torch.equal(radius_edges(flat, 6.0).index, radius_edges(crystals, 6.0).index)


# ---- laws ------------------------------------------------------------------------------------------------


def environments(search, crystals: Crystals) -> torch.Tensor:
    """What each atom sees, as a number that no law may change. -> (A,)."""
    edges = search(crystals)
    i, j = edges.index
    seen = (1 + crystals.atomic_numbers[j]) * torch.exp(-edge_distances(crystals, edges) / 2)
    return torch.zeros(len(crystals.frac_coords), dtype=torch.float64).index_add(0, i, seen)


def by_radius(crystals):
    return radius_edges(crystals, 5.0)


def by_radius_in_torch(crystals):
    return radius_edges(crystals, 5.0, "torch")


def by_count(crystals):
    return nearest_edges(crystals, 8)


def broken_minimum_image_only(crystals):
    """One image of each pair: sees less in a small cell than in a supercell."""
    edges = radius_edges(crystals, 5.0)
    keep = (edges.image.abs() <= 1).all(1)
    _, first = np.unique(edges.index[:, keep].T.numpy(), axis=0, return_index=True)
    return Edges(edges.index[:, keep][:, first], edges.image[keep][first])


def broken_exactly_k(crystals):
    """k neighbours and no more: which of tied ones are kept hangs on the order of atoms."""
    edges = nearest_edges(crystals, 8)
    rank = torch.cat([torch.arange(n) for n in edges.index[0].bincount().tolist()])
    return Edges(edges.index[:, rank < 8], edges.image[rank < 8])


def broken_cartesian_box(crystals):
    """A box around the atom in place of a sphere."""
    edges = radius_edges(crystals, 8.0)
    keep = (edge_vectors(crystals, edges).abs() < 4.0).all(1)
    return Edges(edges.index[:, keep], edges.image[keep])


def broken_nearest_cells_only(crystals):
    """Images -1, 0 and 1, as one finds it in much published code: blind in a skewed cell."""
    edges = radius_edges(crystals, 5.0)
    keep = (edges.image.abs() <= 1).all(1)
    return Edges(edges.index[:, keep], edges.image[keep])


def broken_without_wrap(crystals):
    """No periodicity."""
    edges = radius_edges(crystals, 5.0)
    keep = (edges.image == 0).all(1)
    return Edges(edges.index[:, keep], edges.image[keep])


def holds_translation(search, crystals):
    moved = translated(crystals, [0.313, 0.777, -0.456])
    return close(environments(search, moved), environments(search, crystals))


def holds_rotation(search, crystals):
    return close(environments(search, rotated(crystals)), environments(search, crystals))


def holds_relabelling(search, crystals):
    order = torch.randperm(len(crystals.frac_coords), generator=torch.Generator().manual_seed(3))
    return close(environments(search, relabelled(crystals, order)), environments(search, crystals)[order])


def holds_choice_of_cell(search, crystals):
    transform = random_transforms(5, torch.Generator().manual_seed(4))
    seen = environments(search, crystals)
    return all(close(environments(search, in_other_cell(crystals, one[None])), seen) for one in transform)


def holds_supercell(search, crystals):
    copies = environments(search, supercell(crystals, (2, 1, 3)))
    return close(copies, environments(search, crystals).repeat_interleave(6))


def close(one, other):
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


LAWS = {
    "translation": (holds_translation, broken_without_wrap),
    "rotation": (holds_rotation, broken_cartesian_box),
    "relabelling": (holds_relabelling, broken_exactly_k),
    "choice of cell": (holds_choice_of_cell, broken_nearest_cells_only),
    "supercell": (holds_supercell, broken_minimum_image_only),
}


@pytest.mark.parametrize("search", [by_radius, by_radius_in_torch, by_count])
@pytest.mark.parametrize("law", LAWS)
def test_laws(law, search):
    holds, _ = LAWS[law]
    for name, crystals in SPECIAL.items():
        assert holds(search, crystals), name


@pytest.mark.parametrize("law", LAWS)
def test_each_law_is_able_to_fail(law):
    holds, broken = LAWS[law]
    assert not all(holds(broken, crystals) for crystals in SPECIAL.values())


# ---- the k nearest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("k", [1, 12, 40])
def test_nearest_are_those_within_the_kth_distance(name, k, method):
    crystals = SPECIAL[name]
    found, wide = nearest_edges(crystals, k, method), radius_edges(crystals, 16.0)
    distance = edge_distances(crystals, wide)
    expected = []
    for atom in range(len(crystals.frac_coords)):
        own = wide.index[0] == atom
        kth = distance[own].sort().values[k - 1]
        keep = distance[own] <= kth * (1 + neighbours.TIE)
        expected += [
            [atom, j, *t]
            for j, t in zip(wide.index[1, own][keep].tolist(), wide.image[own][keep].tolist(), strict=True)
        ]
    assert rows(found) == expected


def test_ties_are_all_kept():
    for name, k, shells in [
        ("fcc", 5, 12),
        ("fcc", 13, 18),
        ("NaCl", 1, 6),
        ("diamond", 5, 16),
        ("hcp", 2, 12),
    ]:
        edges = nearest_edges(SPECIAL[name], k, tie=0.05 if name == "hcp" else neighbours.TIE)
        assert (edges.index[0].bincount() == shells).all(), name


def test_a_lone_pair_in_a_long_cell_is_found_after_widening():
    long = crystal(cell(60, 60, 60), [[0, 0, 0], [0.02, 0, 0]], [1, 1])
    assert rows(nearest_edges(long, 1)) == [[0, 1, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert (nearest_edges(long, 3).index[0].bincount() >= 3).all()


# ---- vectors, distances, gradients -----------------------------------------------------------------------


def test_vectors_lead_from_centre_to_neighbour():
    two = crystal(cell(10, 10, 10), [[0, 0, 0], [0.1, 0.2, 0.0]], [1, 2])
    edges = Edges(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 0, -1], [0, 0, 1]]))
    expected = torch.tensor([[1.0, 2, -10], [-1, -2, 10]], dtype=torch.float64)
    assert torch.allclose(edge_vectors(two, edges), expected)
    assert torch.allclose(edge_distances(two, edges), expected.norm(dim=1))


def test_gradients():
    crystals = SPECIAL["skewed"]
    edges = radius_edges(crystals, 3.0)

    def measure(function):
        return lambda frac, lattice: function(
            Crystals(frac, lattice, crystals.atomic_numbers, crystals.num_atoms), edges
        )

    inputs = crystals.frac_coords.clone().requires_grad_(), crystals.lattice.clone().requires_grad_()
    assert torch.autograd.gradcheck(measure(edge_vectors), inputs)
    assert torch.autograd.gradcheck(measure(edge_distances), inputs)


def test_gradient_of_a_length_of_zero_is_zero_and_nan_is_not_hidden():
    frac = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    twin = Crystals(frac, torch.eye(3, dtype=torch.float64)[None], torch.ones(2).long(), torch.tensor([2]))
    edges = Edges(torch.tensor([[0], [1]]), torch.zeros(1, 3, dtype=torch.int64))
    distance = edge_distances(twin, edges)
    assert distance.item() == 0
    assert torch.equal(torch.autograd.grad(distance.sum(), frac)[0], torch.zeros(2, 3).double())
    broken = Crystals(torch.full_like(frac, torch.nan), twin.lattice, twin.atomic_numbers, twin.num_atoms)
    assert edge_distances(broken, edges).isnan().all()


# ---- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cutoff", [0, -1.0, float("nan"), float("inf")])
def test_a_bad_cutoff_is_refused(cutoff):
    with pytest.raises(ValueError, match=rf"cutoff {cutoff}.* want a positive finite"):
        radius_edges(SPECIAL["fcc"], cutoff)


@pytest.mark.parametrize("k", [0, -3, 2.5, True, np.int64(0), "3"])
def test_a_bad_count_is_refused(k):
    with pytest.raises(ValueError, match="want a positive whole number"):
        nearest_edges(SPECIAL["fcc"], k)


def test_a_count_of_any_integer_type_is_taken():
    for k in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert same(nearest_edges(SPECIAL["hcp"], k), nearest_edges(SPECIAL["hcp"], 3))


def test_a_cell_of_astronomic_size_is_named():
    huge = Crystals.cat([special()["NaCl"], crystal(torch.eye(3, dtype=torch.float64) * 1e19, [[0, 0, 0]], [1])])
    with pytest.raises(ValueError, match="crystal 1: lattice .* want components below 1e"):
        radius_edges(huge, 6.0)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="want one of cpu, torch"):
        radius_edges(SPECIAL["fcc"], 3.0, "kd-tree")
    with pytest.raises(ValueError, match="want a share"):
        nearest_edges(SPECIAL["fcc"], 3, tie=-0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_crystal_that_is_not_finite_is_named(bad):
    batch = Crystals.cat([SPECIAL["fcc"], SPECIAL["NaCl"], SPECIAL["hcp"]])
    frac, lattice = batch.frac_coords.clone(), batch.lattice.clone()
    frac[5, 1] = bad
    with pytest.raises(ValueError, match="crystal 1: fractional coordinates .* atom 4"):
        radius_edges(Crystals(frac, batch.lattice, batch.atomic_numbers, batch.num_atoms), 3.0)
    lattice[2, 0, 0] = bad
    with pytest.raises(ValueError, match="crystal 2: lattice"):
        nearest_edges(Crystals(batch.frac_coords, lattice, batch.atomic_numbers, batch.num_atoms), 3)


def test_a_collapsed_cell_is_named_and_not_searched():
    batch = Crystals.cat([SPECIAL["fcc"], crystal(cell(1e-3, 1e-3, 1e-3), [[0, 0, 0]], [1])])
    for method in METHODS:
        with pytest.raises(ValueError, match="crystal 1: 1 atoms in 1e-09 Å³ .* fewer than 1e"):
            radius_edges(batch, 6.0, method)


@pytest.mark.parametrize(("group", "products"), [(1, 1), (1 << 20, 1), (1, 1 << 20), (3000, 20_000)])
def test_edges_do_not_depend_on_how_the_search_is_divided(group, products, monkeypatch):
    batch = Crystals.cat([random_crystals(random_cells(6, seed=5), seed=6), SPECIAL["sixty"], SPECIAL["skewed"]])
    expected = radius_edges(batch, 5.0, "torch")
    monkeypatch.setattr(neighbours, "GROUP", group)
    monkeypatch.setattr(neighbours, "PRODUCTS", products)
    assert same(radius_edges(batch, 5.0, "cpu"), expected)


def needle(length: float) -> Crystals:
    """64 pairs of about 3 Å in a cell so long that float32 blurs what is left of their coordinates' squares."""
    along = torch.arange(0, 1, 1 / 64, dtype=torch.float64)
    apart = torch.linspace(2.999, 3.001, 64, dtype=torch.float64) / 3.7
    apart[32] = 3.0 / 3.7
    ones, others = torch.stack([0 * along, 0 * along, along], 1), torch.stack([apart, 0 * along, along], 1)
    return crystal(cell(3.7, 3.6, length), torch.cat([ones, others]).tolist(), [1] * 128)


@pytest.mark.parametrize("length", [300.0, 1e4, 1e6])
def test_rounding_of_the_products_decides_nothing(length):
    assert same(radius_edges(needle(length), 3.0, "cpu"), radius_edges(needle(length), 3.0, "torch"))


def test_rounding_of_the_products_would_decide_if_not_allowed_for(monkeypatch):
    monkeypatch.setattr(neighbours, "ROUNDING", 0.0)
    assert not same(radius_edges(needle(1e4), 3.0, "cpu"), radius_edges(needle(1e4), 3.0, "torch"))


@pytest.mark.parametrize("shear", [100_000, 1_000_003])
def test_cells_of_extreme_shear(shear):
    upright = crystal(cell(4, 4, 4), [[0, 0, 0], [0.4, 0.7, 0.1]], [1, 2])
    transform = torch.tensor([[[1, 0, 0], [shear, 1, 0], [0, -3, 1]]])
    sheared = in_other_cell(upright, transform)
    batch = Crystals.cat([SPECIAL["fcc"], sheared, SPECIAL["NaCl"]])
    found = radius_edges(batch, 6.0, "cpu")
    assert same(found, radius_edges(batch, 6.0, "torch"))
    distance = edge_distances(batch, found)[batch.batch[found.index[0]] == 1]
    expected = edge_distances(upright, radius_edges(upright, 6.0))
    assert torch.allclose(distance.sort().values, expected.sort().values, atol=1e-4)
    assert len(nearest_edges(sheared, 6, "cpu").image) == len(nearest_edges(upright, 6).image)


def test_a_lone_atom_in_a_sheared_cubic_cell():
    lattice = torch.tensor([[4.0, 0, 0], [4e5, 4, 0], [0, 0, 4]], dtype=torch.float64)
    assert len(radius_edges(crystal(lattice, [[0, 0, 0]], [1]), 6.0, "cpu").image) == 18  # 6 at 4 Å, 12 at 5.66


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("cutoff", [3.0, 6.0, 12.0])
def test_cuda_equals_cpu(cutoff):
    extreme = random_crystals(extreme_cells(), seed=12, most=3)
    batch = Crystals.cat([*SPECIAL.values(), extreme])
    for here, there in (
        (radius_edges(batch, cutoff), radius_edges(batch.to("cuda"), cutoff)),
        (nearest_edges(batch, 12), nearest_edges(batch.to("cuda"), 12)),
    ):
        assert there.index.is_cuda and there.image.is_cuda
        assert same(here, Edges(there.index.cpu(), there.image.cpu()))
