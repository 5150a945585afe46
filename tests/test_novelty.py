"""Unique, novel, stable: StructureMatcher's verdicts, buckets, similarity, intervals, and their place in `evaluate`."""

import csv
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_crystals import (
    cell,
    crystal,
    in_larger_cell,
    in_other_cell,
    many_shaken,
    random_cells,
    random_crystals,
    relabelled,
    rotated,
    shaken,
    special,
)
from scipy.sparse import csr_array

from hpcgen import cli
from hpcgen.campaign.evaluate import evaluate
from hpcgen.campaign.request import Request
from hpcgen.crystal.convert import from_pymatgen, to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import niggli_reduce
from hpcgen.crystal.match import Matcher, reduced_cell
from hpcgen.crystal.outline import minima, outlines, short_enough
from hpcgen.crystal.superpose import compared, same
from hpcgen.crystal.torus import shortest_step
from hpcgen.metrics import same as same_module
from hpcgen.metrics.bootstrap import mean_interval, share_interval
from hpcgen.metrics.cells import Buckets, Sets, shares
from hpcgen.metrics.novelty import COLUMNS
from hpcgen.metrics.render import render
from hpcgen.metrics.same import MATCHERS, NONE, STANDARD, STRICT, Same, SameBlock, Search, find_same
from hpcgen.metrics.similarity import fingerprints, nearest, tanimoto
from hpcgen.runner.blocks import Block, How
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import find_team
from hpcgen.runner.worker import Cursor
from hpcgen.store.layout import ColumnSpec, Head
from hpcgen.store.rows import Column, Rows
from hpcgen.store.write import write_store

PEERS = Matcher(ltol=0.3, stol=0.5, angle_tol=10.0)
DOUBLE = torch.tensor([[2, 0, 0], [0, 1, 0], [0, 0, 1]])
SHEAR = torch.tensor([[[1, 1, 0], [0, 1, 0], [0, 1, 1]]])


def plain_matcher(matcher: Matcher) -> Any:
    from pymatgen.analysis.structure_matcher import StructureMatcher

    return StructureMatcher(**asdict(matcher))


def store(
    path: Path, crystals: list[Crystals], hull: list[float] | None = None, energy: bool = False, **settings: Any
) -> Path:
    """A store of these crystals, c0, c1, ...; hull: e_above_hull of each, NaN for none."""
    values = {"e_above_hull": hull} if hull else {}
    if energy:
        values["energy"] = [-1.0 * k for k in range(len(crystals))]
    spec = ColumnSpec("float", "eV/atom")
    columns = {name: Column(spec, np.array(some), np.isnan(some)) for name, some in values.items()}
    rows = Rows(Crystals.cat(crystals), [f"c{k}" for k in range(len(crystals))], columns)
    write_store(path, Head("test", settings, dict.fromkeys(columns, spec)), [("all", rows)])
    return path


# ---- one pair ------------------------------------------------------------------------------------------------


def pairs() -> list[tuple[Crystals, Crystals]]:
    """Reduced crystals of ties and special positions, shaken and strained up to and beyond the tolerances."""
    made = []
    targets = [one for name, one in special().items() if name != "sixty"]
    targets.append(in_other_cell(random_crystals(random_cells(1, seed=5), seed=5), SHEAR))
    for target, (k, size) in itertools.product(targets, enumerate((0.0, 0.05, 0.25, 0.5, 0.9))):
        other = shaken(target, size, seed=k, strain=0.04 * k)
        made.append((reduced_cell(target), reduced_cell(other)))
    return made


def verdicts(some: list[tuple[Crystals, Crystals]], matcher: Matcher) -> tuple[np.ndarray, np.ndarray]:
    """Ours, all at once, and plain StructureMatcher's on pairs of reduced crystals. (P,), (P,) bool."""
    plain, both = plain_matcher(matcher), Crystals.cat([one for pair in some for one in pair])
    structures = to_pymatgen(both)
    wanted = [
        plain.fit(*couple, skip_structure_reduction=True)
        for couple in zip(structures[::2], structures[1::2], strict=True)
    ]
    places = np.arange(0, len(both), 2)
    return same(outlines(both), places, places + 1, [matcher])[:, 0], np.array(wanted)


@pytest.mark.parametrize("matcher", [STANDARD, STRICT, PEERS], ids=["standard", "strict", "peers"])
def test_same_is_structure_matchers_verdict(matcher: Matcher) -> None:
    some = pairs()
    found, wanted = verdicts([*some, *((other, one) for one, other in some)], matcher)
    assert (found == wanted).all() and 5 < wanted.sum() < len(wanted) - 5


def unordered() -> list[tuple[Crystals, Crystals]]:
    """Sites at random, a few of one element, in cells that are or are not alike: here the assignment decides."""
    cells, _ = niggli_reduce(random_cells(12, seed=3, skew=1, rounds=2))
    generator, made = torch.Generator().manual_seed(4), []
    for k, size in itertools.product(range(12), (2, 3, 5)):
        for strain in (0.0, 0.1):
            both = []
            for _ in range(2):
                frac = torch.rand(size, 3, generator=generator, dtype=torch.float64)
                lattice = cells[k] @ (torch.eye(3) + strain * torch.randn(3, 3, generator=generator)).double()
                both.append(reduced_cell(crystal(lattice, frac, [14] * (size - 1) + [8])))
            made.append((both[0], both[1]))
    return [pair for pair in made if len(set(map(len, (pair[0].frac_coords, pair[1].frac_coords)))) == 1]


@pytest.mark.parametrize("matcher", [STANDARD, PEERS], ids=["standard", "peers"])
def test_sites_without_order(matcher: Matcher) -> None:
    found, wanted = verdicts(unordered(), matcher)
    assert (found == wanted).all() and 3 < wanted.sum() < len(wanted) - 3


def test_several_tolerances_at_once_and_what_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    some = pairs()
    cells, places = outlines(Crystals.cat([one for pair in some for one in pair])), np.arange(0, 2 * len(some), 2)
    matchers = [STANDARD, STRICT, PEERS]
    every, failed = compared(cells, places, places + 1, matchers)
    assert not failed.any()
    for t, matcher in enumerate(matchers):
        assert (every[:, t] == same(cells, places, places + 1, [matcher])[:, 0]).all()

    def odd(of: Any, one: np.ndarray, *rest: Any) -> np.ndarray:
        if 6 in one:
            raise IndexError("an odd cell")
        return same(of, one, *rest)

    monkeypatch.setattr("hpcgen.crystal.superpose.same", odd)
    found, failed = compared(cells, places, places + 1, matchers)
    assert failed.nonzero()[0].tolist() == [3] and not found[3].any()
    assert (np.delete(found, 3, 0) == np.delete(every, 3, 0)).all()


def test_other_elements_and_numbers_never_match() -> None:
    one, other = special()["hcp"], special()["diamond"]
    swapped = replace(one, atomic_numbers=torch.tensor([12, 13]))
    cells = outlines(Crystals.cat([one, swapped, other]))
    assert not same(cells, np.array([0, 1, 0, 2]), np.array([1, 0, 2, 0]), [STANDARD]).any()
    assert not same(cells, np.array([], dtype=int), np.array([], dtype=int), [STANDARD]).any()


@pytest.mark.parametrize("name", [name for name in special() if name != "sixty"])
def test_a_reduced_cell_is_pymatgens(name: str) -> None:
    """With and without a common factor of the numbers of atoms."""
    for one in (special()[name], in_larger_cell(special()[name], DOUBLE), in_other_cell(special()[name], SHEAR)):
        plain = to_pymatgen(one)[0].get_reduced_structure("niggli").get_primitive_structure()
        wanted = from_pymatgen([plain])
        found = reduced_cell(one)
        assert torch.equal(found.atomic_numbers, wanted.atomic_numbers)
        assert torch.allclose(found.lattice, wanted.lattice, rtol=1e-12, atol=1e-12)
        assert (shortest_step(found.frac_coords, wanted.frac_coords).abs() < 1e-12).all()


def test_the_minima_part_nothing_that_maps() -> None:
    """Every basis of a lattice that is like another cell keeps the bound; some pairs break it."""
    cells, _ = niggli_reduce(random_cells(60, seed=8, skew=1, rounds=2))
    some = outlines(random_crystals(cells, seed=8))
    least = minima(cells.numpy())
    assert np.allclose(least, np.sort(some.lengths), rtol=1e-6)  # the sides of a Niggli cell
    sheared = (SHEAR.double() @ SHEAR.mT.double() @ cells).numpy()
    assert np.allclose(minima(sheared), least)
    for matcher in (STANDARD, PEERS):
        allowed = np.array([short_enough(least, lengths, matcher.ltol) for lengths in some.lengths]).T
        plain = [structure.lattice for structure in to_pymatgen(random_crystals(cells, seed=8))]
        plain = [type(lattice)(lattice.matrix / lattice.volume ** (1 / 3)) for lattice in plain]
        for i, j in itertools.product(range(0, 60, 6), range(60)):
            mapped = plain[i].find_all_mappings(plain[j], matcher.ltol, matcher.angle_tol, skip_rotation_matrix=True)
            if any(abs(abs(np.linalg.det(matrix)) - 1) < 0.5 for _, _, matrix in mapped):
                assert allowed[i, j]
        assert 1 - allowed.mean() > 0.02


# ---- many ----------------------------------------------------------------------------------------------------


def run_and_reference() -> tuple[list[Crystals], list[Crystals]]:
    """Copies in every disguise, drifting chains, another phase of a known formula, elements that are not known."""
    known = [special()[name] for name in ("NaCl", "fcc", "diamond", "skewed")]
    salt, skewed = known[0], known[3]
    run = [
        salt, rotated(salt), in_other_cell(salt, SHEAR), in_larger_cell(salt, DOUBLE), shaken(salt, 0.1, seed=1),
        replace(salt, lattice=salt.lattice * 1.3),
        *(shaken(skewed, size, seed=k) for k, size in enumerate((0.1, 0.3, 0.5, 0.7, 0.9, 0.9))),
        crystal(cell(4, 4, 4), [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17]),  # in the structure of CsCl
        crystal(cell(4.1, 4.1, 4.1), [[0, 0, 0], [0.5, 0.5, 0.5]], [11, 17]),
        special()["hcp"], special()["hcp"], special()["one atom"],
        crystal(cell(3, 3, 3), [[0, 0, 0]], [29]),  # simple cubic, not fcc
        *[many_shaken(skewed, torch.tensor([0.4]), seed=k) for k in range(20, 30)],
    ]  # fmt: skip
    return run, known


def by_brute_force(run: list[Crystals], known: list[Crystals], matcher: Matcher) -> np.ndarray:
    """Whether plain StructureMatcher finds each the same as an earlier one, and as a known one. (N, 2)."""
    plain = plain_matcher(matcher)
    ours, theirs = to_pymatgen(Crystals.cat(run)), to_pymatgen(Crystals.cat(known))
    return np.array([
        (any(plain.fit(earlier, it) for earlier in ours[:k]), any(plain.fit(one, it) for one in theirs))
        for k, it in enumerate(ours)
    ])  # fmt: skip


def found(sets: Sets, folder: Path, processes: int = 0) -> Same:
    folder.mkdir(exist_ok=True)
    with StopFlag() as stop, Lease.take(folder, find_team()) as lease:
        return Same.load(find_same(sets, folder, lease=lease, stop=stop, how=How(processes, label="")))


def test_no_match_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, known = run_and_reference()
    sets = Sets(store(tmp_path / "run", run), len(run), store(tmp_path / "known", known), None, len(known))
    monkeypatch.setattr(same_module, "_PIECE", (5, 5))
    monkeypatch.setattr("hpcgen.metrics.cells._LEAST", 3.0)  # several blocks, which cut buckets
    same = found(sets, tmp_path / "work")
    bounds = shares(tmp_path / "work" / "buckets.h5", 512)
    assert len(bounds) > 5 and len(np.unique(Buckets.load(tmp_path / "work" / "buckets.h5", 0, bounds[-1]).bucket)) < 8
    for t, matcher in enumerate(MATCHERS.values()):
        wanted = by_brute_force(run, known, matcher)
        assert (same.earlier[:, t] != NONE).tolist() == wanted[:, 0].tolist()
        assert (same.known[:, t] != NONE).tolist() == wanted[:, 1].tolist()
        assert wanted.any(0).all() and not wanted.all(0).any()
    assert same.compared.all()
    assert np.flatnonzero(same.unknown).tolist() == [14, 15, 16]  # magnesium and polonium
    assert (same.earlier < np.arange(len(run))[:, None]).all() and same.earlier[15].tolist() == [14, 14]
    assert same.known[:6, 0].tolist() == [0, 0, 0, 0, NONE, 0]  # shaken by 0.1 Å it has no primitive cell of 2 atoms
    again = found(sets, tmp_path / "two", processes=2)
    for name in ("earlier", "known", "compared", "unknown"):
        assert np.array_equal(getattr(same, name), getattr(again, name))


def test_without_a_reference_or_anything_to_compare(tmp_path: Path) -> None:
    run, _ = run_and_reference()
    same = found(Sets(store(tmp_path / "run", run), 3), tmp_path / "work")
    assert (same.earlier != NONE).tolist() == [[False] * 2, [True] * 2, [True] * 2] and (same.known == NONE).all()
    lone = [special()["fcc"], special()["diamond"]]
    same = found(Sets(store(tmp_path / "lone", lone), 2), tmp_path / "none")
    assert (same.earlier == NONE).all() and same.compared.all()


def test_what_hangs_or_fails_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [special()["fcc"], special()["hcp"], special()["fcc"], special()["fcc"]]
    found(Sets(store(tmp_path / "run", run), 4), tmp_path / "work")
    cursor = Cursor([0] * 4, lambda: None, tmp_path / "keep")
    buckets = tmp_path / "work" / "buckets.h5"
    work = SameBlock(buckets, 4, (0, 3), (STANDARD,))
    assert work(Block(0, tmp_path / "x", 3), tmp_path / "out.npz", cursor) == {"compared": 3, "pairs": 2}
    with np.load(tmp_path / "out.npz") as told:
        assert told["found"][:, 0, 0].tolist() == [NONE, 0, 0] and not told["failed"].any()
    cursor.culprits = {-1: "timeout", 1: "timeout"}  # all together, then the second one by itself
    assert work(Block(0, tmp_path / "x", 3), tmp_path / "out.npz", cursor) == {"compared": 3, "pairs": 1}
    with np.load(tmp_path / "out.npz") as told:
        assert told["found"][:, 0, 0].tolist() == [NONE, NONE, 0] and told["failed"][:, 0, 0].tolist() == [0, 1, 0]

    def odd(*_: object) -> bool:
        raise IndexError("an odd cell")

    monkeypatch.setattr("hpcgen.crystal.superpose.same", odd)
    found_, failed = Search(Buckets.load(buckets, 0, 3), [STANDARD]).same_as(np.array([2]), lambda: None)
    assert found_.tolist() == [[[NONE], [NONE]]] and failed.tolist() == [[[True], [False]]]


# ---- similarity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(special()))
def test_the_fingerprint_does_not_depend_on_the_description(name: str) -> None:
    one = special()[name]
    order = torch.randperm(int(one.num_atoms), generator=torch.Generator().manual_seed(0))
    others = [rotated(one), relabelled(one, order), in_other_cell(one, SHEAR), in_larger_cell(one, DOUBLE),
              replace(one, lattice=one.lattice * 1.7)]  # fmt: skip
    assert tanimoto(fingerprints(one), fingerprints(Crystals.cat(others))) == pytest.approx(1.0, abs=1e-6)


def test_similarity_falls_with_disorder_and_across_elements() -> None:
    one = special()["skewed"]
    others = Crystals.cat([shaken(one, size, seed=1) for size in (0, 0.05, 0.4, 2.0)])
    alike = tanimoto(fingerprints(one), fingerprints(others))
    assert alike[0, 0] == pytest.approx(1) and (np.diff(alike[0]) < -1e-3).all() and alike[0, -1] > 0
    other = replace(special()["fcc"], atomic_numbers=torch.tensor([30]))
    assert tanimoto(fingerprints(special()["fcc"]), fingerprints(other)) == 0
    some = fingerprints(random_crystals(random_cells(40, seed=3, skew=1, rounds=2), seed=3))
    both = tanimoto(some, some)
    assert np.allclose(both, both.T) and np.allclose(np.diag(both), 1) and both.min() >= 0 and both.max() <= 1 + 1e-12


def test_tanimoto_by_hand_and_the_nearest() -> None:
    rows = csr_array(np.array([[1.0, 2, 0], [2, 0, 1], [0, 0, 0], [1, 2, 0]]))
    assert tanimoto(rows[:1], rows)[0].tolist() == [1, 2 / (5 + 5 - 2), 0, 1]
    place, best = nearest(rows, rows[1:])
    assert place[[0, 1, 3]].tolist() == [2, 0, 2] and best[[0, 1, 3]].tolist() == [1, 1, 1] and np.isnan(best[2])
    some = fingerprints(random_crystals(random_cells(150, seed=4, skew=1, rounds=2), seed=4))
    every = tanimoto(some[:90], some[90:])
    place, best = nearest(some[:90], some[90:])
    assert np.allclose(best, every.max(1)) and (place == every.argmax(1)).all()


def test_what_has_no_neighbours_to_count_has_no_similarity() -> None:
    flat = crystal(torch.tensor([[3.0, 0, 0], [0, 3, 0], [3, 3, 0]], dtype=torch.float64), [[0, 0, 0]], [29])
    rows = fingerprints(Crystals.cat([special()["fcc"], flat, special()["fcc"]]))
    _, best = nearest(rows, rows)
    assert best[[0, 2]].tolist() == [1, 1] and np.isnan(best[1])


# ---- intervals -----------------------------------------------------------------------------------------------


def test_intervals_are_those_of_large_numbers() -> None:
    low, high = share_interval(300, 1000, seed=1) or (0, 0)
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.01449, 0.3 + 1.96 * 0.01449), abs=0.004)
    values = np.random.Generator(np.random.Philox(3)).normal(5, 2, 400)
    low, high = mean_interval(values, seed=1) or (0, 0)
    width = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - width, values.mean() + width), abs=0.03)
    assert share_interval(300, 1000, seed=1) == share_interval(300, 1000, seed=1) != share_interval(300, 1000, seed=2)
    assert share_interval(0, 7, seed=1) == [0, 0] and share_interval(7, 7, seed=1) == [1, 1]
    assert share_interval(0, 0, seed=1) is None and mean_interval([], seed=1) is None
    assert mean_interval([2], seed=1) == [2, 2]


# ---- evaluate ------------------------------------------------------------------------------------------------


def evaluated(request: Request, out: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    with find_team() as team:
        told = evaluate(request, out, team, 0)
    assert told is not None
    with out.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        return told, list(csv.DictReader(file))


def test_evaluate(tmp_path: Path) -> None:
    run, known = run_and_reference()
    hull = [0.05] * len(run)
    hull[12], hull[17], hull[0] = -0.01, np.nan, 0.0  # CsCl-like: unique, novel, stable; simple cubic: no value
    path = store(tmp_path / "run", run, hull, energy=True)
    (path / "summary.json").write_text(json.dumps({"asked": 40, "rejected": {"crash": 40 - len(run)}}))
    told, rows = evaluated(Request(path, store(tmp_path / "known", known), seed=7), tmp_path / "e.json")
    wanted = by_brute_force(run, known, STANDARD)
    unknown = np.isin(np.arange(len(run)), [14, 15, 16])
    novel, unique = ~wanted[:, 1] & ~unknown, ~wanted[:, 0]
    figures = told["figures"]["novelty"]
    count = {name: part["count"] for name, part in figures["standard"].items()}
    assert count["unique"] == unique.sum() and count["novel"] == novel.sum() and count["unknown"] == 3
    assert count["known"] == wanted[:, 1].sum() and count["unique_novel"] == (unique & novel).sum()
    assert count["sun"] == 1 and count["metastable_sun"] == (unique & novel).sum() - 1
    assert {part["of"] for part in figures["standard"].values()} == {40}
    low, high = figures["standard"]["unique"]["interval"]
    assert low < unique.sum() / 40 < high
    assert figures["strict"]["novel"]["count"] == (~by_brute_force(run, known, STRICT)[:, 1] & ~unknown).sum()
    assert figures["stability"]["screened"] == len(run) - 1 and figures["stability"]["stable"]["count"] == 2
    assert figures["energy"]["mean"] == pytest.approx(-(len(run) - 1) / 2) and figures["energy"]["unit"] == "eV/atom"
    assert list(rows[0])[-len(COLUMNS) :] == list(COLUMNS)
    assert [row["novelty"] for row in rows] == [
        "unknown" if strange else "novel" if new else "known" for strange, new in zip(unknown, novel, strict=True)
    ]
    assert (rows[1]["duplicate_of"], rows[1]["known_as"], rows[1]["nearest"], rows[1]["similarity"]) == (
        "c0",
        "c0",
        "c0",
        "1",
    )
    assert (rows[12]["unique"], rows[13]["unique"], rows[13]["duplicate_of"]) == ("1", "0", "c12")
    assert told["tolerances"]["same"]["standard"] == {"ltol": 0.2, "stol": 0.3, "angle_tol": 5}
    assert told["reference_crystals"] == 4 and "sun" in told["definitions"]
    shown = render(told)
    for part in ("stable, unique, novel", "2.5 % [", "ltol 0.1, stol 0.15", "4 crystals", "seed 7", "elements unknown",
                 f"{len(run) - 1} screened", "eV/atom"):  # fmt: skip
        assert part in shown


def test_stability_names_what_it_rests_on(tmp_path: Path) -> None:
    """As far as the store says so; a setting of that name which is something else is none."""
    crystals, hull = [special()[name] for name in ("NaCl", "fcc", "hcp")], [-0.1, 0.3, 0.7]
    recorded = {"e_above_hull": {"potential": "CHGNet 0.3.0", "hull": "MP 2026.3"}, "energy": {"potential": "PBE"}}
    for name, settings, told in (
        ("full", {"screened": recorded}, ("CHGNet 0.3.0", "MP 2026.3", "PBE")),
        ("half", {"screened": {"e_above_hull": {"hull": "MP 2026.3"}, "energy": "?"}}, (None, "MP 2026.3", None)),
        ("odd", {"screened": True}, (None, None, None)),
        ("bare", {}, (None, None, None)),
    ):
        path = store(tmp_path / name, crystals, hull, energy=True, **settings)
        found, _ = evaluated(Request(path), tmp_path / f"{name}.json")
        figures = found["figures"]["novelty"]
        assert (figures["stability"]["potential"], figures["stability"]["hull"], figures["energy"]["potential"]) == told
        assert [figures["stability"][kind]["count"] for kind in ("stable", "metastable", "low")] == [1, 1, 2]
        shown = render(found)
        potential, ground, energy = (value or "not recorded in the store" for value in told)
        assert f"potential: {potential}; hull: {ground}" in shown and f"3 crystals); potential: {energy}" in shown


def test_not_screened_no_reference_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, known = run_and_reference()
    path, reference = store(tmp_path / "run", run[:8]), store(tmp_path / "known", known)
    told, _ = evaluated(Request(path, reference), tmp_path / "a.json")
    assert told["figures"]["novelty"]["stability"] is None and "sun" not in told["figures"]["novelty"]["standard"]
    assert "not screened" in render(told)
    told, rows = evaluated(Request(path), tmp_path / "b.json")
    assert set(told["figures"]["novelty"]["standard"]) == {"unique", "not-compared"}
    assert {row["novelty"] for row in rows} == {""} and "none, so no novelty" in render(told)
    words = ["evaluate", str(path), "--json", str(tmp_path / "c.json"), "--processes", "0", "--no-novelty"]
    assert cli.main(words) == 0
    assert "tolerances" not in capsys.readouterr().out
    assert "novelty" not in json.loads((tmp_path / "c.json").read_text())["figures"]


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, known = run_and_reference()
    path, reference = store(tmp_path / "run", run), store(tmp_path / "known", known)
    monkeypatch.setattr("hpcgen.metrics.cells._LEAST", 3.0)
    real, calls = SameBlock.__call__, []

    def interrupted(self: SameBlock, block: Block, draft: Path, cursor: Cursor) -> Any:
        calls.append(block.index)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, block, draft, cursor)

    monkeypatch.setattr(SameBlock, "__call__", interrupted)
    words = ["evaluate", str(path), "--reference", str(reference), "--processes", "0"]
    assert cli.main([*words, "--json", str(tmp_path / "a.json")]) == 75
    assert cli.main([*words, "--json", str(tmp_path / "a.json")]) == 0
    assert len(calls) == len(set(calls)) + 1  # one block was begun twice
    monkeypatch.setattr(SameBlock, "__call__", real)
    assert cli.main([*words, "--json", str(tmp_path / "b.json")]) == 0
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
