"""How a tile is divided into pieces that are sampled side by side, and the finished pieces of an unfinished block."""

import io
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcgen.crystal.crystals import Crystals
from hpcgen.files import storage_faults

STEP = 4  # atoms: crystals are padded to a multiple of it
_FRAME = 8  # bytes before each record: its length and its CRC-32


@dataclass(frozen=True)
class Piece:
    """Crystals of a tile that are sampled together, all padded to the same length."""

    number: int  # within the tile
    index: np.ndarray  # (B,) int64, of the crystals
    num_atoms: np.ndarray  # (B,) int64
    length: int


def pieces(index: np.ndarray, num_atoms: np.ndarray, most_pairs: int) -> list[Piece]:
    """The pieces of a tile: a function of its crystals' sizes alone. (T,), (T,)"""
    padded = -(-num_atoms // STEP) * STEP
    made: list[Piece] = []
    for length in np.unique(padded).tolist():
        members = np.flatnonzero(padded == length)
        parts = -(-len(members) // max(1, most_pairs // length**2))
        for part in np.array_split(members, parts):
            made.append(Piece(len(made), index[part], num_atoms[part], length))
    return made


@dataclass(frozen=True)
class Sampled:
    """B crystals as they came from the model; what is wrong with them is not known yet."""

    index: np.ndarray  # (B,) int64
    num_atoms: np.ndarray  # (B,) int64
    species: np.ndarray  # (A,) uint8
    frac_coords: np.ndarray  # (A, 3) float32
    lattice: np.ndarray  # (B, 3, 3) float32 Å
    halved: np.ndarray  # (B,) bool: sampled in a smaller piece, for lack of memory
    reason: np.ndarray  # (B,) bytes: why there is no crystal; empty where there is one

    @staticmethod
    def of(index: np.ndarray, crystals: Crystals, halved: bool) -> "Sampled":
        """As the model gave them."""
        return Sampled(
            index,
            crystals.num_atoms.numpy(force=True),
            crystals.atomic_numbers.numpy(force=True).astype(np.uint8),
            crystals.frac_coords.numpy(force=True),
            crystals.lattice.numpy(force=True),
            np.full(len(index), halved),
            np.full(len(index), b"", dtype="S16"),
        )

    @staticmethod
    def none(index: np.ndarray, reason: str) -> "Sampled":
        """Crystals that could not be sampled: of one atom nowhere."""
        count = len(index)
        nowhere = np.full((count, 3), np.nan, dtype=np.float32), np.full((count, 3, 3), np.nan, dtype=np.float32)
        reasons = np.full(count, reason.encode(), dtype="S16")
        return Sampled(index, np.ones(count, np.int64), np.ones(count, np.uint8), *nowhere,
                       np.zeros(count, dtype=bool), reasons)  # fmt: skip

    @staticmethod
    def join(parts: "list[Sampled]") -> "Sampled":
        """Several as one, in order; at least one."""
        return Sampled(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})

    def crystals(self) -> Crystals:
        """The same as crystals, whatever they are."""
        frac, lattice = torch.from_numpy(self.frac_coords), torch.from_numpy(self.lattice)
        return Crystals(
            frac, lattice, torch.from_numpy(self.species.astype(np.int64)), torch.from_numpy(self.num_atoms)
        )


class Kept:
    """The finished pieces of a block, in a file that is only added to: a kill costs the piece in progress, no more.

    Each record has its length and CRC-32 before it; what follows the first bad one is torn and left out. others:
    files of the same block that an earlier launch left, when the block was to be shorter.
    """

    def __init__(self, path: Path, others: list[Path]) -> None:
        self.path = path
        self._found: dict[tuple[int, int], Sampled] = {}
        for other in others:
            self._read(other)
        whole = self._read(path)
        if whole < _size(path):
            with storage_faults(path):
                os.truncate(path, whole)

    def take(self, tile: int, piece: int) -> Sampled | None:
        """A piece that was finished before, once."""
        return self._found.pop((tile, piece), None)

    def add(self, tile: int, piece: int, sampled: Sampled) -> None:
        """Keep a piece. Raises StorageError."""
        buffer = io.BytesIO()
        np.savez(buffer, key=np.array([tile, piece]), **vars(sampled))
        data = buffer.getvalue()
        frame = len(data).to_bytes(4, "little") + zlib.crc32(data).to_bytes(4, "little")
        with storage_faults(self.path), self.path.open("ab", buffering=0) as file:
            if file.write(frame + data) != len(frame) + len(data):
                raise OSError(28, "No space left on device")

    def _read(self, path: Path) -> int:
        """Remember the records of a file; the number of bytes that hold whole ones."""
        end = 0
        for data in _records(path):
            with np.load(io.BytesIO(data)) as record:
                told = dict(record)
            tile, piece = told.pop("key").tolist()
            self._found[tile, piece] = Sampled(**told)
            end += _FRAME + len(data)
        return end


def _records(path: Path) -> Iterator[bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    at = 0
    while at + _FRAME < len(data):
        length, check = (int.from_bytes(data[at + k : at + k + 4], "little") for k in (0, 4))
        record = data[at + _FRAME : at + _FRAME + length]
        if not length or len(record) < length or zlib.crc32(record) != check:
            return
        yield record
        at += _FRAME + length


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
