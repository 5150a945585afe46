"""Rectified training: a model's own crystals with the noise they were made of, so that few steps do."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from campaign_jobs import make_checkpoint
from campaign_jobs import run as campaign
from test_autoperi import TINY, model
from torch import Tensor
from train_jobs import make_store, newest, tensors

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.torus import shortest_step, wrap
from hpcgen.diffusion.draw import Draw
from hpcgen.errors import InputError, StoppedEarly, UsageError
from hpcgen.models.autoperi import AutoPeri, Known
from hpcgen.models.batch import Batch, Origin
from hpcgen.models.dense import Dense, occupied
from hpcgen.models.request import Request
from hpcgen.models.saved import MODEL, read_saved
from hpcgen.nn.transformer import ELEMENTS, Reading
from hpcgen.train.config import TrainConfig, load
from hpcgen.train.loop import train

pytestmark = pytest.mark.usefixtures("threads_restored")
BARE = replace(TINY, conditions=[])
INDEX = torch.tensor([40, 3, 8, 15])
COUNTS = torch.tensor([3, 5, 2, 4])


def request(steps: int) -> Request:
    species = torch.where(occupied(COUNTS, 5), torch.tensor([11, 17, 8, 22, 8]), 0)
    return Request(INDEX, COUNTS, species, steps=steps)


def batch(of: Crystals, step: int = 0, seed: int = 9) -> Batch:
    """Samples of a training set, whose places there are not those in the campaign of that seed."""
    return Batch(of, torch.arange(len(of)) + 70, step, {}, Origin(Draw(seed), INDEX))


def test_at_time_one_stands_what_the_crystals_were_made_of() -> None:
    net = model(BARE).float()
    made = net.sample(request(7), Draw(9))
    dense = Dense.of(made)
    noise = net.noise(batch(made), Draw(1), 5)
    sites, lattice = net._start(Draw(9), INDEX, 5)
    assert noise.mirrored.any() and not noise.mirrored.all()
    turned = torch.where(noise.mirrored[:, None, None], -1.0, 1.0)
    apart = shortest_step(wrap(turned * dense.frac + noise.sites), turned * sites)
    assert apart[dense.mask].abs().max() < 1e-6
    clean = net.standard_lattice(dense.lattice, dense.num_atoms)
    assert torch.allclose(clean + net.lattice_noise.most * noise.lattice, lattice, atol=1e-3)
    free = net.noise(replace(batch(made), origin=None), Draw(1), 5)
    assert torch.equal(free.t, noise.t) and torch.equal(free.hide, noise.hide)
    assert not torch.equal(free.sites, noise.sites) and not torch.equal(free.lattice, noise.lattice)
    part = Batch(made[[2, 1]], torch.tensor([72, 71]), 0, {}, Origin(Draw(9), INDEX[[2, 1]]))
    assert torch.allclose(net.noise(part, Draw(1), 5).sites, noise.sites[[2, 1]], atol=1e-6)


class Straight(AutoPeri):
    """Says of every place on a way what it says of the start: its ways are straight."""

    from_start: Reading
    start: tuple[Tensor, Tensor]

    def read(self, t, species, sites, lattice, mask, known) -> Reading:
        sigma = self.lattice_noise.at(t)[:, None]
        root = (1 + sigma.square()).sqrt()
        clean = self.start[1] / (1 + self.lattice_noise.most**2)
        return Reading(self.from_start.sites, (clean - lattice / root.square()) * root / sigma, self.from_start.species)


def straight() -> Straight:
    torch.manual_seed(3)
    net = Straight(BARE)
    net.lattice_std.fill_(0.2)
    net.start = net._start(Draw(9), INDEX, 5)
    net.from_start = Reading(torch.randn(4, 5, 3) * 0.4, torch.zeros(4, 6), torch.zeros(4, 5, ELEMENTS))
    net.from_start.sites[:] -= net.from_start.sites.mean(1, keepdim=True)
    return net


@pytest.mark.parametrize("seed", [9, 10])
def test_of_straight_ways_any_number_of_steps_makes_the_same_and_there_is_no_loss(seed: int) -> None:
    net = straight()
    one, many = net.sample(request(1), Draw(9)), net.sample(request(12), Draw(9))
    assert shortest_step(one.frac_coords, many.frac_coords).abs().max() < 1e-5
    assert torch.allclose(one.lattice, many.lattice, rtol=1e-4)
    dense = Dense.of(one)
    told = Known(torch.ones(4).bool(), torch.zeros(4, 0), torch.zeros(4, ELEMENTS).bool())
    noise = net.noise(batch(one, seed=seed), Draw(1), 5)
    turned = torch.where(noise.mirrored[:, None, None], -1.0, 1.0)  # back: such a network knows no mirror images
    losses = net.losses(dense, replace(noise, mirrored=torch.zeros(4).bool(), sites=turned * noise.sites), told)
    assert losses["lattice"] < 1e-6
    assert losses["sites"] < 1e-9 if seed == 9 else losses["sites"] > 0.1, "nor is any other noise theirs"


class Two(AutoPeri):
    """Knows that all crystals have one of two cells: says the mean of what a noised one may have been."""

    def read(self, t, species, sites, lattice, mask, known) -> Reading:
        sigma = self.lattice_noise.at(t)[:, None]
        root = (1 + sigma.square()).sqrt()
        cells = torch.tensor([[1.0], [-1.0]]).expand(2, 6)
        clean = (-torch.cdist(lattice, cells).square() / (2 * sigma.square())).softmax(-1) @ cells
        nothing = torch.zeros(*sites.shape[:2], ELEMENTS)
        return Reading(torch.zeros_like(sites), (clean - lattice / root.square()) * root / sigma, nothing)


def test_training_makes_few_steps_do() -> None:
    """Not so the ordinary one: the best that it can say at first is the mean of both cells, as this teacher does."""
    small = replace(BARE, layers=1, heads=2, pair_width=4, frequencies=1, radial=2)
    torch.manual_seed(0)
    teacher, net = Two(small), AutoPeri(small)
    teacher.lattice_std.fill_(0.1)
    net.lattice_std.fill_(0.1)

    def cells(of: AutoPeri, index: Tensor, steps: int) -> Tensor:
        ones = torch.ones(len(index), 1, dtype=torch.int64)
        made = of.sample(Request(index, ones[:, 0], ones, steps=steps), Draw(9))
        return of.standard_lattice(made.lattice, made.num_atoms)

    made, new, ones = cells(teacher, torch.arange(512), 60), torch.arange(5000, 5512), torch.ones(128).long()
    assert ((made.abs() - 1).abs() < 0.05).all(), "one of the two"
    optimiser = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(150):
        index = torch.randint(512, (128,))
        crystals = Crystals(torch.zeros(128, 3), net.real_lattice(made[index], ones), ones, ones)
        optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / 150)
        optimiser.zero_grad()
        net(Batch(crystals, index, step, {}, Origin(Draw(9), index)), Draw(0))["lattice"].backward()
        optimiser.step()
    end = cells(teacher, new, 60)
    learned, before = ((cells(of, new, 1) - end).square().mean().sqrt().item() for of in (net, teacher))
    assert before > 0.7 and learned < 0.5 * before, (learned, before)


SMALL = ("model=autoperi", "batch.crystals=8", "steps=8", "lr=1e-3", "warmup=2", "save_every_s=0", "tensorboard=false",
         "threads=1", "validate_every=0", "rectify=true", "split=all", "conditions=[band_gap]", "autoperi.width=16",
         "autoperi.layers=1", "autoperi.heads=2", "autoperi.pair_width=4")  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and a campaign of it."""
    folder = tmp_path_factory.mktemp("pairs")
    checkpoint = make_checkpoint(folder / "model.pt")
    campaign(checkpoint, folder / "pairs", n=32, seed=9, formula="Na4Cl4", steps=4, churn=0.0)
    return checkpoint, folder / "pairs"


def trained(pairs: tuple[Path, Path], out: Path, *words: str) -> None:
    train(load(TrainConfig, None, [f"init={pairs[0]}", f"store={pairs[1]}", f"out={out}", *SMALL, *words]))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_stopped_and_resumed_is_not_stopped(pairs: tuple[Path, Path], tmp_path: Path, precision: str) -> None:
    trained(pairs, tmp_path / "whole", f"precision={precision}")
    with pytest.raises(StoppedEarly):
        trained(pairs, tmp_path / "parts", f"precision={precision}", "time_limit_s=0.001")
    assert newest(tmp_path / "parts")["progress"]["step"] == 1
    trained(pairs, tmp_path / "parts", f"precision={precision}")
    one, other = tensors(newest(tmp_path / "whole")), tensors(newest(tmp_path / "parts"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_model_keeps_its_scales_and_tables_and_samples(pairs: tuple[Path, Path], tmp_path: Path) -> None:
    trained(pairs, tmp_path / "run")
    old, new = (read_saved(path, MODEL) for path in (pairs[0], tmp_path / "run" / "last.pt"))
    assert old["config"] == new["config"] and old["weights"].keys() == new["weights"].keys()
    for name in ("lattice_mean", "lattice_std", "size_counts", "condition_range"):
        assert torch.equal(old["weights"][name], new["weights"][name])
    assert campaign(tmp_path / "run" / "last.pt", tmp_path / "crystals", n=8, steps=2).written


def test_what_cannot_be_rectified(pairs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="want init=MODEL.pt"):
        load(TrainConfig, None, ["store=a", "out=b", "rectify=true"])
    with pytest.raises(InputError, match="want a campaign's"):
        trained((pairs[0], make_store(tmp_path / "store")), tmp_path / "a")
    campaign(pairs[0], tmp_path / "churned", n=8, churn=1.0)
    with pytest.raises(InputError, match=r"made with churn = 1.0, want --churn 0"):
        trained((pairs[0], tmp_path / "churned"), tmp_path / "b")
    for name, value in (("conditions", {"band_gap": 1.0}), ("guidance", 2.0), ("elements", "Na-Cl")):
        campaign(pairs[0], tmp_path / name, n=8, churn=0.0, **{name: value})
        with pytest.raises(InputError, match=f"made with {name} = .*want it left out"):
            trained((pairs[0], tmp_path / name), tmp_path / f"to-{name}")
    other = make_checkpoint(tmp_path / "other.pt", seed=1)
    with pytest.raises(InputError, match="is not the model that made"):
        trained((other, pairs[1]), tmp_path / "c")
