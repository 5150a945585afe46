"""Many crystals in one file, as the evaluators of other generators read them: a zip of CIFs, and arrays in a .pt file.

The arrays are those that `compute_metrics.py` of CDVAE (Xie et al., ICLR 2022) and of DiffCSP (Jiao et al., NeurIPS
2023) takes from `eval_gen.pt`, for B crystals of A atoms in all:

    frac_coords (A, 3)    atom_types (A,) atomic numbers    lengths (B, 3) Å    angles (B, 3) degrees    num_atoms (B,)

CDVAE wants one more dimension in front, over samples, of which it reads the first; DiffCSP wants it for predictions
(`eval_diff.pt`) but not for free generation.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from hpcgen.crystal.crystals import Crystals
from hpcgen.crystal.lattice import lattice_parameters
from hpcgen.crystal.torus import wrap

ARRAYS = {
    "frac_coords": (torch.float64, 3),
    "atom_types": (torch.int64, 0),
    "lengths": (torch.float64, 3),
    "angles": (torch.float64, 3),
    "num_atoms": (torch.int64, 0),
}  # dtype, and numbers of a row, 0 for one that is no row


@contextmanager
def zip_file(path: Path) -> Iterator[Callable[[str, str], None]]:
    """Yield what adds a named text to a new zip archive. Same texts, same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, text: str) -> None:
            entry = zipfile.ZipInfo(name)  # of 1980: the time of writing is no part of the crystals
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, text.encode("utf-8"))

        yield add


@contextmanager
def array_file(path: Path, *, samples: bool) -> Iterator[Callable[[Crystals], None]]:
    """Yield what adds crystals to a new .pt file of ARRAYS, with a leading dimension of one sample or without.

    The arrays grow in files beside it and are mapped, not read, when they are saved: memory stays flat.
    """
    parts = {name: path.with_name(f"{path.name}.{name}") for name in ARRAYS}
    with ExitStack() as opened:
        files: dict[str, IO[bytes]] = {name: opened.enter_context(part.open("wb")) for name, part in parts.items()}

        def add(crystals: Crystals) -> None:
            for name, array in arrays_of(crystals).items():
                files[name].write(array.numpy().tobytes())

        yield add
    tensors = {name: _mapped(parts[name], *ARRAYS[name]) for name in ARRAYS}
    with path.open("wb") as file:
        try:
            torch.save({name: tensor[None] if samples else tensor for name, tensor in tensors.items()}, file)
        except RuntimeError as fault:  # torch hides a full disk behind an error of its own
            raise fault.__context__ if isinstance(fault.__context__, OSError) else fault from None
    for part in parts.values():
        part.unlink()


def arrays_of(crystals: Crystals) -> dict[str, Tensor]:
    """ARRAYS of a batch, float64. A left-handed cell is turned into the right-handed one of the same crystal.

    Lengths and angles alone make right-handed cells: turning all its vectors round, and the coordinates with them,
    keeps the crystal from becoming its mirror image.
    """
    frac, lattice = crystals.frac_coords.double(), crystals.lattice.double()
    turned = (torch.linalg.det(lattice) < 0)[crystals.batch]
    lengths, angles = lattice_parameters(lattice)
    return {
        "frac_coords": torch.where(turned[:, None], wrap(-frac), frac),
        "atom_types": crystals.atomic_numbers,
        "lengths": lengths,
        "angles": angles,
        "num_atoms": crystals.num_atoms,
    }


def _mapped(part: Path, dtype: torch.dtype, width: int) -> Tensor:
    size = part.stat().st_size // dtype.itemsize
    flat = torch.from_file(str(part), shared=False, size=size, dtype=dtype)
    return flat.view(-1, width) if width else flat
