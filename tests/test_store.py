"""Stores: what is written is read, exactly; what may not be stored is refused."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from store_rows import HEAD, RADIUS, SPECS, a_store, crystals, everything, read, rows, same

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.neighbours import Edges, radius_edges
from hpcgen.errors import InputError, UsageError
from hpcgen.store.inspect import check
from hpcgen.store.layout import EdgeSettings, Head, read_manifest, shard_info, write_manifest
from hpcgen.store.read import Store
from hpcgen.store.rows import Column, ColumnSpec, Rows
from hpcgen.store.write import StoreWriter, write_shard, write_store, write_whole_shard

store = a_store
NEAREST_BELOW_ONE = float(np.nextafter(1.0, 0.0))


# round trips


@pytest.mark.parametrize("n", [1, 2, 40])
@pytest.mark.parametrize("edges", [False, True])
def test_what_is_written_is_read(tmp_path: Path, n: int, edges: bool) -> None:
    wanted = rows(n, seed=n, edges=edges)
    head = dataclasses.replace(HEAD, edges=RADIUS if edges else None)
    write_store(tmp_path, head, [("all", wanted)], shard_rows=16)
    found = read(tmp_path, edges=edges)
    assert same(found.rows(range(n)), wanted)
    assert same(found[n - 1], found.rows([n - 1]))
    blocks = list(found.iter_rows(7))
    assert [id for block in blocks for id in block.ids] == list(wanted.ids) == found.ids
    assert check(tmp_path) == []


def test_the_comparison_is_able_to_fail() -> None:
    wanted = rows(4, edges=True)
    for change in (
        {"crystals": dataclasses.replace(wanted.crystals, frac_coords=wanted.crystals.frac_coords * 0.999)},
        {"ids": [*wanted.ids[:3], "x"]},
        {"columns": rows(4, 9).columns},
        {"edges": Edges(wanted.edges.index, wanted.edges.image + 1)},  # type: ignore[union-attr]
    ):
        assert not same(dataclasses.replace(wanted, **change), wanted)  # type: ignore[arg-type]


def test_float32_comes_back_bit_for_bit(tmp_path: Path) -> None:
    given = dataclasses.replace(rows(9), crystals=crystals(9).to(dtype=torch.float32))
    write_store(tmp_path, HEAD, [("all", given)])
    assert everything(tmp_path).crystals.frac_coords.dtype == torch.float32
    assert same(everything(tmp_path), given)


def test_reading_as_float32_keeps_coordinates_below_one_and_edges_true(tmp_path: Path) -> None:
    """float32 of 1 - 1e-16 is 1.0, which becomes 0: the neighbour is then one cell further."""
    frac = torch.tensor([[NEAREST_BELOW_ONE, 0.2, NEAREST_BELOW_ONE], [0.1, NEAREST_BELOW_ONE, 0.6]]).double()
    frac[0, 0] = frac[0, 2] = frac[1, 1] = NEAREST_BELOW_ONE
    cell = torch.tensor([[[3.0, 0, 0], [0.4, 3.3, 0], [0.1, 0.2, 3.7]]]).double()
    some = Crystals(frac, cell, torch.tensor([11, 17]), torch.tensor([2]))
    given = Rows(some, ["tie"], {}, radius_edges(some, 4.0))
    write_store(tmp_path, Head("test", edges=RADIUS), [("all", given)])
    found = Store(tmp_path, edges=RADIUS)[0]
    assert found.edges is not None and given.edges is not None
    assert (found.crystals.frac_coords < 1).all() and (found.crystals.frac_coords == 0).sum() == 3

    def lengths(of: Crystals, edges: Edges) -> torch.Tensor:
        cart, (i, j) = of.frac_coords.double() @ of.lattice[0].double(), edges.index
        return (cart[i] - cart[j] - edges.image.double() @ of.lattice[0].double()).norm(dim=1)

    assert torch.allclose(lengths(found.crystals, found.edges), lengths(some, given.edges), atol=1e-5)
    assert not torch.allclose(lengths(found.crystals, given.edges), lengths(some, given.edges), atol=1e-5)


@pytest.mark.parametrize("image", [3, 200, 40000])
def test_edges_of_any_reach_and_large_crystals(tmp_path: Path, image: int) -> None:
    some = crystals(1, largest=1)
    big = Crystals(torch.rand(70000, 3).double(), some.lattice, torch.full((70000,), 6), torch.tensor([70000]))
    edges = Edges(torch.tensor([[0, 0, 69999], [1, 69999, 65600]]), torch.tensor([[image, 0, -image]] * 3))
    write_store(tmp_path, Head("test", edges=EdgeSettings("nearest", k=2)), [("all", Rows(big, ["b"], {}, edges))])
    found = read(tmp_path, edges=True)[0].edges
    assert found is not None
    assert torch.equal(found.index, edges.index) and torch.equal(found.image, edges.image)


def test_an_empty_shard_lies_among_others(tmp_path: Path) -> None:
    shards = [
        write_whole_shard(tmp_path, rows(n, first=first), HEAD, split="all", number=number)
        for number, (n, first) in enumerate([(0, 0), (3, 0), (0, 0), (2, 3)])
    ]
    write_manifest(tmp_path, HEAD, shards)
    assert [shard.crystals for shard in shards] == [0, 3, 0, 2]
    assert len(everything(tmp_path)) == 5
    assert check(tmp_path) == []


def test_random_access_in_any_order_with_repeats(store: Path) -> None:
    all_rows = everything(store)
    some = read(store)
    which = [54, 0, 19, 20, 20, 49, 3]
    found = some.rows(which)
    assert list(found.ids) == [all_rows.ids[k] for k in which]
    assert torch.equal(found.crystals.frac_coords, all_rows.crystals[which].frac_coords)
    for k in which:
        assert same(some[k], some.rows([k]))
    assert same(some[-1], some[54])
    assert len(some.rows([])) == 0
    for wrong in (55, -56):
        with pytest.raises(IndexError):
            some[wrong]
    with pytest.raises(IndexError):
        some.rows([0, 55])


def test_a_small_cache_changes_nothing(store: Path) -> None:
    some = read(store, cache_bytes=1)
    assert same(some.rows(range(55)), everything(store))
    assert len(some._blocks) == 1


def test_what_is_read_may_be_changed_without_harm(store: Path) -> None:
    some = read(store)
    for taken in (some[3], some.rows([3])):
        taken.crystals.frac_coords.zero_()
        taken.crystals.lattice.zero_()
        taken.columns["spacegroup"].values[:] = 0
    assert same(some[3], read(store)[3])


def test_splits_sizes_columns_and_ids(store: Path) -> None:
    train, val = read(store, split="train"), read(store, split="val", columns=["band_gap"])
    assert (len(train), len(val)) == (50, 5)
    assert val.ids == [f"mp-{k}-é" for k in range(90, 95)]
    assert list(val[0].columns) == ["band_gap"]
    wanted = torch.cat([crystals(33).num_atoms, crystals(17, 1).num_atoms])
    assert train.sizes().atoms.tolist() == wanted.tolist() and train.sizes().edges is None
    gaps = train.column("band_gap")
    assert gaps.spec == SPECS["band_gap"] and np.array_equal(np.isnan(gaps.values), gaps.missing)
    with pytest.raises(InputError, match="'test'.*train, val"):
        read(store, split="test")
    with pytest.raises(InputError, match="no column 'gap'.*band_gap"):
        read(store, columns=["gap"])


def test_sizes_count_edges_without_reading_coordinates(tmp_path: Path) -> None:
    given = rows(30, edges=True)
    write_store(tmp_path, dataclasses.replace(HEAD, edges=RADIUS), [("all", given)], shard_rows=8)
    assert given.edges is not None
    wanted = torch.bincount(given.crystals.batch[given.edges.index[0]], minlength=30)
    sizes = read(tmp_path, edges=True).sizes()
    assert sizes.edges is not None and sizes.edges.tolist() == wanted.tolist()


def test_a_column_that_rows_lack_is_missing(tmp_path: Path) -> None:
    write_store(tmp_path, HEAD, [("all", dataclasses.replace(rows(3), columns={}))])
    found = everything(tmp_path).columns
    assert set(found) == set(SPECS) and all(column.missing.all() for column in found.values())


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    head, code = dataclasses.replace(HEAD, edges=RADIUS), set()
    for name in ("a", "b"):
        code.add(write_shard(tmp_path / name, rows(20, edges=True), head, name="n", split="all").sha256)
    assert len(code) == 1 and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert write_shard(tmp_path / "c", rows(20, 1, edges=True), head, name="n", split="all").sha256 not in code


def test_a_shard_tells_what_the_manifest_says(store: Path) -> None:
    for listed in read_manifest(store).shards:
        assert shard_info(store / listed.name) == listed


def test_plain_h5py_reads_a_shard(store: Path) -> None:
    with h5py.File(store / "val-00000.h5") as shard:
        assert shard.attrs["format"] == b"hpcgen-store" and shard["columns/band_gap"].attrs["unit"] == b"eV"
        assert shard["ptr"].dtype == np.int64 and shard["atomic_numbers"].dtype == np.uint8
        assert shard["id"][0].decode() == "mp-90-é"
        assert shard["frac_coords"].compression == "gzip" and shard["frac_coords"].fletcher32


# refused at the door


def _with(**change: object) -> Rows:
    some = rows(3)
    if "ids" in change or "columns" in change:
        return dataclasses.replace(some, **change)  # type: ignore[arg-type]
    return dataclasses.replace(some, crystals=dataclasses.replace(some.crystals, **change))  # type: ignore[arg-type]


def _frac(value: float) -> torch.Tensor:
    frac = crystals(3).frac_coords.clone()
    frac[-1, 1] = value
    return frac


def _column(spec: ColumnSpec, values: list[object], missing: bool = False) -> dict[str, Column]:
    array = np.array(values, dtype=object if spec.kind == "str" else None)
    return {next(k for k, v in SPECS.items() if v == spec): Column(spec, array, np.full(3, missing))}


REFUSED = {
    "nan": (_with(frac_coords=_frac(float("nan"))), r"mp-2-é: fractional coordinates of atom \d+ is .*nan"),
    "one": (_with(frac_coords=_frac(1.0)), r"mp-2-é: fractional.* 1, .*want in \[0, 1\)"),
    "negative": (_with(frac_coords=_frac(-0.25)), r"mp-2-é: .*-0.25"),
    "element": (_with(atomic_numbers=crystals(3).atomic_numbers * 0), "mp-0-é: atomic number of atom 0 is 0"),
    "lattice": (_with(lattice=crystals(3).lattice / 0), "mp-0-é: lattice is inf"),
    "flat": (_with(lattice=crystals(3).lattice * torch.tensor([1.0, 1, 0])), "mp-0-é: lattice is .*want a cell with a"),
    "no-atoms": (_with(num_atoms=crystals(3).num_atoms * 0), "crystals of 0 atoms in all"),
    "twice": (_with(ids=["a", "b", "a"]), "id 'a' stands 2 times"),
    "no-id": (_with(ids=["a", "", "b"]), "id is ''"),
    "few-ids": (_with(ids=["a"]), "1 ids for 3 crystals"),
    "undeclared": (
        _with(columns={"gap": rows(3).columns["band_gap"]}),
        "column 'gap' is not declared.*band_gap",
    ),
    "other-unit": (
        _with(columns={"band_gap": Column(ColumnSpec("float", "J"), np.zeros(3), np.zeros(3, bool))}),
        "rows say .*'J'.* says .*'eV'",
    ),
    "nan-column": (
        _with(columns=_column(SPECS["band_gap"], [1.0, np.nan, 2.0])),
        "mp-1-é: column band_gap is nan",
    ),
    "wrong-kind": (
        _with(columns=_column(SPECS["spacegroup"], [1.5, 2.5, 3.5])),
        "kind int, its values are float64",
    ),
    "no-text": (_with(columns=_column(SPECS["formula"], ["a", None, "b"])), "mp-1-é: column formula is None"),
    "long-text": (_with(columns=_column(SPECS["formula"], ["a", "b" * 5000, "b"])), "mp-1-é: .*5000 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_may_not_be_stored_are_named(tmp_path: Path, name: str) -> None:
    given, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        write_shard(tmp_path / "shard.h5", given, HEAD, name="shard.h5", split="all")
    assert list(tmp_path.iterdir()) == []


def test_edges_and_head_must_agree(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hold no edges.*radius 4 Å"):
        write_shard(tmp_path / "a", rows(3), dataclasses.replace(HEAD, edges=RADIUS), name="a", split="all")
    with pytest.raises(InputError, match="hold edges.*none"):
        write_shard(tmp_path / "a", rows(3, edges=True), HEAD, name="a", split="all")
    given = rows(3, edges=True)
    assert given.edges is not None
    crossed = Edges(given.edges.index.flip(1), given.edges.image)
    with pytest.raises(InputError, match="not sorted"):
        write_shard(
            tmp_path / "a",
            dataclasses.replace(given, edges=crossed),
            dataclasses.replace(HEAD, edges=RADIUS),
            name="a",
            split="all",
        )


def test_wrong_settings_are_refused(tmp_path: Path, store: Path) -> None:
    for wrong in (
        lambda: ColumnSpec("number"),
        lambda: EdgeSettings("radius", k=3),
        lambda: Head("x", columns={"a/b": ColumnSpec("int")}),
        lambda: Store(store, on_bad="ignore"),
        lambda: Store(store, dtype=torch.float16),
        lambda: StoreWriter(store, HEAD),
        lambda: write_store(tmp_path / "new", HEAD, [("training", rows(2))]),
    ):
        with pytest.raises(UsageError):
            wrong()


def test_other_edges_than_the_cached_ones_are_refused(tmp_path: Path, store: Path) -> None:
    write_store(tmp_path / "e", dataclasses.replace(HEAD, edges=RADIUS), [("all", rows(3, edges=True))])
    with pytest.raises(InputError, match=r"radius 4 Å, asked for are radius 6 Å"):
        Store(tmp_path / "e", edges=EdgeSettings("radius", cutoff=6.0))
    with pytest.raises(InputError, match="none, asked for are cached edges"):
        Store(store, edges=True)
    assert Store(tmp_path / "e")[0].edges is None


@pytest.mark.parametrize("make", [np.array, torch.tensor, list])
def test_masks_and_indices_from_the_end(store: Path, make: Callable[[list[object]], object]) -> None:
    some, mask = read(store), [k in (3, 20, 54) for k in range(55)]
    assert same(some.rows(make(mask)), some.rows([3, 20, 54]))  # type: ignore[arg-type]
    assert same(some.rows(make([-1, 0, -55])), some.rows([54, 0, 0]))  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="mask of 54 for 55"):
        some.rows(make(mask[1:]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="indices of type float.*want integers"):
        some.rows(make([1.0, 2.0]))  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="-56"):
        some.rows(make([-56, 3]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "image", "message"),
    [
        (lambda i: i, lambda m: m[:, :2], r"image \(\d+, 2\); want"),
        (lambda i: i, lambda m: m[1:], "want .2, E. and .E, 3."),
        (lambda i: i - 1, lambda m: m, "edges join atoms -1 to"),
        (lambda i: i + 1, lambda m: m, "edges join atoms 1 to"),
        (lambda i: i, lambda m: m + 0.5, "image float.*want integers"),
    ],
)
def test_edges_that_may_not_be_stored(
    tmp_path: Path,
    index: Callable[[torch.Tensor], torch.Tensor],
    image: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    given = rows(3, edges=True)
    assert given.edges is not None
    wrong = dataclasses.replace(given, edges=Edges(index(given.edges.index), image(given.edges.image)))
    with pytest.raises(InputError, match=message):
        write_store(tmp_path, dataclasses.replace(HEAD, edges=RADIUS), [("all", wrong)])


def test_edge_settings_are_plain_numbers_that_make_sense() -> None:
    nan, inf = float("nan"), float("inf")
    for wrong in (
        {"method": "radius", "cutoff": 0.0},
        {"method": "radius", "cutoff": nan},
        {"method": "radius", "cutoff": inf},
        {"method": "radius", "cutoff": "six"},
        {"method": "radius", "cutoff": 6.0, "k": 3},
        {"method": "nearest", "cutoff": 6.0, "k": 3},
        {"method": "nearest", "k": 0},
        {"method": "nearest", "k": 2.5},
        {"method": "both", "k": 2},
    ):
        with pytest.raises(UsageError, match="EdgeSettings"):
            EdgeSettings(**wrong)  # type: ignore[arg-type]
    made = EdgeSettings("radius", cutoff=np.float32(6))  # type: ignore[arg-type]
    assert type(made.cutoff) is float and Head("x", edges=made) == Head("x", edges=EdgeSettings("radius", cutoff=6))
    assert Head("x", edges=EdgeSettings("nearest", k=np.int64(4))).settings_hash  # type: ignore[arg-type]
    assert type(EdgeSettings("radius", cutoff=6).cutoff) is float


@pytest.mark.parametrize("value", [float("nan"), Path("a"), {1, 2}])
def test_settings_that_are_no_json_are_named(value: object) -> None:
    with pytest.raises(UsageError, match="setting deep.one is .*want a JSON value"):
        Head("x", {"fine": [1, None, "a"], "deep": {"one": value}})
