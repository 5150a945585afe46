"""From a store to crystals: a model of one's own, edges of the store, and whether conditions steer the packaged one."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import store_rows
import torch
from campaign_jobs import content, run
from torch import Tensor, nn

from hpcgen.campaign.config import PACKAGED
from hpcgen.crystal.crystals import Crystals
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.models.batch import Batch
from hpcgen.models.registry import MODELS
from hpcgen.models.request import Request
from hpcgen.store.inspect import check
from hpcgen.store.read import Store
from hpcgen.store.write import write_store
from hpcgen.train.config import TrainConfig, load
from hpcgen.train.loop import train

pytestmark = pytest.mark.usefixtures("threads_restored")
QUICK = ["steps=6", "batch.crystals=8", "warmup=2", "validate_every=3", "tensorboard=false", "threads=1", "device=cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    parts = [("train", store_rows.rows(40, edges=True)), ("val", store_rows.rows(8, 1, first=40, edges=True))]
    write_store(path, replace(store_rows.HEAD, edges=store_rows.RADIUS), parts)
    return path


def test_edges_of_the_store_from_training_to_crystals(store: Path, tmp_path: Path) -> None:
    small = [f"autoperi.{word}" for word in ("width=16", "layers=1", "heads=2", "pair_width=4", "max_atoms=40")]
    words = [f"store={store}", f"out={tmp_path / 'run'}", *QUICK, *small]
    ends = {}
    for edges in ("store", "all"):
        out = tmp_path / edges
        train(load(TrainConfig, None, [*words, f"out={out}", f"autoperi.edges={edges}"]))
        ends[edges] = run(out / "last.pt", tmp_path / f"crystals-{edges}", n=24, steps=3)
        assert ends[edges].written + sum(ends[edges].rejected.values()) == 24
    seen = [Store(tmp_path / f"crystals-{edges}").rows(range(8)).crystals.frac_coords for edges in ends]
    assert seen[0].shape != seen[1].shape or not torch.equal(*seen), "the edges change what is seen"


@dataclass
class CubesConfig:
    edge: float = 4.0
    conditions: list[str] = field(default_factory=list)


class Cubes(nn.Module):
    """Learns one edge length for all crystals; makes cubes of it with atoms anywhere."""

    Config = CubesConfig
    TABLES = ("size_counts", "condition_range")

    def __init__(self, config: CubesConfig) -> None:
        super().__init__()
        self.config = config
        self.edge = nn.Parameter(torch.tensor(config.edge))
        self.register_buffer("size_counts", torch.zeros(41))
        self.register_buffer("condition_range", torch.zeros(0, 4))

    @classmethod
    def fitted(cls, config: CubesConfig, store: Store) -> "Cubes":
        model = cls(config)
        model.size_counts += torch.bincount(torch.from_numpy(store.sizes().atoms), minlength=41)
        return model

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        return {"loss": (batch.crystals.volume.pow(1 / 3) - self.edge).square().mean()}

    @torch.no_grad()
    def sample(self, request: Request, draw: Draw, go_on: Callable[[], None]) -> Crystals:
        go_on()
        length = request.species.shape[1]
        mask = torch.arange(length) < request.num_atoms[:, None]
        places = draw.uniform(Purpose.SITE, request.index, 0, length, 3)
        species = torch.where(request.species == 0, 14, request.species)
        cubes = self.edge * torch.eye(3).expand(len(mask), 3, 3)
        return Crystals(places[mask], cubes, species[mask], request.num_atoms)


@dataclass
class CubesTrainConfig(TrainConfig):
    model: str = "cubes"
    cubes: CubesConfig = field(default_factory=CubesConfig)


def test_a_model_of_ones_own_trains_and_samples(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "cubes", Cubes)
    train(load(CubesTrainConfig, None, [f"store={store}", f"out={tmp_path / 'run'}", "lr=0.1", *QUICK]), Cubes)
    checkpoint = tmp_path / "run" / "last.pt"
    free, asked = tmp_path / "free", tmp_path / "asked"
    for out, more in ((free, {}), (tmp_path / "again", {"tile": 8, "block": 8}), (asked, {"formula": "Na4Cl4"})):
        assert run(checkpoint, out, n=40, **more).written == 40 and check(out) == []
    edges = Store(free).rows(range(40)).crystals.volume.pow(1 / 3)
    assert edges.std() < 1e-5 and abs(float(edges[0]) - 4.0) > 0.05, "all the same, and learned"
    assert Store(asked).rows(range(40)).crystals.num_atoms.tolist() == [8] * 40
    known = set(Store(store, "train").sizes().atoms.tolist())
    assert set(Store(free).rows(range(40)).crystals.num_atoms.tolist()) <= known
    assert content(free) == content(tmp_path / "again"), "however it is cut into pieces"


@pytest.mark.parametrize(("name", "high", "low"), [("formation_energy_per_atom", -3.5, 0.3), ("band_gap", 6.0, 0.0)])
def test_conditions_steer_the_packaged_checkpoint(tmp_path: Path, name: str, high: float, low: float) -> None:
    """Stable and insulating crystals are mostly oxides and halides, unstable ones and metals seldom."""
    shares = []
    for value in (high, low):
        out = tmp_path / f"{value}"
        run(PACKAGED, out, n=32, steps=6, guidance=2.0, conditions={name: value}, tile=32)
        store = Store(out)
        elements = [set(store[k].crystals.atomic_numbers.tolist()) for k in range(len(store))]
        shares.append(sum(bool({8, 9, 17, 35} & some) for some in elements) / len(store))
    assert shares[0] > 0.6 and shares[1] < 0.35, shares
