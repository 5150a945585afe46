"""A run folder as it stands on disk, read for the page: a campaign, a training, or any store."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from hpcgen.errors import InputError
from hpcgen.launch.folder import Folder, record_of
from hpcgen.store.layout import MANIFEST, Manifest, flat, read_manifest

SUMMARY, METRICS = "summary.json", "metrics.jsonl"  # of a campaign and of a training


@dataclass(frozen=True)
class Run:
    """A run as it stands on disk. manifest: None for a training, which holds no crystals."""

    path: Path
    name: str  # no other run of the page has it
    kind: str  # campaign, training, store
    manifest: Manifest | None
    settings: Mapping[str, str]
    folder: Folder
    summary: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by name of the file
    notes: Sequence[str] = ()  # what could not be read

    @property
    def crystals(self) -> int:
        return sum(shard.crystals for shard in self.manifest.shards) if self.manifest else 0

    @property
    def rejected(self) -> dict[str, int]:
        """Crystals asked for that are none, by reason."""
        told = self.summary.get("rejected")
        return {str(why): int(n) for why, n in told.items() if is_number(n)} if isinstance(told, dict) else {}

    @property
    def asked(self) -> int:
        """Crystals asked for; of a store that no campaign made those that are there."""
        told = self.summary.get("asked")
        return int(told) if is_number(told) else self.crystals


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All runs of a page. Raises InputError for what is no run, has not ended, or holds nothing to show."""
    resolved = [path.resolve() for path in paths]
    names = [path.name for path in resolved]
    names = [f"{path.parent.name}/{path.name}" if names.count(path.name) > 1 else path.name for path in resolved]
    names = [str(path) if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise InputError(f"{path}: is no folder, want the run folder of a campaign or a training, or a store")
    try:
        folder = Folder(path)
        is_store = MANIFEST in folder.names
        verb = "" if is_store else folder.verb
    except OSError as fault:
        raise InputError(f"{fault.filename or path}: cannot be read ({fault.strerror or fault})") from fault
    if verb == "train":
        return Run(path, name, "training", None, _settings(path), folder)
    if not is_store:
        raise InputError(f"{path}: {verb or 'the run'} has not ended (no {MANIFEST}); the same command finishes it")
    summary = record_of(path / SUMMARY) or {}
    manifest = read_manifest(path)
    kind = "campaign" if manifest.head.source == "campaign" and summary else "store"
    evaluations, notes = _evaluations(path)
    run = Run(path, name, kind, manifest, _settings(path), folder, summary, evaluations, notes)
    if not run.crystals and not run.rejected:
        raise InputError(f"{path}: holds no crystals, and no campaign says why; there is nothing to report")
    return run


def _settings(path: Path) -> dict[str, str]:
    """config.yaml with dotted names, all as text; empty where there is none. Raises InputError for a broken one."""
    from omegaconf import DictConfig, OmegaConf

    file = path / "config.yaml"
    if not file.exists():
        return {}
    try:
        read = OmegaConf.load(file)
    except Exception as fault:  # PyYAML and OmegaConf each have their own tree of errors
        raise InputError(f"{file}: not a YAML config ({' '.join(str(fault).split())})") from fault
    if not isinstance(read, DictConfig):
        raise InputError(f"{file}: want `key: value` lines")
    told: Any = OmegaConf.to_container(read)
    return {name: _in_words(value) for name, value in flat(told)}


def _in_words(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return "" if value is None else str(value)


def _evaluations(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Every readable evaluate/*.json that holds figures, and a sentence for each other one."""
    found, notes = {}, []
    for file in sorted((path / "evaluate").glob("*.json")):
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(told, dict) or not isinstance(told.get("figures"), dict):
                raise ValueError("no figures")
            found[file.stem] = told
        except (OSError, ValueError) as fault:
            notes.append(f"{file}: is no evaluation ({fault})")
    return found, notes
