"""Chance as a pure function: a random number follows from (seed, crystal index, purpose, step, site, channel) alone.

Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 tensors, on
the device of the indices. The 64-bit key is the seed, low word first; the four 32-bit words of the counter are
    0, 1: crystal index, low word first;  2: step;  3: purpose (upper 6 bits), site (14 bits), channel // 4 (12 bits),
and word w of the four that come out is that of channel 4 * (channel // 4) + w. No two places share a counter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from hpcgen.errors import UsageError

WORD = 0xFFFFFFFF
SITES = 2**14
CHANNELS = 2**14
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


class BadDraw(UsageError, ValueError):
    """A seed, index, purpose, step, site or channel that has no place in the counter."""


class Purpose(IntEnum):
    """What a number is drawn for. A number never changes nor gets a second meaning: seeds would lose theirs."""

    SIZE = 0  # how many atoms
    SPECIES = 1  # first elements of the sites, and noise on them
    SITE = 2  # first coordinates, and noise on them in training
    LATTICE = 3
    CHURN = 4  # noise that a sampling step adds to the coordinates
    TIME = 5  # time of diffusion of a training sample
    CONDITION = 6  # a condition left out or filled in
    TRANSLATION = 7  # shift of the whole crystal
    ROTATION = 8
    LATENT = 9  # vector of a variational autoencoder
    COMPOSITION = 10  # the formula of the whole crystal
    SYMMETRY = 11  # space group, Wyckoff positions
    ORDER = 12  # order of the sites
    CHURN_SPECIES = 13
    CHURN_LATTICE = 14
    CORRECTOR = 15  # noise of Langevin steps between two sampling steps
    DROPOUT = 16


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox-4x32-10. counter (..., 4), key (..., 2) -> (..., 4); all int64 words in [0, 2^32)."""
    c0, c1, c2, c3, key0, key1 = torch.broadcast_tensors(*counter.unbind(-1), *key.unbind(-1))
    return torch.stack(_ten_rounds(c0, c1, c2, c3, key0, key1), dim=-1)


def _ten_rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key0: int | Tensor, key1: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, each of the shape that the counters broadcast to; a key that is a tensor has that shape already.

    The product c * M has 64 bits and would overflow int64, which a compiler may take for impossible. c * (M - 2^32)
    fits: its low word is that of c * M, its high word lacks c. Above their 32 bits c1 and c3 carry rubbish till a mask.
    """
    m0, m1 = (multiplier - 2**32 for multiplier in MULTIPLIERS)
    for round_ in range(ROUNDS):
        p0, p1 = c0 * m0, c2 * m1
        high0, high1 = (p0 >> 32).add_(c0), (p1 >> 32).add_(c2)
        c0 = (high1 ^ c1).bitwise_xor_((key0 + round_ * KEY_STEPS[0]) & WORD).bitwise_and_(WORD)
        c2 = (high0 ^ c3).bitwise_xor_((key1 + round_ * KEY_STEPS[1]) & WORD).bitwise_and_(WORD)
        c1, c3 = p1, p0
    return c0, c1 & WORD, c2, c3 & WORD


@dataclass(frozen=True)
class Draw:
    """The random numbers of one seed, 0 <= seed < 2^64.

    Every method takes (purpose, index, step, sites, channels): index (B,) int64 in [0, 2^63), of the crystal, in
    training of the sample; step, an int or (B,) int64 in [0, 2^32). The result is (B, channels) for sites=None,
    (B, sites, channels) for a number of sites, and (B, channels) for a tensor (B,) of site numbers, as for atoms in one
    flat list, each with the index of its crystal. No site means site 0. What channel c of site s holds depends neither
    on how many others are asked for, nor on the batch, its order, or the device.

    BadDraw, a UsageError and ValueError, names what is out of range. Tensors on a GPU or in a compiled region are not
    looked at, which would wait for the device: there every int64 is an index of its own, and of steps and sites the
    lowest 32 and 14 bits count.
    """

    seed: int
    # As text, since torch.compile turns an int that once had another value into a symbol, and its C++ then fails.
    _key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.seed, int) and 0 <= self.seed < 2**64):
            raise BadDraw(f"seed {self.seed!r}: want an integer with 0 <= seed < 2^64")
        object.__setattr__(self, "_key", f"{self.seed:016x}")

    def words(
        self,
        purpose: Purpose,
        index: Tensor,
        step: int | Tensor = 0,
        sites: int | Tensor | None = None,
        channels: int = 1,
    ) -> Tensor:
        """32 random bits each, int64 in [0, 2^32)."""
        blocks = self._blocks(purpose, index, step, sites, channels)
        return _channels(blocks, channels)

    def uniform(
        self,
        purpose: Purpose,
        index: Tensor,
        step: int | Tensor = 0,
        sites: int | Tensor | None = None,
        channels: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Uniform in [0, 1): the upper 24 bits of a word (float32) or all 32 (float64), never rounded, so never 1."""
        if dtype not in (torch.float32, torch.float64):
            raise BadDraw(f"uniform numbers in {dtype}: want torch.float32 or torch.float64")
        bits = 24 if dtype == torch.float32 else 32
        blocks = self._blocks(purpose, index, step, sites, channels)
        return _channels([(word >> (32 - bits)).to(dtype).mul_(2.0**-bits) for word in blocks], channels)

    def normal(
        self,
        purpose: Purpose,
        index: Tensor,
        step: int | Tensor = 0,
        sites: int | Tensor | None = None,
        channels: int = 1,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal, at most 6.77 from 0. Words 2k and 2k + 1 give channels 2k and 2k + 1 (Box and Muller 1958).

        Computed in float64, never compiled, then rounded to `dtype`: two kinds of device or processor may differ in the
        last bits of float64, and almost never in float32.
        """
        blocks = self._blocks(purpose, index, step, sites, channels)
        box_muller = _left_out() if torch.compiler.is_compiling() else _box_muller
        return _channels(box_muller(*blocks, dtype=dtype), channels)

    def integers(
        self,
        purpose: Purpose,
        index: Tensor,
        step: int | Tensor = 0,
        sites: int | Tensor | None = None,
        channels: int = 1,
        *,
        below: int,
    ) -> Tensor:
        """Integers in [0, below), below <= 2^31: floor(below * bits / 2^64), words 2c and 2c + 1 for channel c < 2^13.

        The chances of two values differ by less than below / 2^64 of themselves: by 2^-33 at most.
        """
        if not 1 <= below <= 2**31:
            raise BadDraw(f"integers below {below}: want 1 <= below <= 2^31")
        pairs = self.words(purpose, index, step, sites, 2 * channels).unflatten(-1, (channels, 2))
        high, low = pairs.unbind(-1)
        return (high * below + (low * below >> 32)) >> 32

    def order(self, purpose: Purpose, index: Tensor, step: int | Tensor = 0, *, sites: int) -> Tensor:
        """A random order of 0 ... sites - 1 for each crystal. (B,) -> (B, sites) int64. Sites added come in between."""
        high, low = self.words(purpose, index, step, sites, 2).unbind(-1)
        return (high << 31 | low >> 1).argsort(dim=-1, stable=True)

    def _blocks(
        self, purpose: Purpose, index: Tensor, step: int | Tensor, sites: int | Tensor | None, channels: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Words 0, 1, 2, 3 of every block of four channels, each (B, blocks) or (B, sites, blocks)."""
        if index.ndim != 1:
            raise BadDraw(f"crystal index of shape {tuple(index.shape)}: want (B,)")
        if not 0 <= channels <= CHANNELS:
            raise BadDraw(f"{channels} channels: want 0 to {CHANNELS}")
        if not isinstance(purpose, Purpose):
            raise BadDraw(f"purpose {purpose!r}: want one of {', '.join(map(str, Purpose.__members__))}")
        inner = (1, 1) if isinstance(sites, int) else (1,)
        _look("crystal index", index, 63)
        index = index.reshape(-1, *inner)
        block = torch.arange(-(-channels // 4), device=index.device)
        where = block + _site_numbers(sites, len(index), index.device) * 2**12 + purpose.value * 2**26
        key0, key1 = int(self._key[8:], 16), int(self._key[:8], 16)
        return _ten_rounds(index & WORD, index >> 32 & WORD, _steps(step, index), where, key0, key1)


def _steps(step: int | Tensor, index: Tensor) -> Tensor:
    """Word 2 of the counter, of as many dimensions as `index`."""
    if isinstance(step, Tensor):
        if step.ndim > 1 or step.numel() not in (1, len(index)):
            raise BadDraw(
                f"step of shape {tuple(step.shape)} for {len(index)} crystals: want an int or ({len(index)},)"
            )
        _look("step", step, 32)
        return (step & WORD).reshape(-1, *index.shape[1:])
    if not 0 <= step < 2**32:
        raise BadDraw(f"step {step}: want 0 <= step < 2^32")
    return torch.full_like(index[:1], step)


def _site_numbers(sites: int | Tensor | None, crystals: int, device: torch.device) -> Tensor:
    """Site numbers, as they stand before a dimension of blocks: (S, 1), (B, 1) or a single 0."""
    if isinstance(sites, Tensor):
        if sites.shape != (crystals,):
            raise BadDraw(f"site numbers of shape {tuple(sites.shape)} for {crystals} indices: want ({crystals},)")
        _look("site", sites, 14)
        return (sites & (SITES - 1))[:, None]
    if sites is None:
        return torch.zeros(1, dtype=torch.int64, device=device)
    if not 0 <= sites <= SITES:
        raise BadDraw(f"{sites} sites: want 0 to {SITES}")
    return torch.arange(sites, device=device)[:, None]


def _look(name: str, values: Tensor, bits: int) -> None:
    """Refuse values outside [0, 2^bits) where looking at them is free: on the CPU, outside compiled regions."""
    if values.dtype != torch.int64:
        raise BadDraw(f"{name} in {values.dtype}: want torch.int64")
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return
    outside = values >> bits != 0
    if outside.any():
        raise BadDraw(f"{name} {values[outside][0].item()}: want 0 <= {name} < 2^{bits}")


def _channels(blocks: list[Tensor] | tuple[Tensor, ...], channels: int) -> Tensor:
    """Four tensors (..., blocks), channel by channel. -> (..., channels)"""
    return torch.stack(tuple(blocks), dim=-1).flatten(-2)[..., :channels].contiguous()


def _left_out() -> Callable[..., list[Tensor]]:
    """Box-Muller for compiled regions, which leave it out. To say so imports the compiler, which takes a second."""
    return torch.compiler.disable(_box_muller)


def _box_muller(*words: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Pairs of words into pairs of standard normals. A word means (word + 1/2) / 2^32: log 0 is not met."""
    normals = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        radius = first.double().add_(0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = second.double().add_(0.5).mul_(2.0**-32 * 2 * math.pi)
        normals += [(radius * angle.cos()).to(dtype), (radius * angle.sin_()).to(dtype)]
    return normals
