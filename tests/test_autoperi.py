"""The laws of AutoPeri in float64: translation, rotation, relabelling, padding and batching; its sampler."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import exponential, lattice_from_log_metric, log_metric
from hpcgen.crystal.torus import shortest_step, wrap
from hpcgen.diffusion import draw
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.diffusion.flow import SPREAD, centred
from hpcgen.errors import InputError, StoppedEarly
from hpcgen.models.autoperi import AutoPeri, Known, Noise
from hpcgen.models.autoperi_config import AutoPeriConfig
from hpcgen.models.batch import Batch
from hpcgen.models.dense import Dense
from hpcgen.models.request import Request
from hpcgen.nn.basis import Reach, nearest_images
from hpcgen.nn.transformer import ELEMENTS, Reading
from hpcgen.store.read import Store
from hpcgen.store.write import write_store

sys.path.insert(0, str(Path(__file__).parent))
import store_rows  # noqa: E402
from known_crystals import quartz, rotated, special, translated  # noqa: E402

TINY = AutoPeriConfig(width=32, layers=2, heads=4, pair_width=8, conditions=["band_gap"])
NAMES = ["NaCl", "fcc", "diamond", "hcp", "one atom", "skewed"]


def model(config: AutoPeriConfig = TINY) -> AutoPeri:
    """Random weights everywhere, the last layers too, so that nothing is zero by construction."""
    torch.manual_seed(0)
    made = AutoPeri(config).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        made.lattice_std.fill_(0.2)
        made.lattice_mean.copy_(torch.tensor([0.9, 0.9, 0.9, 0, 0, 0]))
        made.condition_range[:, :2] = torch.tensor([1.0, 2.0])
    return made.eval()


def crystals() -> Crystals:
    return Crystals.cat([quartz(1), *(special()[name] for name in NAMES)])


def batch_of(of: Crystals, step: int = 3) -> Batch:
    count = len(of)
    gaps = torch.linspace(0, 4, count).double()
    gaps[1::3] = float("nan")
    return Batch(of, torch.arange(count) + 5, step, {"band_gap": gaps})


def losses_of(net: AutoPeri, of: Crystals, noise: Noise, known: Known) -> dict[str, Tensor]:
    with torch.no_grad():
        return net.losses(Dense.of(of), noise, known)


def setting(net: AutoPeri, of: Crystals) -> tuple[Noise, Known]:
    """Chance of one step, some crystals with their elements given and some without."""
    batch, dense = batch_of(of), Dense.of(of)
    draw = Draw(11)
    noise = net.noise(batch, draw, dense.mask.shape[1])
    return noise, net._told_in_training(batch, draw, dense)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(abs(one[name] - other[name]) < 1e-9 for name in one)


@pytest.fixture(params=[None, (4.0, 0.0), (0.0, 3.0)], ids=["all", "radius", "nearest"])
def seen(request) -> AutoPeri:
    """A model whose atoms see all others, those within 4 Å, the 3 nearest."""
    net = model(TINY if request.param is None else replace(TINY, edges="store"))
    if request.param is not None:
        net.reach = torch.tensor(request.param)
    return net


def test_translation_and_rotation_leave_the_loss_alone(seen: AutoPeri) -> None:
    net, of = seen, crystals()
    noise, known = setting(net, of)
    plain = losses_of(net, of, noise, known)
    assert all(value > 0 for value in plain.values())
    each = [of[k] for k in range(len(of))]
    for k in range(len(each)):
        moved = [*each[:k], translated(each[k], [0.31, 0.77, 0.13]), *each[k + 1 :]]
        assert close(losses_of(net, Crystals.cat(moved), noise, known), plain)
        turned = [*each[:k], rotated(each[k], seed=k), *each[k + 1 :]]
        assert close(losses_of(net, Crystals.cat(turned), noise, known), plain)
        stretched = replace(each[k], lattice=each[k].lattice * 1.01)
        assert not close(losses_of(net, Crystals.cat([*each[:k], stretched, *each[k + 1 :]]), noise, known), plain)


def test_a_mirror_image_is_learned_as_the_crystal_it_is(seen: AutoPeri) -> None:
    net, of = seen, crystals()
    noise, known = setting(net, of)
    other, flipped = replace(of, frac_coords=wrap(-of.frac_coords)), replace(noise, mirrored=~noise.mirrored)
    plain = losses_of(net, of, noise, known)
    assert close(losses_of(net, other, flipped, known), plain)
    assert not close(losses_of(net, of, flipped, known), plain)


def test_relabelling_atoms_relabels_the_noise_and_nothing_else(seen: AutoPeri) -> None:
    net, of = seen, quartz(1)
    noise, known = setting(net, of)
    order = torch.tensor([4, 0, 8, 2, 1, 7, 3, 5, 6])
    other = Crystals(of.frac_coords[order], of.lattice, of.atomic_numbers[order], of.num_atoms)
    same_noise = Noise(noise.t, noise.mirrored, noise.sites[:, order], noise.lattice, noise.hide[:, order])
    plain = losses_of(net, of, noise, known)
    assert close(losses_of(net, other, same_noise, known), plain)
    assert not close(losses_of(net, other, noise, known), plain)


def test_what_the_network_says_turns_as_it_should(seen: AutoPeri) -> None:
    net = seen
    dense = Dense.of(crystals())
    noise, known = setting(net, crystals())
    vector = net.standard_lattice(dense.lattice, dense.num_atoms)

    def said(frac: Tensor, species: Tensor, mask: Tensor) -> Reading:
        with torch.no_grad():
            return net.read(noise.t, species, frac, vector, mask, known)

    plain = said(dense.frac, dense.species, dense.mask)
    moved = said((dense.frac + torch.tensor([0.2, 0.9, 0.4])) % 1.0, dense.species, dense.mask)
    order = torch.randperm(dense.mask.shape[1], generator=torch.Generator().manual_seed(0))
    mixed = said(dense.frac[:, order], dense.species[:, order], dense.mask[:, order])
    for mine, theirs, shuffled in zip(vars(plain).values(), vars(moved).values(), vars(mixed).values(), strict=True):
        kept = dense.mask if mine.ndim == 3 else slice(None)
        assert torch.allclose(mine[kept], theirs[kept], atol=1e-9)
        again = mine[:, order] if mine.ndim == 3 else mine
        kept = dense.mask[:, order] if mine.ndim == 3 else slice(None)
        assert torch.allclose(again[kept], shuffled[kept], atol=1e-9)


def test_padding_and_batching_change_nothing(seen: AutoPeri) -> None:
    net, of = seen, crystals()
    noise, known = setting(net, of)
    plain = losses_of(net, of, noise, known)
    alone = []
    for k in range(len(of)):
        atoms = int(of.num_atoms[k])
        one = Noise(
            noise.t[[k]], noise.mirrored[[k]], noise.sites[[k], :atoms], noise.lattice[[k]], noise.hide[[k], :atoms]
        )
        own = Known(known.species[[k]], known.conditions[[k]], known.elements[[k]])
        alone.append(losses_of(net, of[k], one, own))
    mean = {name: torch.stack([each[name] for each in alone]).mean() for name in plain}
    assert close(plain, mean)
    longer = Dense.of(of, 30)
    draw = Draw(11)
    wide = net.noise(batch_of(of), draw, 30)
    with torch.no_grad():
        assert close(net.losses(longer, wide, known), plain)


@pytest.mark.parametrize("reach", [(4.0, 0.0), (0.0, 2.0)])
def test_an_atom_out_of_reach_is_not_seen(reach: tuple[float, float]) -> None:
    net = model(replace(TINY, edges="store"))
    net.reach = torch.tensor(reach)
    frac = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.2, 0, 0], [0.55, 0, 0]], dtype=torch.float64)
    vector = torch.zeros(1, 6, dtype=torch.float64)
    known = Known(torch.tensor([True]), torch.full((1, 1), float("nan")), torch.zeros(1, ELEMENTS, dtype=torch.bool))

    def said(numbers: list[int], net: AutoPeri) -> Tensor:
        with torch.no_grad():
            cell = net.standard_lattice(20 * torch.eye(3, dtype=torch.float64)[None], torch.tensor([4])) + vector
            t = torch.tensor([1e-6]).double()
            return net.read(t, torch.tensor([numbers]), frac[None], cell, torch.ones(1, 4).bool(), known).sites[0]

    one, other = said([11, 17, 11, 8], net), said([11, 17, 11, 9], net)
    assert torch.equal(one[:3], other[:3]) and not torch.equal(one[3], other[3])
    net.reach = None
    assert not torch.equal(said([11, 17, 11, 8], net)[0], said([11, 17, 11, 9], net)[0])


def test_the_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    net, of = model(), crystals()
    whole = net.noise(batch_of(of), Draw(11), 9)
    part = batch_of(of)
    part = Batch(of[[2, 4]], part.index[[2, 4]], part.step)
    for one, other in zip(vars(whole).values(), vars(net.noise(part, Draw(11), 9)).values(), strict=True):
        assert torch.equal(one[[2, 4]], other)


def test_a_new_model_takes_its_scales_from_the_store(tmp_path: Path) -> None:
    config = AutoPeriConfig(width=32, layers=1, heads=4, pair_width=8, max_atoms=12, edges="store")
    for name, edges in (("bare", None), ("joined", store_rows.RADIUS)):
        rows = store_rows.rows(40, edges=edges is not None)
        write_store(tmp_path / name, replace(store_rows.HEAD, edges=edges), [("train", rows)])
    with pytest.raises(InputError, match="keeps no edges, want some for autoperi.edges = store"):
        AutoPeri.fitted(config, Store(tmp_path / "bare"))
    net = AutoPeri.fitted(config, Store(tmp_path / "joined"))
    assert net.reach is not None and net.reach.tolist() == [4.0, 0.0]
    assert net.size_counts.sum() == 40 and net.size_counts[0] == 0
    again = AutoPeri(config)
    again.load_state_dict(net.state_dict())
    assert again._reach() == Reach(cutoff=4.0)
    assert "reach" not in AutoPeri(replace(config, edges="all")).state_dict()
    with pytest.raises(InputError, match="want autoperi.max_atoms >= that"):
        AutoPeri.fitted(replace(config, max_atoms=5), Store(tmp_path / "bare"))


def test_a_missing_condition_trains_as_absent() -> None:
    net, of = model(replace(TINY, condition_dropout=0.0)), crystals()
    _, known = setting(net, of)
    assert known.conditions.isnan()[:, 0].tolist() == batch_of(of).conditions["band_gap"].isnan().tolist()
    net = model(replace(TINY, condition_dropout=1.0))
    assert setting(net, of)[1].conditions.isnan().all()


def test_lattice_vectors_come_back() -> None:
    net, of = model(), crystals()
    vector = net.standard_lattice(of.lattice, of.num_atoms)
    back = net.real_lattice(vector, of.num_atoms)
    assert torch.allclose(back @ back.mT, of.lattice @ of.lattice.mT, atol=1e-9)
    assert torch.allclose(lattice_from_log_metric(log_metric(of.lattice)), back, atol=1e-9)


class Oracle(AutoPeri):
    """Knows the crystals: says what the loss would want to hear."""

    truth: Dense

    def read(self, t, species, sites, lattice, mask, known) -> Reading:
        sigma = self.lattice_noise.at(t)[:, None]
        way = shortest_step(sites, self.truth.frac) / (t[:, None, None] * SPREAD)
        root = (1 + sigma.square()).sqrt()
        clean = self.standard_lattice(self.truth.lattice, self.truth.num_atoms)
        logits = 60.0 * torch.nn.functional.one_hot((self.truth.species - 1).clamp_min(0), ELEMENTS)
        return Reading(way, (clean - lattice / root.square()) * root / sigma, logits.to(way.dtype))


@pytest.mark.parametrize("how", [{"steps": 8}, {"steps": 50}, {"steps": 50, "churn": 1.0}, {"steps": 40, "speed": 1.0}])
@pytest.mark.parametrize("given", [True, False])
def test_with_a_network_that_knows_the_crystals_sampling_gives_them(how: dict, given: bool) -> None:
    of = crystals().to(dtype=torch.float32)
    net = Oracle(replace(TINY, conditions=[]))
    net.truth = Dense.of(of)
    species = net.truth.species if given else torch.zeros_like(net.truth.species)
    out = net.sample(Request(torch.arange(len(of)), of.num_atoms, species, **how), Draw(5))
    assert torch.equal(out.atomic_numbers, of.atomic_numbers) and torch.equal(out.num_atoms, of.num_atoms)
    assert torch.allclose(out.lattice @ out.lattice.mT, of.lattice @ of.lattice.mT, rtol=1e-3, atol=1e-3)
    dense = Dense.of(out)
    apart = dense.frac - net.truth.frac
    apart = centred(apart - apart[:, :1] - (apart - apart[:, :1]).round(), dense.mask)  # up to a translation
    assert apart.abs().max() < 1e-3


def test_noise_is_added_before_every_step_but_the_first_and_the_last() -> None:
    class Watched(Oracle):
        def read(self, t, *told) -> Reading:
            times.append(float(t[0]))
            return super().read(t, *told)

    times: list[float] = []
    of = crystals().to(dtype=torch.float32)
    net = Watched(replace(TINY, conditions=[]))
    net.truth = Dense.of(of)
    net.sample(Request(torch.arange(len(of)), of.num_atoms, net.truth.species, steps=5, churn=0.5), Draw(5))
    assert times == pytest.approx([1.0, 0.9, 0.7, 0.5, 0.2])


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    net = model(replace(TINY, conditions=[])).float()
    counts = torch.tensor([3, 5, 2, 4])
    species = torch.zeros(4, 5, dtype=torch.int64)
    request = Request(torch.arange(4) + 7, counts, species, steps=5, churn=0.5)
    one, again, other = (net.sample(request, Draw(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.frac_coords, again.frac_coords) and torch.equal(one.lattice, again.lattice)
    assert not torch.equal(one.frac_coords, other.frac_coords)
    turned = net.sample(replace(request, index=request.index.flip(0), num_atoms=counts.flip(0)), Draw(1))
    for k in range(4):
        mine, theirs = one[k], turned[3 - k]
        assert torch.equal(mine.atomic_numbers, theirs.atomic_numbers)
        assert torch.allclose(mine.lattice, theirs.lattice, rtol=1e-3)


class Waits(TorchDispatchMode):
    """What was done for which a host waits for its GPU: a value read or copied there, a result of unknown size."""

    KINDS = {"_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "linalg_matrix_exp", "_linalg_eigh"}

    def __init__(self) -> None:
        super().__init__()
        self.met: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(at is not None and at.dtype == torch.bool for at in args[1])
        self.met |= {name} & self.KINDS | ({"index by a mask"} if by_mask else set())
        return func(*args, **(kwargs or {}))


def test_no_sampling_step_makes_the_host_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with Waits() as seen:
        some = torch.tensor([1.0, 2.0])
        some[some > 1], bool(some.any()), some.nonzero(), torch.linalg.matrix_exp(torch.eye(3)[None])
    assert seen.met == {"lift_fresh", "index by a mask", "_local_scalar_dense", "nonzero", "linalg_matrix_exp"}

    monkeypatch.setattr(draw, "_look", lambda *told: None)  # this and the next are otherwise on a GPU
    monkeypatch.setattr(torch.linalg, "matrix_exp", exponential)
    net, watch, begun = model().float(), Waits(), []

    def go_on() -> None:
        begun.append(0)
        if len(begun) == 2:  # after what is done once
            watch.__enter__()
        if len(begun) == 5:
            watch.__exit__(None, None, None)
            raise StoppedEarly("enough")

    request = Request(torch.arange(8), torch.full((8,), 4), torch.zeros(8, 4, dtype=torch.int64), {"band_gap": 3.0},
                      steps=6, churn=1.0, speed=5.0, guidance=2.0)  # fmt: skip
    with pytest.raises(StoppedEarly):
        net.sample(request, Draw(1), go_on)
    assert watch.met == set()


def test_guidance_of_one_is_none_and_more_goes_further() -> None:
    net = model().float()
    species = torch.zeros(2, 4, dtype=torch.int64)
    request = Request(torch.arange(2), torch.tensor([4, 3]), species, {"band_gap": 3.0}, (8, 22), steps=4)
    plain, stronger = net.sample(request, Draw(1)), net.sample(replace(request, guidance=3.0), Draw(1))
    free = net.sample(replace(request, conditions={}, elements=()), Draw(1))
    assert not torch.equal(plain.lattice, stronger.lattice) and not torch.equal(plain.lattice, free.lattice)


def test_no_elements_but_those_of_the_system_are_taken() -> None:
    net = model(replace(TINY, conditions=[])).float()
    request = Request(torch.arange(8), torch.full((8,), 4), torch.zeros(8, 4, dtype=torch.int64), steps=4)
    assert len(net.sample(request, Draw(1)).atomic_numbers.unique()) > 3
    assert set(net.sample(replace(request, elements=(3, 15, 16)), Draw(1)).atomic_numbers.tolist()) <= {3, 15, 16}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_crystal_whose_elements_are_not_finite_is_not_finite(value: float) -> None:
    class Poisoned(AutoPeri):
        def read(self, *told) -> Reading:
            said = super().read(*told)
            said.species[0, 1, 7] = value
            return said

    torch.manual_seed(0)
    net = Poisoned(replace(TINY, conditions=[])).eval()
    request = Request(torch.arange(3), torch.tensor([4, 4, 3]), torch.zeros(3, 4, dtype=torch.int64), steps=3)
    out = net.sample(request, Draw(1))
    assert [bool(out[k].frac_coords.isfinite().all()) for k in range(3)] == [False, True, True]


@pytest.mark.slow
def test_the_network_is_one_graph_for_all_sizes_where_it_is_compiled() -> None:
    """Traced as `compile=true` has it, but run as it stands: the compiler itself takes minutes."""
    from torch._dynamo.utils import counters  # two seconds, for this test alone

    torch.compiler.reset()
    counters.clear()
    plain = model(replace(TINY, layers=1)).float()
    compiled = copy.deepcopy(plain)
    compiled.compile(backend="eager", fullgraph=True)  # a part that cannot be traced raises
    of, gradients = crystals().to(dtype=torch.float32), []
    for some in (of, of[torch.tensor([0, 1])], of[torch.tensor([2, 3, 4])]):
        for net in (plain, compiled):
            net.zero_grad()
            net(batch_of(some), Draw(1))["loss"].backward()
        gradients += [
            (one.grad, other.grad) for one, other in zip(plain.parameters(), compiled.parameters(), strict=True)
        ]
    assert all(one is not None and torch.equal(one, other) for one, other in gradients)
    assert counters["stats"]["unique_graphs"] == 1
    assert compiled.state_dict().keys() == plain.state_dict().keys(), "checkpoints do not show it"


def test_the_loss_falls() -> None:
    torch.manual_seed(0)
    net, of = AutoPeri(replace(TINY, conditions=[])), crystals().to(dtype=torch.float32)
    optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
    draw, index, seen = Draw(0), torch.arange(len(of)), []
    for step in range(300):
        optimiser.zero_grad()
        loss = net(Batch(of, index, step), draw)["loss"]
        loss.backward()
        optimiser.step()
        seen.append(loss.item())
    assert sum(seen[-20:]) < 0.75 * sum(seen[:20])


@pytest.mark.parametrize("purpose", [Purpose.SITE, Purpose.LATTICE])
def test_training_noise_changes_with_step_and_sample(purpose: Purpose) -> None:
    net, of = model(), crystals()
    first, later = net.noise(batch_of(of, 3), Draw(1), 9), net.noise(batch_of(of, 4), Draw(1), 9)
    name = {Purpose.SITE: "sites", Purpose.LATTICE: "lattice"}[purpose]
    assert not torch.equal(getattr(first, name), getattr(later, name))
    assert len(getattr(first, name).flatten(1).unique(dim=0)) == len(of)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_geometry_alone(precision: torch.dtype) -> None:
    dense = Dense.of(crystals().to(dtype=torch.float32))
    plain = nearest_images(dense.frac, dense.lattice)
    with torch.autocast("cpu", precision):
        half = nearest_images(dense.frac, dense.lattice)
    assert all(torch.equal(one, other) for one, other in zip(plain, half, strict=True))
