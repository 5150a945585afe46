"""Random numbers as a function of their place: known answers, independence of the asking, statistics."""

import math
import pickle
import shutil
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hpcgen.diffusion import draw as room
from hpcgen.diffusion.draw import BadDraw, Draw, Purpose, philox
from hpcgen.errors import UsageError

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="no C++ compiler")
ALL_ONES = 2**32 - 1
SITE, CHURN = Purpose.SITE, Purpose.CHURN


def words_of(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


KNOWN = [  # kat_vectors of Random123: counter, key, answer
    ("0 0 0 0", "0 0", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The published rounds in Python's own integers."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        left, right = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = right // 2**32 ^ b ^ k, right % 2**32, left // 2**32 ^ d ^ m, left % 2**32
        k, m = (k + 0x9E3779B9) % 2**32, (m + 0xBB67AE85) % 2**32
    return [a, b, c, d]


def plain_word(seed: int, purpose: int, index: int, step: int, site: int, channel: int) -> int:
    """The layout that draw.py promises, so that old seeds keep their crystals."""
    place = channel // 4 + site * 2**12 + purpose * 2**26
    counter = [index % 2**32, index // 2**32, step, place]
    return plain_philox(counter, [seed % 2**32, seed // 2**32])[channel % 4]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert philox(torch.tensor(words_of(counter)), torch.tensor(words_of(key))).tolist() == words_of(answer)
    assert plain_philox(words_of(counter), words_of(key)) == words_of(answer)


word = st.one_of(st.integers(0, ALL_ONES), st.sampled_from([0, 1, 2**31 - 1, 2**31, ALL_ONES]))


@given(st.lists(st.tuples(*[word] * 6), min_size=1, max_size=20))
def test_philox_is_the_plain_one(rows):
    counter, key = torch.tensor(rows).split([4, 2], dim=1)
    expected = [plain_philox(list(row[:4]), list(row[4:])) for row in rows]
    assert philox(counter, key).tolist() == expected
    assert philox(counter, key[0])[0].tolist() == philox(counter[0], key)[0].tolist() == expected[0]


@given(
    seed=st.integers(0, 2**64 - 1),
    purpose=st.sampled_from(Purpose),
    index=st.integers(0, 2**63 - 1),
    step=st.integers(0, ALL_ONES),
    site=st.integers(0, 2**14 - 1),
    channel=st.integers(0, 2**14 - 1),
)
@settings(deadline=None)
def test_every_number_has_its_place(seed, purpose, index, step, site, channel):
    words = Draw(seed).words(purpose, torch.tensor([index]), step, torch.tensor([site]), channel + 1)
    assert words[0, channel] == plain_word(seed, purpose, index, step, site, channel)


def test_last_places():
    words = Draw(2**64 - 1).words(Purpose.DROPOUT, torch.tensor([2**63 - 1]), ALL_ONES, 2**14, 2)
    assert words.shape == (1, 2**14, 2)
    assert words[0, -1, 1] == plain_word(2**64 - 1, 16, 2**63 - 1, ALL_ONES, 2**14 - 1, 1)


def test_numbers_of_the_purposes_stay():
    first = "SIZE SPECIES SITE LATTICE CHURN TIME CONDITION TRANSLATION ROTATION LATENT COMPOSITION SYMMETRY ORDER"
    later = "CHURN_SPECIES CHURN_LATTICE CORRECTOR DROPOUT"
    names = f"{first} {later}".split()
    assert [Purpose[name] for name in names] == list(range(len(names)))  # add to the end, change nothing
    assert all(0 <= purpose < 2**6 for purpose in Purpose)


class Seated(Draw):
    """Breaks the law: a crystal's numbers depend on its seat in the batch."""

    def _blocks(self, purpose, index, step, sites, channels):
        return super()._blocks(purpose, torch.arange(len(index)), step, sites, channels)


class Running(Draw):
    """Breaks the law: numbers are dealt out one after the other, so that padding moves them."""

    def _blocks(self, purpose, index, step, sites, channels):
        shape = super()._blocks(purpose, index, step, sites, channels)[0].shape
        dealt = torch.arange(4 * math.prod(shape)).view(4, *shape) * 2654435761 % 2**32
        return tuple((dealt + index.view(-1, *[1] * (len(shape) - 1))) % 2**32)


INDEX = torch.tensor([5, 0, 2**40 + 3, 17, 2**63 - 1, 4])
METHODS = {
    "words": lambda draw, *place: draw.words(*place),
    "uniform": lambda draw, *place: draw.uniform(*place),
    "uniform64": lambda draw, *place: draw.uniform(*place, dtype=torch.float64),
    "normal": lambda draw, *place: draw.normal(*place),
    "normal64": lambda draw, *place: draw.normal(*place, dtype=torch.float64),
    "integers": lambda draw, *place: draw.integers(*place, below=1000),
}


def same_in_any_order(draw, method) -> bool:
    mixed = torch.tensor([3, 1, 5, 0, 4, 2])
    return torch.equal(method(draw, SITE, INDEX[mixed], 7, 5, 3), method(draw, SITE, INDEX, 7, 5, 3)[mixed])


def same_alone(draw, method) -> bool:
    alone = torch.cat([method(draw, SITE, INDEX[i : i + 1], 7, 5, 3) for i in range(len(INDEX))])
    return torch.equal(alone, method(draw, SITE, INDEX, 7, 5, 3))


def same_when_padded(draw, method) -> bool:
    return torch.equal(method(draw, SITE, INDEX, 7, 9, 11)[:, :5, :3], method(draw, SITE, INDEX, 7, 5, 3))


@pytest.mark.parametrize("law", [same_in_any_order, same_alone, same_when_padded])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_do_not_depend_on_the_asking(law, method):
    assert law(Draw(11), METHODS[method])


def test_the_laws_are_able_to_fail():
    uniform = METHODS["uniform"]
    assert not same_in_any_order(Seated(11), uniform)
    assert not same_alone(Seated(11), uniform)
    assert not same_when_padded(Running(11), uniform)


@pytest.mark.parametrize("method", METHODS)
def test_flat_atoms_get_the_numbers_of_their_sites(method):
    draw, number = Draw(3), METHODS[method]
    batch, site = torch.tensor([0, 0, 2, 2, 2, 5]), torch.tensor([0, 1, 0, 1, 2, 0])
    padded = number(draw, SITE, INDEX, 7, 3, 2)
    assert torch.equal(number(draw, SITE, INDEX[batch], 7, site, 2), padded[batch, site])
    assert torch.equal(number(draw, SITE, INDEX, 7, None, 2), padded[:, 0])


def test_each_crystal_can_be_at_its_own_step():
    draw, steps = Draw(3), torch.tensor([0, 9, 9, 1, 2**32 - 1, 2])
    for sites in (None, 4, INDEX % 7):
        alone = [
            draw.words(SITE, INDEX[i : i + 1], int(steps[i]), sites[i : i + 1] if torch.is_tensor(sites) else sites, 3)
            for i in range(len(INDEX))
        ]
        assert torch.equal(draw.words(SITE, INDEX, steps, sites, 3), torch.cat(alone))
    assert torch.equal(draw.words(SITE, INDEX, torch.tensor(9), 4), draw.words(SITE, INDEX, 9, 4))


def test_a_long_batch_equals_its_parts():
    """Long tensors are divided among threads and lanes of the processor, short ones are not."""
    index = torch.arange(12_345)
    long = Draw(1).normal(CHURN, index, 3, 5, 3, dtype=torch.float64)
    parts = [Draw(1).normal(CHURN, part, 3, 5, 3, dtype=torch.float64) for part in index.split(617)]
    assert torch.equal(long, torch.cat(parts))


def test_shapes_and_types():
    draw, index = Draw(0), torch.arange(4)
    assert draw.words(SITE, index).shape == (4, 1)
    assert draw.normal(SITE, index, 0, 0, 3).shape == (4, 0, 3)
    assert draw.normal(SITE, index[:0], 0, 5, 3).shape == (0, 5, 3)
    assert draw.uniform(SITE, index, 0, 5, 0).shape == (4, 5, 0)
    assert draw.words(SITE, index).dtype == draw.integers(SITE, index, below=2).dtype == torch.int64
    assert draw.uniform(SITE, index).dtype == draw.normal(SITE, index).dtype == torch.float32
    assert draw.normal(SITE, index, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert draw.normal(SITE, index, 0, 5, 3).is_contiguous()


def test_no_state():
    draw, before = Draw(12), torch.get_rng_state()
    first = draw.normal(SITE, INDEX)
    draw.uniform(CHURN, INDEX, 4, 3)
    assert torch.equal(draw.normal(SITE, INDEX), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert pickle.loads(pickle.dumps(draw)) == draw == Draw(12) != Draw(13)
    with pytest.raises(FrozenInstanceError):
        draw.seed = 1


def neighbours(**change: int) -> torch.Tensor:
    """20,000 uniforms around a place, one coordinate of which is moved on by `change`."""
    at = {"seed": 0, "purpose": 4, "index": 0, "step": 100, "site": 0, "channel": 0}
    at |= {name: at[name] + by for name, by in change.items()}
    index = torch.arange(1000) + at["index"]
    size = (at["site"] + 20, at["channel"] + 1)
    drawn = Draw(at["seed"]).uniform(Purpose(at["purpose"]), index, at["step"], *size, dtype=torch.float64)
    return drawn[:, at["site"] :, at["channel"]].flatten()


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """In standard deviations of the correlation of independent numbers."""
    return torch.corrcoef(torch.stack((first, second)))[0, 1].item() * math.sqrt(len(first))


NEIGHBOURS = [
    {"seed": 1},
    {"seed": 2**32},
    {"purpose": 1},
    {"index": 1},
    {"index": 2**32},
    {"step": 1},
    {"site": 1},
    {"channel": 1},
    {"channel": 4},
]


def alike(change: dict[str, int]) -> float:
    """The strongest of three correlations, in standard deviations."""
    here, there = neighbours(), neighbours(**change)
    pairs = [(here, there), ((here - 0.5).abs(), (there - 0.5).abs()), (here, (here + there) % 1)]
    return max(abs(correlation(*pair)) for pair in pairs)


@pytest.mark.parametrize("change", NEIGHBOURS, ids=str)
def test_neighbours_are_not_alike(change):
    assert alike(change) < 4


@pytest.mark.parametrize("change", NEIGHBOURS, ids=str)
def test_neighbours_are_alike_where_mixing_is_weak(monkeypatch, change):
    monkeypatch.setattr(room, "MULTIPLIERS", (17, 257))
    assert alike(change) > 10


def test_no_word_is_met_twice():
    """Of 2^16 pairs of words, 64 bits each, two are alike by chance in 1 of 10^10 runs."""
    draw, index = Draw(0), torch.arange(64)
    words = [
        draw.words(purpose, index, step, 8, 8)
        for purpose in (SITE, CHURN, Purpose.DROPOUT)
        for step in (0, 1, 255, 256)
    ]
    high, low = torch.stack(words).view(-1, 2).unbind(-1)
    assert len(torch.unique(high << 31 ^ low)) == len(high)


def test_every_bit_is_fair():
    words = Draw(9).words(SITE, torch.arange(10_000), 3, 5, 4).flatten()
    ones = ((words[:, None] >> torch.arange(32)) & 1).double().mean(dim=0)
    assert (ones - 0.5).abs().max() < 5 * 0.5 / math.sqrt(len(words))
    assert words.min() >= 0 and words.max() <= ALL_ONES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniforms_are_uniform(dtype):
    drawn = Draw(5).uniform(SITE, torch.arange(5000), 2, 10, 3, dtype=dtype)
    assert drawn.min() >= 0 and drawn.max() < 1
    assert stats.kstest(drawn.flatten().numpy(), "uniform").pvalue > 1e-3
    assert abs(drawn.double().mean() - 0.5) < 4 / math.sqrt(12 * drawn.numel())
    assert abs(drawn.double().var() * 12 - 1) < 4 * math.sqrt(0.8 / drawn.numel())


def test_float32_uniforms_are_the_float64_ones_cut_off():
    fine = Draw(5).uniform(SITE, INDEX, 2, 100, 3, dtype=torch.float64)
    assert torch.equal(Draw(5).uniform(SITE, INDEX, 2, 100, 3), ((fine * 2**24).floor() / 2**24).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normals_are_normal(dtype):
    drawn = Draw(6).normal(CHURN, torch.arange(5000), 2, 10, 4, dtype=dtype).double()
    size = drawn.numel()
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(drawn.mean()) < 4 / math.sqrt(size)
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2 / size)
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96 / size)
    far = 2 * stats.norm.sf(3) * size
    assert abs((drawn.abs() > 3).sum() - far) < 4 * math.sqrt(far)
    channels = drawn.flatten(0, 1).T
    for each in (channels, channels**2):
        apart = torch.corrcoef(each) - torch.eye(4)
        assert apart.abs().max() < 4.5 / math.sqrt(each.shape[1])


def test_normals_are_those_of_numpy():
    """Box-Muller in NumPy's float64, from the same words: after rounding to float32 not one bit is different."""
    place = (CHURN, torch.arange(5000), 2, 10, 4)
    first, second = ((Draw(6).words(*place).numpy().reshape(5000, 10, 2, 2) + 0.5) / 2**32).transpose(3, 0, 1, 2)
    radius = np.sqrt(-2 * np.log(first))
    pairs = np.stack((radius * np.cos(2 * np.pi * second), radius * np.sin(2 * np.pi * second)), axis=-1)
    fine = pairs.reshape(5000, 10, 4)
    assert np.array_equal(Draw(6).normal(*place).numpy(), fine.astype(np.float32))
    assert np.allclose(Draw(6).normal(*place, dtype=torch.float64).numpy(), fine, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("word", [0, 2**31, ALL_ONES - 1, ALL_ONES])
def test_extreme_words(monkeypatch, word):
    monkeypatch.setattr(room, "_ten_rounds", lambda *c: (torch.full((1, 1), word),) * 4)
    draw, index = Draw(0), torch.arange(1)
    assert torch.tensor(ALL_ONES).float() * 2**-32 == 1.0  # what plain rounding gives
    assert draw.uniform(SITE, index).item() == (word >> 8) / 2**24 < 1
    assert draw.uniform(SITE, index, dtype=torch.float64).item() == word / 2**32 < 1
    assert draw.normal(SITE, index, channels=2).norm() <= 6.77
    for below in (1, 2, 118, 2**31):
        assert draw.integers(SITE, index, below=below).item() == (word * 2**32 + word) * below >> 64 < below


@given(st.integers(1, 2**31), st.integers(0, 2**63 - 1))
def test_integers_are_a_share_of_64_bits(below, index):
    drawn = Draw(8).integers(Purpose.SYMMETRY, torch.tensor([index]), channels=3, below=below)
    words = Draw(8).words(Purpose.SYMMETRY, torch.tensor([index]), channels=6)[0].tolist()
    assert drawn[0].tolist() == [(words[2 * c] * 2**32 + words[2 * c + 1]) * below >> 64 for c in range(3)]


@pytest.mark.parametrize("below", [2, 7, 118])
def test_integers_are_equally_likely(below):
    drawn = Draw(8).integers(Purpose.SPECIES, torch.arange(5000), 1, 10, 2, below=below)
    assert stats.chisquare(drawn.flatten().bincount(minlength=below).numpy()).pvalue > 1e-3


def test_orders():
    orders = Draw(4).order(Purpose.ORDER, torch.arange(6000), sites=3)
    kinds, counts = torch.unique(orders, dim=0, return_counts=True)
    assert len(kinds) == 6 and torch.equal(kinds.sort(dim=1).values, torch.arange(3).expand(6, 3))
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_orders_go_up_with_the_words():
    words = Draw(4).words(Purpose.ORDER, torch.tensor([9]), 2, 30, 2)[0].tolist()
    expected = sorted(range(30), key=lambda site: words[site][0] * 2**32 + words[site][1])
    assert Draw(4).order(Purpose.ORDER, torch.tensor([9]), 2, sites=30)[0].tolist() == expected


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2**63 - 1))
def test_further_sites_come_in_between(few, more, index):
    index = torch.tensor([index])
    short, long = Draw(4).order(Purpose.ORDER, index, sites=few), Draw(4).order(Purpose.ORDER, index, sites=few + more)
    assert torch.equal(long[long < few], short[0])


BAD = {
    "seed -1": lambda: Draw(-1),
    "seed 18446744073709551616": lambda: Draw(2**64),
    "seed 1.5": lambda: Draw(1.5),
    "crystal index -3": lambda: Draw(0).words(SITE, torch.tensor([0, -3])),
    "crystal index in torch.float32": lambda: Draw(0).words(SITE, torch.tensor([0.0])),
    "crystal index of shape \\(\\)": lambda: Draw(0).words(SITE, torch.tensor(0)),
    "step -1": lambda: Draw(0).normal(SITE, INDEX, -1),
    "step 4294967296": lambda: Draw(0).normal(SITE, INDEX, 2**32),
    "step 4294967297": lambda: Draw(0).normal(SITE, INDEX, torch.arange(6) + 2**32 - 4 + 4 * (INDEX == 0)),
    "step of shape \\(5,\\)": lambda: Draw(0).normal(SITE, INDEX, torch.arange(5)),
    "16385 sites": lambda: Draw(0).words(SITE, INDEX[:1], 0, 2**14 + 1),
    "-1 sites": lambda: Draw(0).words(SITE, INDEX, 0, -1),
    "site 16384": lambda: Draw(0).words(SITE, INDEX[:1], 0, torch.tensor([2**14])),
    "site numbers of shape \\(1,\\)": lambda: Draw(0).words(SITE, INDEX, 0, torch.tensor([2])),
    "16385 channels": lambda: Draw(0).words(SITE, INDEX[:1], 0, None, 2**14 + 1),
    "16386 channels": lambda: Draw(0).integers(SITE, INDEX[:1], 0, None, 2**13 + 1, below=3),
    "-2 channels": lambda: Draw(0).words(SITE, INDEX, channels=-2),
    "purpose 2: want one of SIZE, SPECIES, ": lambda: Draw(0).words(2, INDEX),
    "integers below 0": lambda: Draw(0).integers(SITE, INDEX, below=0),
    "integers below 2147483649": lambda: Draw(0).integers(SITE, INDEX, below=2**31 + 1),
    "uniform numbers in torch.float16": lambda: Draw(0).uniform(SITE, INDEX, dtype=torch.float16),
}


@pytest.mark.parametrize("message", BAD)
def test_what_has_no_place_is_named(message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        BAD[message]()
    assert isinstance(caught.value, BadDraw) and isinstance(caught.value, UsageError)


def all_kinds(draw: Draw, index: torch.Tensor, step: int) -> tuple[torch.Tensor, ...]:
    return draw.uniform(SITE, index, step, 3, 5), draw.integers(SITE, index, step, 3, 5, below=2**31)


@pytest.mark.slow
@COMPILER
def test_compiled_equals_eager():
    """Another seed and step too: an int that changes becomes a symbol of the compiler."""
    torch.compiler.reset()
    compiled = torch.compile(all_kinds, fullgraph=True)
    for seed, step in ((0, 0), (2**64 - 1, 5), (2**64 - 1, 2**32 - 1)):
        for there, here in zip(compiled(Draw(seed), INDEX, step), all_kinds(Draw(seed), INDEX, step), strict=True):
            assert torch.equal(there, here)


@pytest.mark.slow
@COMPILER
def test_normals_are_left_out_of_compiled_regions():
    torch.compiler.reset()
    place = (CHURN, torch.arange(500), 3, 4, 3)
    compiled = torch.compile(lambda draw: draw.normal(*place) * 2)
    assert torch.equal(compiled(Draw(7)), Draw(7).normal(*place) * 2)


def test_the_compiler_is_not_imported_to_draw():
    """It would take as long as all of torch: at the start of every process of a campaign."""
    draw = "from hpcgen.diffusion.draw import Draw, Purpose; Draw(0).normal(Purpose.SITE, torch.arange(2), 0, 1, 3)"
    code = f"import sys, torch, hpcgen.models.autoperi; {draw}; print('torch._dynamo.convert_frame' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
def test_cuda_equals_cpu(device):
    draw, index = Draw(2**63 + 12345), torch.cat((INDEX, torch.arange(3000)))
    there = index.to(device)
    for step, step_there in ((77, 77), (index & ALL_ONES, there & ALL_ONES)):
        for name in ("words", "uniform", "uniform64", "integers"):
            number = METHODS[name](draw, SITE, there, step_there, 20, 5)
            assert number.device.type == device
            assert torch.equal(number.cpu(), METHODS[name](draw, SITE, index, step, 20, 5)), name
    assert torch.equal(draw.order(SITE, there, sites=30).cpu(), draw.order(SITE, index, sites=30))
    assert torch.equal(draw.normal(CHURN, there, 5, 20, 3).cpu(), draw.normal(CHURN, index, 5, 20, 3))
