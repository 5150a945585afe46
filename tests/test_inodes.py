"""Files and folders of run folders, which file systems of clusters count: `pytest -s tests/test_inodes.py` tells."""

from pathlib import Path

import pytest
from campaign_jobs import SHORT
from campaign_jobs import run as run_campaign
from train_jobs import make_store
from train_jobs import run as run_training

from hpcgen.campaign import generate
from hpcgen.campaign.blocks import blocks_of
from hpcgen.campaign.config import TILE, CampaignConfig
from hpcgen.errors import StoppedEarly
from hpcgen.runner.team import Team

MOST = 500  # of a run folder
BESIDE = 15  # of a finished campaign, beside its blocks
RESTARTS = 20

pytestmark = pytest.mark.usefixtures("threads_restored")


def inodes(folder: Path) -> int:
    """The folder itself, and all files and folders in it."""
    return 1 + sum(1 for _ in folder.rglob("*"))


def test_a_finished_campaign_is_its_blocks_and_a_few_files(checkpoint: Path, tmp_path: Path) -> None:
    run, block = tmp_path / "run", SHORT["block"]
    beside = []
    for n in (block, 5 * block, 10 * block - 1):
        run_campaign(checkpoint, run, n=n)
        blocks = blocks_of(run, n, block)
        assert all(made.path.exists() for made in blocks)
        beside.append(inodes(run) - len(blocks))
        print(f"\n{n} crystals in {len(blocks)} blocks: {inodes(run)} inodes, {beside[-1]} beside the blocks", end="")
    assert len(blocks) == 10
    assert len(set(beside)) == 1 and beside[0] <= BESIDE


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("ranks", "cores"), [(1, 1), (1, 64), (8, 1), (8, 8), (32, 1), (32, 3), (8, 16)])
def test_a_million_crystals_are_few_files(ranks: int, cores: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the size of a block that a launch of so many ranks, each with so many cores, takes by default."""
    monkeypatch.setattr(generate, "usable_cores", lambda: cores)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cores))
    config = CampaignConfig(n=1_000_000, device=device, tile=TILE[device])
    team = Team("alone" if ranks == 1 else "mpi", 0, ranks, "token")
    size = generate._block_size(config, team)
    blocks = blocks_of(Path("run"), config.asked, size)
    assert sum(block.size for block in blocks) == config.asked
    print(f"\n{ranks} ranks, {cores} cores each, {device}: {len(blocks)} blocks of {size}", end="")
    assert ranks <= len(blocks) < MOST - BESIDE


@pytest.mark.parametrize("workers", [1, 3, 64, 128, 200, 300, 400, 512, 1024])
def test_blocks_keep_all_workers_busy(workers: int) -> None:
    config = CampaignConfig(n=1_000_000, device="cpu", tile=TILE["cpu"], processes=0)
    size = generate._block_size(config, Team("mpi", 0, workers, "token"))
    blocks = -(-config.asked // size)
    rounds = -(-blocks // workers)
    assert config.asked / size / (rounds * workers) > 0.85, f"{blocks} blocks for {workers} workers"


def test_a_training_stopped_again_and_again_is_few_files(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    store, run = make_store(tmp_path / "store"), tmp_path / "run"
    words = (f"steps={2 * RESTARTS}", "tensorboard=true")
    counts = []
    for _ in range(RESTARTS):
        with pytest.raises(StoppedEarly, match="time limit"):
            run_training(store, run, *words, "time_limit_s=0.001")
        counts.append(inodes(run))
    assert run_training(store, run, *words).step == 2 * RESTARTS
    counts.append(inodes(run))
    added = [after - before for before, after in zip(counts, counts[1:], strict=False)]
    print(f"\n{RESTARTS} restarts: {counts[0]} inodes at first, {counts[-1]} at last; each added {added}", end="")
    assert len(list((run / "tensorboard").iterdir())) == RESTARTS + 1
    assert counts[-1] < MOST
    assert set(added[5:]) == {1}  # once there are as many checkpoints as are kept, a TensorBoard file each
