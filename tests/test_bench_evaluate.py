"""CDVAE's figures against the libraries called plainly, generated crystals beside real ones: equal, and faster.

`pytest -m bench -s` this file; HPCGEN_BENCH_CRYSTALS: crystals on each side (default 1000). Wants matminer.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign_jobs import run
from scipy.spatial.distance import cdist, pdist
from scipy.stats import wasserstein_distance
from test_fingerprints import real
from test_metrics import by_cdvae

from hpcgen.campaign.config import PACKAGED
from hpcgen.crystal.convert import to_pymatgen
from hpcgen.crystal.crystals import Crystals
from hpcgen.metrics.coverage import SCALE
from hpcgen.store.layout import Head
from hpcgen.store.read import Store
from hpcgen.store.rows import Rows
from hpcgen.store.write import write_store

ROOT = Path(__file__).resolve().parent.parent
N = int(os.environ.get("HPCGEN_BENCH_CRYSTALS", "1000"))
PROCESSES = 2


def plainly(structure: Any) -> tuple[bool, np.ndarray | None, np.ndarray | None, float, int]:
    """Valid?, structure and composition fingerprint, density, elements: as CDVAE's Crystal has them."""
    from matminer.featurizers.composition import ElementProperty
    from matminer.featurizers.site import CrystalNNFingerprint
    from pymatgen.core import Composition

    warnings.simplefilter("ignore")
    distances = structure.distance_matrix + np.diag(np.full(len(structure), 10.0))
    valid = bool(distances.min() >= 0.5 and structure.volume >= 0.1) and by_cdvae(list(structure.atomic_numbers))
    told = structure.density, len(set(structure.species))
    try:
        by_site = CrystalNNFingerprint.from_preset("ops")
        own = np.mean([by_site.featurize(structure, site) for site in range(len(structure))], axis=0)
        magpie = np.array(ElementProperty.from_preset("magpie").featurize(Composition(structure.composition)))
    except Exception:  # of any kind: the peers count it as invalid
        return False, None, None, *told
    return valid, own, magpie, *told


def figures(generated: list[Any], known: list[Any]) -> dict[str, float]:
    """The suite, from the definitions."""
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        ours, theirs = (pool.map(plainly, side, chunksize=8) for side in (generated, known))
    scale = json.loads(SCALE.read_text())
    mean, deviation = np.array(scale["means"]), np.array(scale["stds"])
    (own, own_magpie), (ref, ref_magpie) = (
        (np.array([row[1] for row in rows if row[1] is not None]),
         np.nan_to_num((np.array([row[2] for row in rows if row[2] is not None]) - mean) / deviation))
        for rows in (ours, theirs)
    )  # fmt: skip
    structure, composition = cdist(own, ref), cdist(own_magpie, ref_magpie)
    near = [(structure.min(axis) <= 0.4) & (composition.min(axis) <= 10.0) for axis in (0, 1)]
    valid = [row for row in ours if row[0]]
    scaled = np.nan_to_num((np.array([row[2] for row in valid]) - mean) / deviation)
    return {
        "valid": len(valid),
        "recall": near[0].mean(),
        "precision": near[1].sum() / len(ours),
        "amsd_recall": structure.min(0).mean(),
        "amsd_precision": structure.min(1).mean(),
        "amcd_recall": composition.min(0).mean(),
        "amcd_precision": composition.min(1).mean(),
        "density": wasserstein_distance([row[3] for row in valid], [row[3] for row in theirs]),
        "num_elements": wasserstein_distance([row[4] for row in valid], [row[4] for row in theirs]),
        "structure": pdist(np.array([row[1] for row in valid])).mean(),
        "composition": pdist(scaled).mean(),
    }


def stored(path: Path, crystals: Crystals) -> Path:
    ids = [f"c{at}" for at in range(len(crystals))]
    write_store(path, Head("test", {}, {}), [("train", Rows(crystals, ids, {}))])
    return path


@pytest.mark.bench
@pytest.mark.slow
def test_the_suite_against_the_libraries(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matminer", reason="matminer is not installed")
    known = Crystals.cat(real(N))
    run(PACKAGED, tmp_path / "made", n=N, steps=25, processes=PROCESSES)
    generated = Store(tmp_path / "made", dtype=None).rows(range(N)).crystals
    stores = [stored(tmp_path / name, side) for name, side in (("own", generated), ("known", known))]
    words = [
        *stores[:1],
        "--reference",
        stores[1],
        "--samples",
        N,
        "--processes",
        PROCESSES,
        "--json",
        tmp_path / "e.json",
    ]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpcgen.cli", "evaluate", *map(str, words)], cwd=ROOT, check=True,
                   capture_output=True)  # fmt: skip
    ours_s = time.perf_counter() - start
    start = time.perf_counter()
    wanted = figures(*(to_pymatgen(side) for side in (generated, known)))
    theirs_s = time.perf_counter() - start
    told = json.loads((tmp_path / "e.json").read_text())["figures"]
    flat = {"valid": told["samples"]["taken"], **told["wasserstein"]}
    for name, value in {**told["diversity"], **told["coverage"]}.items():
        flat[name] = value.get("share", value.get("mean")) if isinstance(value, dict) else value
    with capsys.disabled():
        print(f"\n{N} generated and {N} real crystals, {PROCESSES} processes: libraries {theirs_s:.1f} s, "
              f"hpcgen evaluate {ours_s:.1f} s, {theirs_s / ours_s:.1f} times as fast")  # fmt: skip
        for name, value in wanted.items():
            print(f"{name:16} {value:12.8f} {flat[name]:12.8f} {abs(value - flat[name]):.1e}")
    assert all(abs(value - flat[name]) < 1e-6 for name, value in wanted.items())
    assert theirs_s > 4 * ours_s
