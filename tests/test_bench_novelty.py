"""Uniqueness and novelty of many crystals: what brute force finds, and how the cost grows. `pytest -m bench -s` it.

HPCGEN_BENCH_N: the numbers of crystals, as 1000,10000,100000; HPCGEN_BENCH_STORE: a store of real crystals;
HPCGEN_BENCH_GENERATED: a campaign's; HPCGEN_BENCH_BRUTE: how many against how many are compared by brute force.
"""

import itertools
import os
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from known_crystals import many_shaken

from hpcgen.crystal.composition import formula_key
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.match import reduced_cell
from hpcgen.metrics.cells import Sets
from hpcgen.metrics.nearest import find_nearest
from hpcgen.metrics.same import MATCHERS, NONE, Same, find_same
from hpcgen.runner.blocks import How
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import find_team
from hpcgen.store.layout import Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store

STORE = Path(os.environ.get("HPCGEN_BENCH_STORE", "/work/tmp/st20"))
GENERATED = os.environ.get("HPCGEN_BENCH_GENERATED", "")  # a campaign's store, mixed in
NUMBERS = [int(n) for n in os.environ.get("HPCGEN_BENCH_N", "1000,10000,100000").split(",")]
BRUTE = tuple(int(n) for n in os.environ.get("HPCGEN_BENCH_BRUTE", "2000,600").split(","))
SHAKE = (0.0, 0.05, 0.15, 0.4)  # Å

pytestmark = pytest.mark.bench


def real() -> Store:
    if not STORE.exists():
        pytest.skip(f"{STORE} is not here")
    return Store(STORE, dtype=None, columns=[])


def mixed(count: int, known: Crystals) -> Crystals:
    """Of `count` a fifth generated ones where there are any, the others real ones and copies of them, shaken."""
    chance = np.random.Generator(np.random.Philox(count))
    parts = []
    if GENERATED:
        made = Store(GENERATED, dtype=torch.float64, columns=[])
        parts.append(made.rows(np.arange(min(len(made), count // 5))).crystals)
    left = count - sum(map(len, parts))
    picked = known[torch.from_numpy(chance.integers(0, len(known), left))]
    parts.append(many_shaken(picked, torch.from_numpy(chance.choice(SHAKE, left)), seed=count))
    whole = Crystals.cat(parts)
    return whole[torch.from_numpy(chance.permutation(len(whole)))]


def store(path: Path, crystals: Crystals) -> Path:
    write_store(path, Head("bench", {}, {}), [("all", Rows(crystals, [f"c{k}" for k in range(len(crystals))], {}))])
    return path


def found(sets: Sets, folder: Path, processes: int | None = None) -> tuple[Same, dict[str, float]]:
    """What is the same, and seconds of each part."""
    folder.mkdir()
    with StopFlag() as stop, Lease.take(folder, find_team()) as lease:
        began = time.monotonic()
        same = Same.load(
            find_same(sets, folder, lease=lease, stop=stop, how=How(processes, ("hpcgen.campaign.novelty",)))
        )
        middle = time.monotonic()
        if sets.reference is not None:
            find_nearest(sets, folder, lease=lease, stop=stop, how=How(processes, ("hpcgen.campaign.novelty",)))
    return same, {"same": middle - began, "nearest": time.monotonic() - middle}


def test_no_match_is_missed(tmp_path: Path) -> None:
    """Every pair of one formula given to StructureMatcher plainly; pymatgen reduces each crystal once, not per pair."""
    from pymatgen.analysis.structure_matcher import StructureMatcher

    count, of = BRUTE
    known = real().rows(np.arange(of) * (len(real()) // of)).crystals
    run = mixed(count, known)
    same, _ = found(
        Sets(store(tmp_path / "run", run), count, store(tmp_path / "known", known), None, of), tmp_path / "w"
    )
    formulas = defaultdict(list)
    for k, numbers in enumerate(Crystals.cat([known, run]).atomic_numbers.split([*known.num_atoms, *run.num_atoms])):
        formulas[formula_key(numbers)].append(k)
    whole = to_pymatgen(Crystals.cat([known, run]))
    reduced = [one.get_reduced_structure("niggli").get_primitive_structure() for one in whole]
    wanted = {name: np.zeros((count, 2), dtype=bool) for name in MATCHERS}
    pairs = 0
    for name, matcher in MATCHERS.items():
        plain = StructureMatcher(**asdict(matcher))
        for some in formulas.values():
            for one, other in itertools.combinations(some, 2):
                if other >= of:
                    fits = plain.fit(reduced[one], reduced[other], skip_structure_reduction=True)
                    wanted[name][other - of, int(one < of)] |= bool(fits)
                    pairs += 1
                    if pairs % 200 == 0:  # it is what whole crystals are told
                        assert fits == plain.fit(whole[one], whole[other])
    print(f"\n{pairs:,} pairs compared plainly")
    for t, name in enumerate(MATCHERS):
        assert (same.earlier[:, t] != NONE).tolist() == wanted[name][:, 0].tolist()
        assert (same.known[:, t] != NONE).tolist() == wanted[name][:, 1].tolist()
        groups = StructureMatcher(**asdict(MATCHERS[name])).group_structures(reduced[of:])
        print(f"{name}: {count - wanted[name][:, 0].sum()} unique, {len(groups)} groups of group_structures, "
              f"{wanted[name][:, 1].sum()} known")  # fmt: skip
    assert 0.2 < wanted["standard"][:, 0].mean() < 0.95 and same.compared.all()


def test_cost_grows_with_the_number(tmp_path: Path) -> None:
    known = real().rows(np.arange(min(17_000, len(real())))).crystals
    reference = store(tmp_path / "known", known)
    costs = []
    for count in NUMBERS:
        run = store(tmp_path / f"run{count}", mixed(count, known))
        same, seconds = found(Sets(run, count, reference, None, len(known)), tmp_path / f"w{count}")
        told = ", ".join(f"{what} {spent:.0f} s" for what, spent in seconds.items())
        unique, novel = ((rows[:, 0] == NONE).mean() for rows in (same.earlier, same.known))
        print(f"\n{count:,} against {len(known):,}: {told}")
        print(f"unique {unique:.3f}, novel {novel:.3f}")
        costs.append(sum(seconds.values()))
    for (few, less), (many, more) in itertools.pairwise(zip(NUMBERS, costs, strict=True)):
        assert more / less < (many / few) ** 1.3, "close to linear"


@pytest.mark.parametrize("size", [0.1, 0.4])
def test_many_of_one_formula(tmp_path: Path, size: float) -> None:
    """One crystal shaken, as predictions for one formula: every pair of cells maps, the dearest case.

    By 0.1 Å all are the same: the first comparison ends the search, and the cost grows with the number. By 0.4 Å,
    and at the strict tolerances, few are: most pairs must be told apart, at a fraction of what plain comparisons take.
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    known = real().rows([0]).crystals
    counts, costs = (60, 240), []
    for count in counts:
        run = many_shaken(known[torch.zeros(count, dtype=torch.int64)], torch.full((count,), size), seed=1)
        sets, began = Sets(store(tmp_path / f"run{count}", run), count), time.process_time()
        same, _ = found(sets, tmp_path / f"w{count}", processes=0)
        costs.append(time.process_time() - began)
        unique = (same.earlier == NONE).sum(0).tolist()
        print(f"\n{count:,} of one formula, {size} Å: {costs[-1]:.1f} s of one core, {unique} unique")
        assert (unique == [1, 1]) if size < 0.2 else (unique[1] > 20)
    power = 1.3 if size < 0.2 else 2.2
    assert costs[1] / costs[0] < (counts[1] / counts[0]) ** power
    plain, structures = StructureMatcher(), to_pymatgen(Crystals.cat([reduced_cell(run[k]) for k in range(8)]))
    began = time.process_time()
    for one, other in itertools.combinations(structures, 2):
        plain.fit(one, other, skip_structure_reduction=True)
    a_pair = (time.process_time() - began) / 28
    assert costs[1] < counts[1] * (counts[1] - 1) / 2 * a_pair * 2 / 10, "a tenth, at both tolerances"
