"""A transformer over the atoms of a crystal, all pairs connected, that sees periodic geometry through its pairs.

Pairs enter attention twice: as a bias of each head, and as values summed with the attention weights, without which no
direction could reach an atom (as in AlphaFold's invariant point attention; Jumper et al. 2021, algorithm 22). Time,
size, lattice and conditions modulate every layer (adaptive layer norm, one table for all layers; Chen et al. 2023).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcgen.crystal.magpie import element_properties
from hpcgen.nn.basis import Images, Reach, fourier, nearest_images, radial

ELEMENTS = 118


@dataclass(frozen=True)
class Shape:
    """Sizes of the network."""

    width: int
    layers: int
    heads: int
    pair_width: int
    frequencies: int  # of the Fourier features along each axis
    radial: int  # radial functions
    cutoff: float  # Å, of the radial functions
    told: int  # features of the whole crystal


@dataclass(frozen=True)
class Reading:
    """What the network says of B crystals padded to N atoms."""

    sites: Tensor  # (B, N, 3) along the cell vectors
    lattice: Tensor  # (B, 6)
    species: Tensor  # (B, N, ELEMENTS) logits


class CrystalTransformer(nn.Module):
    """Unchanged by translation and rotation of the crystal; atoms relabelled relabel what it says.

    An element is known by its properties (Magpie's; Ward et al. 2016), not by its number alone: what is learned of one
    is learned of its kin.
    """

    properties: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, pair = shape.width, shape.pair_width
        unknown = torch.zeros(ELEMENTS + 1, 1).index_fill(0, torch.tensor([0]), 1.0)
        properties = torch.from_numpy(element_properties()).float()
        self.register_buffer("properties", torch.cat([properties, unknown], 1))  # row 0: an element not known yet
        self.element = nn.Sequential(nn.Linear(self.properties.shape[1], width), nn.SiLU(), nn.Linear(width, width))
        self.told = nn.Sequential(nn.Linear(shape.told, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 6 * width)
        self.pair_in = nn.Linear(6 * shape.frequencies + shape.radial + 4, pair)
        self.pair_told = nn.Linear(width, pair)
        self.pair_ends = nn.Linear(width, 2 * pair, bias=False)
        self.pair_out = nn.Sequential(nn.SiLU(), nn.Linear(pair, pair), nn.SiLU())
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(width)
        self.sites = nn.Linear(width, 3)
        self.species = nn.Linear(width, ELEMENTS)
        self.lattice = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 6))
        for last in (self.modulation, self.sites, self.species, self.lattice[-1]):
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
            nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def forward(
        self, species: Tensor, frac: Tensor, lattice: Tensor, told: Tensor, mask: Tensor, reach: Reach | None = None
    ) -> Reading:
        """species (B, N) atomic numbers or 0, frac (B, N, 3), lattice (B, 3, 3) Å, told (B, shape.told), mask (B, N)
        True where an atom is; reach: which atoms see each other, None for all."""
        crystal = self.told(told)  # (B, width)
        modulation = self.modulation(functional.silu(crystal)).unflatten(-1, (6, -1))  # (B, 6, width)
        atoms = self.element(self.properties)[species] + crystal.unsqueeze(1)
        images = nearest_images(frac, lattice)
        pairs = self._pairs(images, crystal, atoms)  # (B, N, N, pair)
        joined = mask.unsqueeze(1).expand(-1, mask.shape[1], -1)  # (B, N, N): what an atom attends to
        if reach is not None:
            joined = joined & (reach.holds(images.distance, mask) | ~mask.unsqueeze(2))
        for layer in self.layers:
            atoms, pairs = layer(atoms, pairs, joined, modulation)
        atoms = self.norm(atoms)
        mean = (atoms * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return Reading(self.sites(atoms), self.lattice(torch.cat([mean, crystal], -1)), self.species(atoms))

    def _pairs(self, images: Images, crystal: Tensor, atoms: Tensor) -> Tensor:
        """(B, N, N, pair_width) of each atom and its neighbour."""
        shape, distance = self.shape, images.distance
        near = 1.0 / (1.0 + distance.unsqueeze(-1))
        waves = fourier(images.step, shape.frequencies)
        seen = [waves, radial(distance, shape.radial, shape.cutoff), images.vector * near, near]
        one, other = self.pair_ends(atoms).chunk(2, -1)
        ends = (one + self.pair_told(crystal)[:, None]).unsqueeze(2) + other.unsqueeze(1)
        return self.pair_out(self.pair_in(torch.cat(seen, -1)) + ends)


class Layer(nn.Module):
    """What a pair knows is renewed from its two atoms; attention with pair biases and pair values; a gated network."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, pair = shape.width, shape.pair_width
        self.heads = shape.heads
        self.shift = nn.Parameter(torch.zeros(6, width))  # of the modulation, this layer's own
        self.before_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.before_gated = nn.LayerNorm(width, elementwise_affine=False)
        self.before_pair = nn.LayerNorm(pair)
        self.pair_ends = nn.Linear(width, 2 * pair)
        self.pair_up = nn.Linear(pair, pair, bias=False)
        self.pair_down = nn.Linear(pair, pair)
        self.bias = nn.Linear(pair, shape.heads)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width + shape.heads * pair, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.ones_(self.shift[2])
        nn.init.ones_(self.shift[5])
        nn.init.zeros_(self.pair_down.weight)
        nn.init.zeros_(self.pair_down.bias)
        for last in (self.out, self.down):
            nn.init.normal_(last.weight, std=0.02)
            nn.init.zeros_(last.bias)

    def forward(self, atoms: Tensor, pairs: Tensor, joined: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """atoms (B, N, width), pairs (B, N, N, pair), joined (B, N, N), modulation (B, 6, width) -> atoms, pairs."""
        move, stretch, gate, move2, stretch2, gate2 = (modulation + self.shift).unsqueeze(2).unbind(1)  # (B, 1, width)
        seen = self.before_attention(atoms) * (1 + stretch) + move
        pairs = pairs + self._renewal(pairs, seen)
        atoms = atoms + gate * self._attention(seen, pairs, joined)
        up, gated = self.up(self.before_gated(atoms) * (1 + stretch2) + move2).chunk(2, -1)
        return atoms + gate2 * self.down(up * functional.silu(gated)), pairs

    def _renewal(self, pairs: Tensor, atoms: Tensor) -> Tensor:
        one, other = self.pair_ends(atoms).chunk(2, -1)
        return self.pair_down(
            functional.silu(self.pair_up(self.before_pair(pairs)) + one.unsqueeze(2) + other.unsqueeze(1))
        )

    def _attention(self, atoms: Tensor, pairs: Tensor, joined: Tensor) -> Tensor:
        """The weights sum pairs too, so that a fused kernel, which keeps them to itself, cannot serve here."""
        bias = self.bias(pairs).permute(0, 3, 1, 2).masked_fill(~joined.unsqueeze(1), -math.inf)
        query, key, value = self.query_key_value(atoms).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weight = _softmax(query @ key.mT / math.sqrt(query.shape[-1]) + bias)  # (B, heads, N, N)
        seen = weight.permute(0, 2, 1, 3) @ pairs  # (B, N, heads, pair)
        return self.out(torch.cat([(weight @ value).transpose(1, 2).flatten(-2), seen.flatten(-2)], -1))


def _softmax(score: Tensor) -> Tensor:
    """Along the last dimension. Torch's own takes CPUs three times as long where that is short, as crystals are."""
    if score.is_cuda:
        return score.softmax(-1)
    weight = torch.exp(score - score.detach().amax(-1, keepdim=True))
    return weight / weight.sum(-1, keepdim=True)
