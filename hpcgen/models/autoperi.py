"""AutoPeri: elements, coordinates and lattice made together, one network for prediction and free generation.

With the time t from 0 (a crystal) to 1 (noise):
* coordinates flow on the torus (diffusion.flow), and the network says the way back;
* the lattice is a vector that no rotation changes, ½ log(L Lᵀ) less log(atoms)/3 on the diagonal, standardised, with
  normal noise of σ(t) and the preconditioning of Karras et al. 2022 (EDM, eq. 7 for σ_data = 1);
* elements are hidden with probability t, and the network says which they are. Given elements are never hidden.

With `edges: store` atoms see each other as the store's rule for edges (radius or nearest) has it, applied to the noised
crystal: the edges of the crystal itself would tell where its atoms belong.

Few calls of the network do where the ways are straight. Crystals that the model itself made without churn, each learned
with the noise it was made of in place of any, have one way each, and the model need not find a mean of many: rectified
flow (Liu, Gong and Liu 2023, "Flow straight and fast", their reflow). It asks for no other network, loss or sampler.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_from_log_metric, log_metric
from hpcgen.crystal.torus import shortest_step, wrap
from hpcgen.diffusion.draw import Draw, Purpose
from hpcgen.diffusion.flow import SPREAD, added, centred
from hpcgen.diffusion.schedules import Schedule
from hpcgen.errors import InputError
from hpcgen.models.autoperi_config import AutoPeriConfig
from hpcgen.models.batch import Batch, Origin
from hpcgen.models.dense import Dense, occupied
from hpcgen.models.request import Request
from hpcgen.nn.basis import Reach, time_features
from hpcgen.nn.transformer import ELEMENTS, CrystalTransformer, Reading, Shape
from hpcgen.store.read import Store

TIMES, SIZES = 32, 16  # features of the time, of the number of atoms


@dataclass(frozen=True)
class Known:
    """What is told of B crystals beside their noised state."""

    species: Tensor  # (B,) bool: the elements of the sites are given
    conditions: Tensor  # (B, C) standardised, NaN where left out
    elements: Tensor  # (B, ELEMENTS) bool: of the chemical system; all False where it is left out

    def without(self) -> "Known":
        """The same with every condition left out."""
        return Known(self.species, torch.full_like(self.conditions, math.nan), torch.zeros_like(self.elements))


@dataclass(frozen=True)
class Noise:
    """The chance in one training step of B crystals of up to N atoms."""

    t: Tensor  # (B,) in [0, 1)
    mirrored: Tensor  # (B,) bool: the mirror image is learned, which is as good a crystal
    sites: Tensor  # (B, N, 3) uniform in [-1/2, 1/2): the way of each site, in cell units
    lattice: Tensor  # (B, 6) standard normal
    hide: Tensor  # (B, N) uniform: an element is hidden where it is below t


class AutoPeri(nn.Module):
    """`forward` is the loss, `sample` gives crystals."""

    Config = AutoPeriConfig
    TABLES = ("size_counts",)  # taken from the store of a training, also where it begins with a trained model
    RECTIFIES = True
    INNER = ("network.told.", "network.modulation.", "network.layers.")

    lattice_mean: Tensor
    lattice_std: Tensor
    size_counts: Tensor
    condition_range: Tensor
    reach: Tensor | None

    def __init__(self, config: AutoPeriConfig) -> None:
        super().__init__()
        self.config = config.checked()
        told = TIMES + SIZES + 6 + 2 * len(config.conditions) + ELEMENTS + 2
        self.network = CrystalTransformer(
            Shape(config.width, config.layers, config.heads, config.pair_width,
                  config.frequencies, config.radial, config.cutoff, told)
        )  # fmt: skip
        self.register_buffer("lattice_mean", torch.zeros(6))
        self.register_buffer("lattice_std", torch.ones(6))
        self.register_buffer("size_counts", torch.zeros(config.max_atoms + 1))  # of the training crystals, by size
        # mean, deviation, least and most of each condition
        self.register_buffer("condition_range", torch.zeros(len(config.conditions), 4))
        # of edges = store: Å, and atoms; 0 where there is no bound
        self.register_buffer("reach", torch.zeros(2) if config.edges == "store" else None)
        self.lattice_noise = Schedule(*config.lattice_sigma, config.schedule)

    @classmethod
    def fitted(cls, config: AutoPeriConfig, store: Store) -> "AutoPeri":
        """A new model whose scales are those of the crystals of a store. Raises InputError for crystals too large."""
        model = cls(config)
        sizes = torch.from_numpy(store.sizes().atoms)
        if sizes.max() > config.max_atoms:
            raise InputError(f"{store.path}: a crystal has {sizes.max()} atoms, want autoperi.max_atoms >= that")
        model.size_counts.copy_(torch.bincount(sizes, minlength=config.max_atoms + 1))
        vectors = torch.cat([_lattice_vector(rows.crystals.lattice, rows.crystals.num_atoms)
                             for rows in store.iter_rows()]).double()  # fmt: skip
        model.lattice_mean.copy_(vectors.mean(0))
        model.lattice_std.copy_(vectors.std(0).clamp_min(1e-3))
        if config.edges == "store":
            rule = store.head.edges
            if rule is None:
                raise InputError(f"{store.path}: the store keeps no edges, want some for autoperi.edges = store")
            model.reach = torch.tensor([rule.cutoff or 0.0, rule.k or 0.0])
        for at, name in enumerate(config.conditions):
            column = store.column(name)
            there = torch.from_numpy(column.values[~column.missing].astype("float64"))
            if len(there) < 2:
                raise InputError(f"{store.path}: column {name} has {len(there)} values, want at least 2")
            stats = [there.mean(), there.std().clamp_min(1e-6), there.min(), there.max()]
            model.condition_range[at] = torch.stack(stats)
        return model

    def compile(self, *arguments: Any, **settings: Any) -> None:
        """The network alone, for all sizes: noise is made of whole numbers, which compiled code may round otherwise."""
        self.network.compile(*arguments, **{"dynamic": True, **settings})

    # ---- learning ----------------------------------------------------------------------------------------

    def forward(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        """Means over the batch's crystals: loss, and its parts sites, lattice, species."""
        dense = Dense.of(batch.crystals)
        return self.losses(
            dense, self.noise(batch, draw, dense.mask.shape[1]), self._told_in_training(batch, draw, dense)
        )

    def noise(self, batch: Batch, draw: Draw, length: int) -> Noise:
        """A function of (seed, step, sample, site); of batch.origin too, where there is one."""
        index, step, dtype = batch.index, batch.step, batch.crystals.frac_coords.dtype
        chance = draw.uniform(Purpose.TIME, index, step, channels=2)
        noise = Noise(
            chance[:, 0].to(dtype),
            chance[:, 1] < 0.5,
            draw.uniform(Purpose.SITE, index, step, length, 3).to(dtype) - 0.5,
            draw.normal(Purpose.LATTICE, index, step, channels=6, dtype=dtype),
            draw.uniform(Purpose.SPECIES, index, step, length)[..., 0].to(dtype),
        )
        return noise if batch.origin is None else self._rectified(noise, batch.origin, Dense.of(batch.crystals, length))

    def _rectified(self, noise: Noise, origin: Origin, dense: Dense) -> Noise:
        """The same with the ways that lead from crystals, at t = 0, to what they were made of, at t = 1.

        Of the ways round the torus it is the shortest; the sampler went another round for few atoms, if any.
        """
        sites, lattice = self._start(origin.draw, origin.index, dense.mask.shape[1])
        way = shortest_step(dense.frac, sites.to(dense.frac))
        clean = self.standard_lattice(dense.lattice, dense.num_atoms)
        return replace(
            noise,
            sites=torch.where(noise.mirrored[:, None, None], -way, way),
            lattice=(lattice.to(clean) - clean) / self.lattice_noise.most,
        )

    def _told_in_training(self, batch: Batch, draw: Draw, dense: Dense) -> Known:
        config, count = self.config, len(self.config.conditions)
        chance = draw.uniform(Purpose.CONDITION, batch.index, batch.step, channels=2 + count)
        species = chance[:, 0] < config.known_species
        told = (chance[:, 1] < config.chemical_system) & ~species
        elements = functional.one_hot(dense.species, ELEMENTS + 1).any(1)[:, 1:] & told[:, None]
        values = self.standardised(batch.conditions, len(batch), dense.frac)
        return Known(species, values.masked_fill(chance[:, 2:] < config.condition_dropout, math.nan), elements)

    def losses(self, dense: Dense, noise: Noise, known: Known) -> dict[str, Tensor]:
        """The loss and its parts for given noise."""
        config, mask, t = self.config, dense.mask, noise.t
        lattice_sigma = self.lattice_noise.at(t)[:, None]
        frac = torch.where(noise.mirrored[:, None, None], -dense.frac, dense.frac)
        sites = wrap(frac + t[:, None, None] * noise.sites) * mask.unsqueeze(-1)
        clean = self.standard_lattice(dense.lattice, dense.num_atoms)
        lattice = clean + lattice_sigma * noise.lattice
        hidden = (noise.hide < t[:, None]) & ~known.species[:, None] & mask
        said = self.read(t, dense.species.masked_fill(hidden, 0), sites, lattice, mask, known)

        apart = centred(said.sites + noise.sites / SPREAD, mask)
        site_loss = (apart.square().sum((1, 2)) / (3 * mask.sum(1))).mean()
        root = (1 + lattice_sigma.square()).sqrt()
        lattice_loss = (said.lattice - (clean - lattice / root.square()) * root / lattice_sigma).square().mean()
        entropy = functional.cross_entropy(said.species.mT, (dense.species - 1).clamp_min(0), reduction="none")
        species_loss = ((entropy * hidden).sum(1) / hidden.sum(1).clamp_min(1)).mean()
        loss = site_loss + config.lattice_weight * lattice_loss + config.species_weight * species_loss
        return {"loss": loss, "sites": site_loss, "lattice": lattice_loss, "species": species_loss}

    def read(self, t: Tensor, species: Tensor, sites: Tensor, lattice: Tensor, mask: Tensor, known: Known) -> Reading:
        """What the network says of noised crystals: t (B,), species (B, N), sites (B, N, 3), lattice (B, 6)."""
        square = 1 + self.lattice_noise.at(t)[:, None].square()
        size = mask.sum(1).to(t.dtype)
        left_out = known.conditions.isnan()
        told = torch.cat([
            time_features(t, TIMES),
            time_features(size.log() / 8, SIZES),
            lattice / square.sqrt(),
            known.conditions.masked_fill(left_out, 0.0),
            left_out.to(t.dtype),
            known.elements.to(t.dtype),
            torch.stack([known.elements.any(1), known.species], 1).to(t.dtype),
        ], 1)  # fmt: skip
        # the lattice as far as it is known: its mean given the noised one, were all lattices normally distributed
        return self.network(species, sites, self.real_lattice(lattice / square, mask.sum(1)), told, mask, self._reach())

    def _reach(self) -> Reach | None:
        if self.reach is None:
            return None
        cutoff, nearest = self.reach.tolist()
        return Reach(cutoff or math.inf, int(nearest) or 2**31)

    # ---- sampling ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, request: Request, draw: Draw, go_on: Callable[[], None] = lambda: None) -> Crystals:
        """Crystals by as many calls of the network as there are steps, twice as many with guidance.

        go_on is called before each step: it may raise to stop.
        """
        index, length = request.index, request.species.shape[1]
        mask, species = occupied(request.num_atoms, length), request.species
        known = self._told_in_sampling(request, mask)
        finding = not bool(known.species.all())
        outside = torch.zeros(ELEMENTS, device=mask.device)
        if request.elements:
            outside.fill_(-math.inf)[[number - 1 for number in request.elements]] = 0.0
        sites, lattice = self._start(draw, index, length)
        times = [1 - k / request.steps for k in range(request.steps + 1)]
        for k, (now, then) in enumerate(zip(times, times[1:], strict=False)):
            go_on()
            start = min(1.0, now + request.churn * (now - then)) if k and then else now
            if start > now:
                sites = sites + added(now, start) * draw.normal(Purpose.CHURN, index, k, length, 3)
                lattice = lattice + self.lattice_noise.added(now, start) * draw.normal(
                    Purpose.CHURN_LATTICE, index, k, channels=6)  # fmt: skip
            t = sites.new_full((len(index),), start)
            said = self._guided(t, species, wrap(sites) * mask.unsqueeze(-1), lattice, mask, known, request.guidance)
            ahead = min(start, (start - then) * (1 + request.speed * (1 - start)))
            sites = wrap(sites + ahead * SPREAD * centred(said.sites, mask))
            sigma = self.lattice_noise.sigma(start)
            clean = (lattice + sigma * math.sqrt(1 + sigma**2) * said.lattice) / (1 + sigma**2)
            lattice = clean + self.lattice_noise.left(start, then) * (lattice - clean)
            if finding:
                sites = sites.masked_fill(~said.species.isfinite().all(-1, keepdim=True), math.nan)  # no crystal
                species = _revealed(species, said.species + outside, mask, 1 - then / now, draw, index, k)
        return Dense(species, sites, self.real_lattice(lattice, request.num_atoms), mask).crystals()

    def _start(self, draw: Draw, index: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """What crystals are made of: sites (B, N, 3), lattice (B, 6)."""
        sites = draw.uniform(Purpose.SITE, index, 0, length, 3)
        return sites, self.lattice_noise.most * draw.normal(Purpose.LATTICE, index, channels=6)

    def _told_in_sampling(self, request: Request, mask: Tensor) -> Known:
        count, like = len(request.index), request.species
        values = {name: torch.full((count,), value, device=like.device) for name, value in request.conditions.items()}
        elements = torch.zeros(count, ELEMENTS, dtype=torch.bool, device=like.device)
        elements[:, [number - 1 for number in request.elements]] = True
        given = ((request.species > 0) | ~mask).all(1)
        return Known(given, self.standardised(values, count, self.lattice_mean), elements)

    def _guided(
        self, t: Tensor, species: Tensor, sites: Tensor, lattice: Tensor, mask: Tensor, known: Known, guidance: float
    ) -> Reading:
        said = self.read(t, species, sites, lattice, mask, known)
        if guidance == 1.0:
            return said
        free = self.read(t, species, sites, lattice, mask, known.without())
        return Reading(
            torch.lerp(free.sites, said.sites, guidance),
            torch.lerp(free.lattice, said.lattice, guidance),
            torch.lerp(free.species, said.species, guidance),
        )

    # ---- scales ------------------------------------------------------------------------------------------

    def standard_lattice(self, lattice: Tensor, num_atoms: Tensor) -> Tensor:
        """Lattices (B, 3, 3) Å as vectors (B, 6) of mean 0 and deviation 1 over the training crystals."""
        return (_lattice_vector(lattice, num_atoms) - self.lattice_mean) / self.lattice_std

    def real_lattice(self, vector: Tensor, num_atoms: Tensor) -> Tensor:
        """The inverse of `standard_lattice`: (B, 6) -> (B, 3, 3) Å, a along x, b in the xy plane."""
        vector = vector * self.lattice_std + self.lattice_mean
        return lattice_from_log_metric(vector + _size_part(vector, num_atoms))

    def standardised(self, conditions: Mapping[str, Tensor], count: int, like: Tensor) -> Tensor:
        """Values of the conditions, each (B,), by name -> (B, C) standardised; NaN where one is not told."""
        values = like.new_full((count, len(self.config.conditions)), math.nan)
        for at, name in enumerate(self.config.conditions):
            if name in conditions:
                mean, deviation = self.condition_range[at, :2]
                values[:, at] = (conditions[name].to(values) - mean) / deviation
        return values


def _lattice_vector(lattice: Tensor, num_atoms: Tensor) -> Tensor:
    """½ log(L Lᵀ) less what a cell of so many atoms has on the diagonal anyway. (B, 3, 3), (B,) -> (B, 6)."""
    vector = log_metric(lattice)
    return vector - _size_part(vector, num_atoms)


def _size_part(like: Tensor, num_atoms: Tensor) -> Tensor:
    each = num_atoms.to(like.dtype).log()[:, None] / 3
    return functional.pad(each.expand(-1, 3), (0, 3))


def _revealed(
    species: Tensor, logits: Tensor, mask: Tensor, share: float, draw: Draw, index: Tensor, step: int
) -> Tensor:
    """Each hidden element is drawn from the network's chances with probability `share`. (B, N) -> (B, N)."""
    hidden = (species == 0) & mask
    chance = draw.uniform(Purpose.SPECIES, index, step, species.shape[1], 2)
    # whole numbers: sums of floats depend on their order, which no GPU promises
    up_to = (logits.double().softmax(-1) * 2.0**40).long().cumsum(-1)
    drawn = 1 + (up_to <= chance[..., :1] * up_to[..., -1:]).sum(-1).clamp_max(ELEMENTS - 1)
    return torch.where(hidden & (chance[..., 1] < share), drawn, species)
