"""Files of tensors, numbers, strings and dicts: written whole, checked for damage before they are believed.

The format is torch's: a zip archive with a CRC-32 of every record. `torch.load` does not look at it (a flipped bit
passes), so it is looked at here.
"""

import pickle
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hpcgen.errors import InputError, StorageError
from hpcgen.files import whole

MODEL = "hpcgen model"
FORMAT = 1


def write_saved(
    path: Path, kind: str, content: dict[str, Any], *, before_rename: Callable[[], None] | None = None
) -> None:
    """Put `content` at `path`, whole. Raises StorageError; what was there before is then still there."""
    with whole(path, before_rename=before_rename) as draft, draft.open("wb") as file:
        try:
            torch.save({"kind": kind, "format": FORMAT, **content}, file)
        except RuntimeError as fault:  # torch hides a full disk behind an error of its own
            hidden = fault.__context__
            if isinstance(hidden, OSError):
                raise hidden from fault
            raise


def read_saved(path: Path, kind: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `write_saved` put there. Raises InputError where it is missing, damaged or of another kind; StorageError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise InputError(f"{path}: damaged ({damaged} does not match its checksum)")
        content = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder, want a checkpoint file") from None
    except OSError as fault:
        raise StorageError(f"{path}: cannot read ({fault.strerror or fault})") from fault
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as fault:
        raise InputError(f"{path}: not a whole checkpoint ({fault})") from fault
    except (pickle.UnpicklingError, RuntimeError, KeyError) as fault:
        raise InputError(f"{path}: not a checkpoint of hpcgen ({str(fault).splitlines()[0]})") from fault
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if found != kind:
        raise InputError(f"{path}: holds {found or 'something else'!r}, want {kind!r}")
    if not content.get("format", 0) <= FORMAT:
        raise InputError(f"{path}: format {content['format']} is of a newer hpcgen, this one reads up to {FORMAT}")
    return content


def write_model(
    path: Path,
    name: str,
    config: dict[str, Any],
    weights: dict[str, Any],
    facts: dict[str, Any],
    *,
    before_rename: Callable[[], None] | None = None,
) -> None:
    """A model to be used: its name in the registry, its own settings, its state dict, and how it was made."""
    content = {"model": name, "config": config, "weights": weights, "facts": facts}
    write_saved(path, MODEL, content, before_rename=before_rename)
