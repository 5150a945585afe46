"""The one crystal type: batches, selections, conversions."""

import numpy as np
import pytest
import torch
from known_crystals import special

from hpcgen.crystal.crystals import Crystals


@pytest.fixture
def batch() -> Crystals:
    return Crystals.cat(list(special().values()))


def equal(one: Crystals, other: Crystals) -> bool:
    names = ("frac_coords", "lattice", "atomic_numbers", "num_atoms")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_a_batch_holds_its_crystals_in_order(batch):
    assert len(batch) == len(special())
    for i, single in enumerate(special().values()):
        assert equal(batch[i], single)
        assert equal(batch[i - len(batch)], single)


def test_ptr_and_batch_agree(batch):
    assert batch.ptr[0] == 0 and batch.ptr[-1] == len(batch.frac_coords)
    assert torch.equal(batch.batch.bincount(), batch.num_atoms)
    assert (batch.batch[batch.ptr[:-1]] == torch.arange(len(batch))).all()


@pytest.mark.parametrize(
    "which",
    [slice(1, 4), [4, 0, 0], torch.tensor([2, 1]), torch.arange(7) % 2 == 0, slice(0, 0)],
    ids=["slice", "list with a repeat", "indices", "mask", "nothing"],
)
def test_selection_is_that_of_a_list(batch, which):
    index = torch.arange(len(batch))[which].tolist()
    chosen = batch[which]
    assert len(chosen) == len(index)
    assert len(chosen.batch) == len(chosen.frac_coords) == int(batch.num_atoms[index].sum())
    for place, i in enumerate(index):
        assert equal(chosen[place], batch[i])


@pytest.mark.parametrize("index", [np.int64(2), torch.tensor(2), np.array(2), np.int32(-5)], ids=repr)
def test_an_index_of_any_integer_type_is_a_batch_of_one(batch, index):
    chosen = batch[index]
    assert chosen.lattice.shape == (1, 3, 3) and len(chosen) == 1
    assert equal(chosen, batch[2])


def test_a_crystal_out_of_range_is_an_error(batch):
    with pytest.raises(IndexError, match="crystal 7 of 7"):
        batch[7]
    with pytest.raises(IndexError, match="crystal -8 of 7"):
        batch[-8]


def test_cartesian_coordinates_and_volume():
    salt = special()["NaCl"]
    assert torch.allclose(salt.cart_coords, salt.frac_coords * 5.64)
    assert torch.allclose(salt.volume, torch.tensor([5.64**3], dtype=torch.float64))
    left_handed = Crystals(salt.frac_coords, -salt.lattice, salt.atomic_numbers, salt.num_atoms)
    assert torch.allclose(left_handed.volume, salt.volume)


def test_rounding_to_one_becomes_zero(batch):
    near_one = torch.full_like(batch.frac_coords, 1 - 1e-12)
    single = Crystals(near_one, batch.lattice, batch.atomic_numbers, batch.num_atoms).to(dtype=torch.float32)
    assert single.frac_coords.dtype == single.lattice.dtype == torch.float32
    assert single.frac_coords.max() == 0
    assert single.atomic_numbers.dtype == torch.int64


def test_a_crystal_cannot_be_changed(batch):
    with pytest.raises(AttributeError):
        batch.lattice = batch.lattice * 2
