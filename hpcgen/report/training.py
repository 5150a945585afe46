"""The curves of a training: of the one that made a run's checkpoint, or of a training's own folder."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgen.files import read_json_lines
from hpcgen.report.run import METRICS, Run, is_number


@dataclass(frozen=True)
class Training:
    """The curves of a training run."""

    path: Path
    train: list[dict[str, Any]]  # lines of metrics.jsonl, by step
    validation: list[dict[str, Any]]
    note: str = ""  # where it is not plainly that of the checkpoint


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
    found = (line for line in read_json_lines(path / METRICS) if isinstance(line, dict))
    lines = [line for line in found if is_number(line.get("step"))]
    lines.sort(key=lambda line: line["step"])
    train, validation = ([line for line in lines if line.get("kind") == kind] for kind in ("train", "validation"))
    return Training(path, train, validation, note)


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[float, float]]:
    """Steps and values of one quantity where it is finite."""
    for line in lines:
        if is_number(line.get(name)):
            yield float(line["step"]), float(line[name])
