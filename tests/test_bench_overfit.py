"""The model and its sampler are right: 64 crystals learned by heart are predicted. `pytest -m bench -s` this file.

The first 64 crystals of mp20_bt with distinct compositions and 6 to 20 atoms; elements given, coordinates and lattice
from noise. Random coordinates in random cells match none.
"""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from train_jobs import ENV

from hpcgen.campaign.config import CampaignConfig
from hpcgen.campaign.generate import campaign
from hpcgen.crystal.composition import formula_key
from hpcgen.metrics.match import Comparison
from hpcgen.store.read import Store
from hpcgen.store.write import write_store

ROOT = Path(__file__).resolve().parent.parent
CSV = ROOT.parent / "shared" / "data" / "mp20_bt.csv.gz"
WORDS = ["steps=12000", "lr=1e-3", "warmup=100", "ema=0.995", "validate_every=0", "batch.crystals=64", "threads=1",
         "weight_decay=0", "betas=[0.9,0.99]", "autoperi.width=128", "autoperi.layers=4", "autoperi.pair_width=48",
         "autoperi.known_species=1", "autoperi.max_atoms=20", "save_every_s=120"]  # fmt: skip


@pytest.mark.bench
@pytest.mark.skipif(not CSV.exists(), reason="no real crystals in ../shared/data")
def test_64_crystals_are_learned_by_heart(tmp_path: Path) -> None:
    def call(*command: str | Path) -> None:
        subprocess.run([sys.executable, *command], env=ENV, cwd=ROOT, check=True)

    call("preprocess/mp20.py", CSV, "--out", tmp_path / "all", "--duplicates", "ignore", "--split", "none",
         "--edges", "none", "--no-page")  # fmt: skip
    store = Store(tmp_path / "all", dtype=None)
    chosen: dict[str, int] = {}
    for at, atoms in enumerate(store.sizes().atoms.tolist()):
        if 6 <= atoms <= 20 and len(chosen) < 64:
            chosen.setdefault(str(formula_key(store[at].crystals.atomic_numbers)), at)
    rows = store.rows(list(chosen.values()))
    write_store(tmp_path / "few", replace(store.head, settings={"first": 64}), [("train", rows)])
    (tmp_path / "empty.yaml").write_text("{}\n")
    call("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "hpcgen.cli", "train", tmp_path / "empty.yaml",
         f"store={tmp_path / 'few'}", f"out={tmp_path / 'run'}", *WORDS)  # fmt: skip

    made = tmp_path / "campaign"
    campaign(CampaignConfig(formulas=str(tmp_path / "few"), per_formula=3, checkpoint=str(tmp_path / "run/last.pt"),
                            out=str(made), steps=50, churn=1.0, speed=5.0))  # fmt: skip
    samples, place = Store(made, dtype=None), {id: at for at, id in enumerate(rows.ids)}
    targets = samples.column("target").values
    found = [Comparison().match(samples[k].crystals, rows.crystals[place[targets[k]]]) for k in range(len(samples))]
    rms = [match.rms for match in found if match is not None]
    print(f"\n{len(rms)} of {3 * 64} samples match, RMSE {sum(rms) / max(len(rms), 1):.3f}")
    assert len(rms) >= 0.9 * 3 * 64
