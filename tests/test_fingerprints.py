"""Fingerprints beside matminer's, called plainly, and the laws that they keep."""

import csv
import gzip
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from campaign_jobs import run
from known_crystals import cell, crystal, in_other_cell, random_transforms, relabelled, rotated, shaken, special

from hpcgen.campaign.config import PACKAGED
from hpcgen.crystal.cif import read_cif
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.crystalnn import coordination, voronoi_faces, weighed
from hpcgen.metrics.fingerprints import FEATURES, fingerprints
from hpcgen.metrics.validity import random_coordinates
from hpcgen.store.read import Store

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KINDS = ["real", "shaken", "random", "generated"]
CLOSE = 1e-6
MANY = int(os.environ.get("HPCGEN_BENCH_CRYSTALS", "500"))


@pytest.fixture(scope="module")
def matminer() -> Any:
    """matminer's fingerprint of a site."""
    pytest.importorskip("matminer", reason="matminer is not installed")
    from matminer.featurizers.site import CrystalNNFingerprint

    return CrystalNNFingerprint.from_preset("ops")


def by_matminer(matminer: Any, one: Crystals) -> np.ndarray | str:
    """Fingerprint (61,) of one crystal, or the error."""
    structure = to_pymatgen(one)[0]
    try:
        return np.mean([matminer.featurize(structure, site) for site in range(len(structure))], axis=0)
    except Exception as error:  # of any kind: it counts as an invalid crystal
        return repr(error)


def real(count: int, most: int = 52) -> list[Crystals]:
    """Known crystals of at most `most` atoms, from several sets."""
    found: list[Crystals] = []
    for name, every in (("mp20_bt", 7), ("mpts52", 11), ("lemat_mix", 13), ("carbon_24", 5), ("perov_5", 9)):
        if not (file := DATA / f"{name}.csv.gz").exists():
            pytest.skip(f"no real crystals in {DATA}")
        share = len(found) + math.ceil(count / 5)
        with gzip.open(file, "rt", newline="") as source:
            for row in list(csv.DictReader(source))[::every]:
                one = read_cif(row["cif"])[0]
                if len(found) < min(share, count) and int(one.num_atoms) <= most:
                    found.append(one)
                if len(found) == min(share, count):
                    break
    return found


def some(kind: str, count: int, folder: Path, most: int = 52) -> list[Crystals]:
    if kind == "generated":
        n, steps = (4 * count, 10) if most < 20 else (count, 25)
        run(PACKAGED, folder / "run", n=n, steps=steps)
        made = Store(folder / "run", dtype=None)
        return [made[at].crystals for at in range(len(made)) if int(made[at].crystals.num_atoms) <= most][:count]
    known = real(count, most)
    if kind == "shaken":
        return [shaken(one, 0.1, seed) for seed, one in enumerate(known)]
    return [random_coordinates(one, seed) for seed, one in enumerate(known)] if kind == "random" else known


def compared(matminer: Any, crystals: list[Crystals]) -> tuple[np.ndarray, int, float, float]:
    """Greatest difference of each crystal that has a fingerprint, how many have none, seconds of matminer and ours."""
    start = time.process_time()
    want = [by_matminer(matminer, one) for one in crystals]
    middle = time.process_time()
    found = fingerprints(Crystals.cat([one.to(dtype=torch.float64) for one in crystals]))
    end = time.process_time()
    for at, row in enumerate(want):
        assert isinstance(row, str) == (at in found.reasons), (at, row, found.reasons.get(at))
        assert np.isnan(found.values[at]).all() == np.isnan(found.values[at]).any() == (at in found.reasons)
    both = [(row, mine) for row, mine in zip(want, found.values, strict=True) if not isinstance(row, str)]
    apart = np.array([np.abs(row - mine).max() for row, mine in both])
    return apart, len(found.reasons), middle - start, end - middle


# ---- beside matminer -----------------------------------------------------------------------------------------


def test_features_are_named_as_by_matminer(matminer: Any) -> None:
    assert list(FEATURES) == matminer.feature_labels()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_against_matminer(matminer: Any, kind: str, tmp_path: Path) -> None:
    crystals = some(kind, 16, tmp_path, most=6)
    assert len(crystals) == 16
    apart, failed, *_ = compared(matminer, crystals)
    assert failed == 0
    assert apart.max() < CLOSE


@pytest.mark.bench
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_speed_against_matminer(
    matminer: Any, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], threads_restored: None
) -> None:
    torch.set_num_threads(1)
    crystals = some(kind, MANY, tmp_path)
    fingerprints(crystals[0])  # imports
    apart, failed, theirs, ours = compared(matminer, crystals)
    count, sites = len(crystals), sum(int(one.num_atoms) for one in crystals)
    with capsys.disabled():
        print(
            f"\n{kind}: {count} crystals of {sites / count:.1f} atoms, crystals per second of one core: "
            f"matminer {count / theirs:.1f}, ours {count / ours:.1f}, {theirs / ours:.0f} times as many; "
            f"greatest difference {apart.max():.1e}, {(apart > CLOSE).sum()} above {CLOSE:g}; without: {failed}"
        )
    assert apart.max() < CLOSE
    assert theirs > 4 * ours


def layer(vacuum: float, bump: float) -> Crystals:
    """MoS2 with its sulphur moved up and down by `bump` Å."""
    lattice = cell(3.18, 3.18, vacuum, 90, 90, 120)
    heights = [0.5, 0.5 + (1.56 + bump) / vacuum, 0.5 - (1.56 - bump) / vacuum]
    sites = [[1 / 3, 2 / 3, heights[0]], [2 / 3, 1 / 3, heights[1]], [2 / 3, 1 / 3, heights[2]]]
    return crystal(lattice, sites, [42, 16, 16])


def close(distance: float) -> Crystals:
    """Two sodium atoms so many Å apart, and oxygen."""
    return crystal(
        cell(4.0, 4.4, 5.3, 88, 85, 93), [[0.1, 0.2, 0.3], [0.1 + distance / 4, 0.2, 0.3], [0.6, 0.7, 0.5]], [11, 11, 8]
    )


def mixed(number: int) -> Crystals:
    return crystal(
        cell(4.5, 4.5, 4.5), [[0, 0, 0], [0.5, 0.5, 0.1], [0.5, 0, 0.5], [0, 0.5, 0.6]], [number, 8, number, 8]
    )


def scattered(count: int, edge: float) -> Crystals:
    generator = torch.Generator().manual_seed(count)
    sites = torch.rand(count, 3, generator=generator, dtype=torch.float64)
    return crystal(cell(edge, edge, edge), sites, ([14, 8, 8, 11] * count)[:count])


def extremes() -> dict[str, Crystals]:
    found = dict(special())
    found |= {f"{distance} Å apart": close(distance) for distance in (0.0, 1e-10, 1e-7, 1e-5, 1e-3, 0.008, 0.02, 0.3)}
    found |= {f"element {number}": mixed(number) for number in (2, 10, 18, 36, 54, 86, 94, 96, 97, 104, 118)}
    found |= {f"layer {vacuum} {bump}": layer(vacuum, bump) for vacuum in (18.0, 40.0) for bump in (0.0, 1e-7, 0.2)}
    found["graphene"] = crystal(cell(2.46, 2.46, 20, 90, 90, 120), [[1 / 3, 2 / 3, 0.5], [2 / 3, 1 / 3, 0.5]], [6, 6])
    found["molecule"] = crystal(cell(15, 15, 15), [[0.5, 0.5, 0.5], [0.55, 0.53, 0.5], [0.46, 0.54, 0.51]], [8, 1, 1])
    found["chain"] = crystal(cell(2.9, 14, 15), [[0.5, 0.5, 0.5]], [79])
    found["alone"] = crystal(cell(30, 30, 30), [[0.5, 0.5, 0.5]], [29])
    found["tiny"] = crystal(cell(0.9, 0.9, 0.9), [[0.5, 0.5, 0.5]], [1])
    found["dense"] = scattered(6, 1.8)
    found["hundred"] = scattered(100, 12.0)
    # exact right angles and equal weights of many kinds: what rounding decides in pymatgen must be decided alike
    for seed in range(12):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:7]
        sites = torch.stack([order // 16, order // 4 % 4, order % 4], 1) / 4
        found[f"grid {seed}"] = crystal(cell(4, 3 + seed % 3, 5), sites.double(), [11, 17, 8, 26, 79, 6, 29])
    transforms = random_transforms(4, torch.Generator().manual_seed(0), skew=4)
    base = shaken(special()["NaCl"], 0.3, 1)
    found |= {f"skewed {at}": in_other_cell(base, transform[None]) for at, transform in enumerate(transforms)}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", extremes())
def test_extremes_against_matminer(matminer: Any, name: str) -> None:
    apart, failed, *_ = compared(matminer, [extremes()[name]])
    assert failed or apart.max() < CLOSE


def test_likelihoods_against_crystalnn() -> None:
    from pymatgen.analysis.local_env import CrystalNN

    crystals = Crystals.cat([shaken(one, 0.05, 3) for one in special().values()])
    faces, reasons = voronoi_faces(crystals)
    assert not reasons
    site, number, share, _ = coordination(weighed(faces, crystals.atomic_numbers.numpy()))
    first = 0
    for structure in to_pymatgen(crystals):
        for atom in range(min(8, len(structure))):
            want = CrystalNN().get_nn_data(structure, atom).cn_weights
            mine = site == first + atom
            found = dict(zip(number[mine].tolist(), share[mine].tolist(), strict=True))
            assert set(found) == set(want) - {0}
            assert all(math.isclose(found[cn], want[cn], abs_tol=1e-12) for cn in found)
        first += len(structure)


# ---- laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", special())
def test_only_the_structure_counts(name: str) -> None:
    one = shaken(special()[name], 0.05, 2)
    order = torch.randperm(int(one.num_atoms), generator=torch.Generator().manual_seed(0))
    transform = random_transforms(1, torch.Generator().manual_seed(1))[0]
    others = [rotated(one), relabelled(one, order), in_other_cell(one, transform[None]), one]
    values = fingerprints(Crystals.cat(others)).values
    np.testing.assert_allclose(values, values[-1:].repeat(4, 0), atol=1e-7)  # q2 of fcc: the root of 1e-17


def test_known_environments() -> None:
    known = special()
    values = fingerprints(Crystals.cat([known["diamond"], known["fcc"]])).values
    assert values[0, FEATURES.index("wt CN_4")] > 0.9
    assert values[0, FEATURES.index("tetrahedral CN_4")] == pytest.approx(
        values[0, FEATURES.index("wt CN_4")], abs=0.01
    )
    assert values[1, FEATURES.index("wt CN_12")] == pytest.approx(1)
    assert values[1, FEATURES.index("q6 CN_12")] == pytest.approx(0.57452, abs=1e-5)  # Steinhardt et al. 1983


def test_a_crystal_does_not_depend_on_its_batch() -> None:
    crystals = [one for name, one in extremes().items() if int(one.num_atoms) < 20 and not name.startswith("layer 40")]
    together = fingerprints(Crystals.cat(crystals))
    for at, one in enumerate(crystals):
        alone = fingerprints(one)
        assert alone.values[0].tobytes() == together.values[at].tobytes()
        assert alone.reasons.get(0) == together.reasons.get(at)


def test_reasons() -> None:
    good = special()["NaCl"]
    not_a_number = shaken(good, 0.0)
    not_a_number.frac_coords[3, 1] = math.nan
    endless = Crystals(good.frac_coords, good.lattice / 0.0, good.atomic_numbers, good.num_atoms)
    flat = Crystals(
        good.frac_coords, good.lattice * torch.tensor([[1.0], [1.0], [0.0]]), good.atomic_numbers, good.num_atoms
    )
    crowded = Crystals(good.frac_coords, good.lattice / 50, good.atomic_numbers, good.num_atoms)
    bad = [not_a_number, endless, flat, crowded, mixed(97), extremes()["molecule"]]
    found = fingerprints(Crystals.cat([good, *bad, good]))
    assert list(found.reasons) == [1, 2, 3, 4, 5, 6]
    said = ["not finite", "not finite", "flat", "neighbours within 7 Å", "atomic number 97", "No Voronoi neighbors"]
    assert all(part in found.reasons[at] for at, part in enumerate(said, 1))
    assert found.values[0].tobytes() == found.values[-1].tobytes() == fingerprints(good).values.tobytes()
    assert np.isnan(found.values[1:-1]).all()
    assert "want at most 10" in fingerprints(good, most=10).reasons[0]
    nothing = fingerprints(good[torch.zeros(0, dtype=torch.int64)])
    assert nothing.values.shape == (0, 61) and not nothing.reasons
