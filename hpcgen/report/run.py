"""What a run folder tells about itself, read for the page: settings, launches, counts, evaluations, training curves."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeGuard

from hpcgen.errors import InputError
from hpcgen.files import read_json_lines
from hpcgen.launch.folder import Folder, number_of, record_of
from hpcgen.store.layout import MANIFEST, Manifest, flat, read_manifest

SUMMARY, METRICS = "summary.json", "metrics.jsonl"  # of a campaign and of a training
_HIDDEN = {"out", "n", "checkpoint_sha256", "targets_sha256", "processes"}  # said elsewhere, or nothing to a reader


@dataclass(frozen=True)
class Training:
    """The curves of a training run."""

    path: Path
    train: list[dict[str, Any]]  # lines of metrics.jsonl, by step
    validation: list[dict[str, Any]]
    note: str = ""  # where it is not plainly that of the checkpoint


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
    return [_read(path, name) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise InputError(f"{path}: is no folder, want the run folder of a campaign or a training, or a store")
    try:
        folder = Folder(path)
        begun = MANIFEST not in folder.names
        verb = folder.verb if begun else ""
    except OSError as fault:
        raise InputError(f"{fault.filename or path}: cannot be read ({fault.strerror or fault})") from fault
    if verb == "train":
        return Run(path, name, "training", None, _settings(path), folder)
    if begun:
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
    if isinstance(value, float) and value == round(value) and abs(value) < 1e15:
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


# ---- asked and done --------------------------------------------------------------------------------------------------


def asked_and_done(run: Run) -> dict[str, str]:
    """What was asked for and what became of it, in the order of the page."""
    told: dict[str, str] = {"kind": _kind(run)}
    if run.manifest is not None:
        told |= {"crystals asked for": f"{run.asked:,}", "crystals written": f"{run.crystals:,}"}
        told["atoms written"] = f"{sum(shard.atoms for shard in run.manifest.shards):,}"
        if run.kind == "campaign":
            lost = sum(run.rejected.values())
            told["rejected"] = f"{lost:,}" if lost else "none"
        else:
            told["source"] = f"{run.manifest.head.source}, by {run.manifest.writer}"
    if run.kind == "training":
        told |= _trained(run)
    return told | _pace(run) | _launches(run)


def _kind(run: Run) -> str:
    task = {"generate": "free generation", "predict": "structure prediction"}.get(str(run.summary.get("task")), "")
    return f"{run.kind}{f', {task}' if run.kind == 'campaign' and task else ''}"


def _trained(run: Run) -> dict[str, str]:
    curves = read_training(run.path)
    last = curves.train[-1] if curves.train else {}
    steps = run.settings.get("steps", "?")
    best = min((line["loss"] for line in curves.validation if is_number(line.get("loss"))), default=None)
    told = {"steps": f"{int(number_of(last, 'step')):,} of {int(steps):,}" if steps.isdecimal() else steps}
    if best is not None:
        told["lowest validation loss"] = f"{best:.4g}"
    return told


def _pace(run: Run) -> dict[str, str]:
    """Rates of a campaign: of its last launch, and of all its blocks."""
    if run.kind != "campaign":
        return {}
    told: dict[str, str] = {}
    if is_number(rate := run.summary.get("crystals_per_s")) and run.summary.get("sampled"):
        told["crystals per second, last launch"] = f"{rate:.3g}"
    if is_number(outside := run.summary.get("outside")):
        told["time outside the model, last launch"] = f"{100 * outside:.1f} %"
    blocks = read_json_lines(run.path / METRICS)
    sampled = sum(number_of(line, "sampled") for line in blocks)
    spent = sum(number_of(line, "sampling_s") for line in blocks)
    if spent:
        told["sampling, all launches"] = f"{span(spent)} of workers' time, {sampled / spent:.3g} crystals/s each"
    return told


def _launches(run: Run) -> dict[str, str]:
    launches = run.folder.launches
    if not launches:
        return {}
    first, last = launches[0].start, launches[-1].end or {}
    told = {"launches": f"{len(launches):,}"}
    words = [
        str(first.get("team", "")),
        f"{first.get('size', 1)} rank{'s' * (first.get('size') != 1)}",
        f"first on {first.get('host', '?')}",
    ]
    told["team"] = ", ".join(filter(None, words))
    told["begun"] = _date(number_of(first, "time"))
    if last:
        ended = {"done": "done"}.get(str(last.get("event")), str(last.get("reason") or last.get("event")))
        told["ended"] = f"{_date(number_of(last, 'time'))}, {ended}"
    versions = [f"{name} {first[name]}" for name in ("hpcgen", "torch", "python") if first.get(name)]
    told["versions"] = ", ".join(versions)
    return told


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M") if seconds else "?"


def span(seconds: float) -> str:
    """A time in words: 35 s, 12 min, 3.4 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def settings_of(run: Run) -> dict[str, str]:
    """The settings worth reading: of a campaign or a training without empty ones, of a store what made it."""
    if run.kind == "store" and run.manifest is not None:
        from hpcgen.store.inspect import in_words

        return {name: in_words(value) for name, value in flat(run.manifest.head.settings)}
    told = {name: value for name, value in run.settings.items() if value and name not in _HIDDEN}
    if sha := run.settings.get("checkpoint_sha256"):
        told["checkpoint"] = f"{told.get('checkpoint', '')} (sha256 {sha[:12]})"
    return told


# ---- training --------------------------------------------------------------------------------------------------------


def training_of(run: Run) -> Training | str:
    """The training that made the run's checkpoint, or is the run; else a sentence that says why there is none."""
    if run.kind == "training":
        return read_training(run.path)
    checkpoint = run.settings.get("checkpoint", "")
    if run.kind != "campaign" or not checkpoint:
        return f"{run.name} was made by no checkpoint that it names."
    for at in (Path(checkpoint), run.path.parent / checkpoint):
        if (at.parent / METRICS).exists() and (at.parent / "config.yaml").exists():
            return read_training(at.parent, _changed(at, run.settings.get("checkpoint_sha256", "")))
    told = Path(checkpoint).with_suffix(".md")
    return (
        f"The training run of {checkpoint} is not in the folder of that file"
        + (f" ({told.name} there tells of it)" if told.exists() else "")
        + "; name its folder as another RUN to draw its curves."
    )


def _changed(checkpoint: Path, sha256: str) -> str:
    try:
        with checkpoint.open("rb") as file:
            same = not sha256 or hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError:
        return f"{checkpoint.name} itself is gone"
    return "" if same else f"{checkpoint.name} has changed since the campaign began: the training went on"


def read_training(path: Path, note: str = "") -> Training:
    """The lines of metrics.jsonl by kind, each with a finite step."""
    lines = [line for line in read_json_lines(path / METRICS) if is_number(line.get("step"))]
    lines.sort(key=lambda line: line["step"])
    train, validation = ([line for line in lines if line.get("kind") == kind] for kind in ("train", "validation"))
    return Training(path, train, validation, note)


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    """Steps and values of one quantity where it is finite."""
    for line in lines:
        if is_number(line.get(name)):
            yield float(line["step"]), float(line[name])
