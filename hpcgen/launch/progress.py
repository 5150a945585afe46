"""How far a run is, and how fast: of every verb, from its heartbeats, logs and files."""

import re
from dataclasses import dataclass

from hpcgen.launch.folder import Folder, listed, number_of, record_of

_STRETCH_S = 600.0  # the rate is that of the last ten minutes
_PASSES = {"reading structures": "parsed-", "reducing cells": "reduced-", "comparing crystals": "matched-",
           "writing shards": ""}  # fmt: skip
_MEASURES = {"reducing cells": "cells-", "comparing crystals": "same-", "fingerprints of the reference": "known-",
             "nearest of the reference": "nearest-", "describing crystals": "described-own-",
             "describing the reference": "described-known-"}  # of evaluate, beside its table  # fmt: skip
_BLOCK = re.compile(r"all-(\d+)(?:-to-(\d+))?\.h5")


@dataclass(frozen=True)
class Progress:
    """What is done. A store is built in passes: done, total and left_s are those of the pass that `phase` names."""

    done: int
    total: int | None
    unit: str  # steps, crystals, items (rows or crystals looked at) or blocks
    phase: str = ""  # of preprocess and evaluate
    rate: float | None = None  # units per second: of training in the last ten minutes, else since the launch began
    left_s: float | None = None  # of a run that is running
    blocks_failed: int = 0  # given up in the newest launch
    saved: int | None = None  # step of training's newest checkpoint, from which the same command goes on


@dataclass(frozen=True)
class Losses:
    """The newest lines of a training; None: no such line yet, or a loss that was not finite."""

    loss: float | None
    step: int | None
    validation_loss: float | None
    validation_step: int | None
    crystals_per_s: float | None
    age_s: float  # since the newest line


def progress_of(folder: Folder, state: str) -> Progress | None:
    if folder.verb == "train":
        return _steps(folder, state)
    failed = len(folder.failed)
    told = [beat for beat in folder.beats if beat.get("label") and isinstance(beat.get("items_total"), int)]
    if told and not folder.is_complete:
        label = max(told, key=lambda beat: number_of(beat, "time"))["label"]
        beat = max((b for b in told if b["label"] == label), key=lambda beat: number_of(beat, "items_done"))
        done, total, rate = int(number_of(beat, "items_done")), beat["items_total"], number_of(beat, "rate") or None
        unit, phase = ("crystals", "") if folder.verb == "campaign" else ("items", label)
        return Progress(done, total, unit, phase, rate, _left(done, total, rate, state), failed)
    if folder.verb == "campaign":
        return Progress(*_crystals(folder), "crystals", blocks_failed=failed)
    if folder.verb in ("preprocess", "evaluate"):
        return _blocks(folder, failed)
    return None


def _steps(folder: Folder, state: str) -> Progress:
    """Of a training: its heartbeat is the newest, what it says at the end the last."""
    beat = next((beat for beat in folder.beats if "step" in beat), None)
    marks = [line for line in folder.metrics if line.get("kind") == "train" and "step" in line]
    saved = max((int(p.stem[5:]) for p in listed(folder.run / "checkpoints", ".pt") if p.stem[5:].isdecimal()),
                default=None)  # fmt: skip
    last = beat or folder.end or (marks[-1] if marks else {"step": saved or 0})
    total = folder.number("steps")
    begun = folder.launches[-1].time if folder.launches else 0.0
    points = [(number_of(mark, "time"), int(mark["step"])) for mark in [*marks, *([beat] if beat else [])]]
    rate = _rate([point for point in points if point[0] >= begun])
    done = int(number_of(last, "step"))
    return Progress(done, total, "steps", "", rate, _left(done, total, rate, state), 0, saved)


def _rate(points: list[tuple[float, int]]) -> float | None:
    """Steps per second between the first and the last of points (time, step) within a stretch."""
    if len(points) < 2:
        return None
    (now, step) = points[-1]
    then, first = next((p for p in points[:-1] if p[0] >= now - _STRETCH_S), points[-2])
    return round((step - first) / (now - then), 6) if now > then and step > first else None


def _left(done: int, total: int | None, rate: float | None, state: str) -> float | None:
    return round((total - done) / rate, 1) if state == "running" and rate and total is not None else None


def _crystals(folder: Folder) -> tuple[int, int | None]:
    """Crystals in the blocks of a campaign that are in place, and those asked for."""
    asked, block = folder.number("n"), folder.number("block")
    ends: dict[int, int] = {}
    for found in filter(None, map(_BLOCK.fullmatch, folder.names)):
        index, end = int(found[1]), found[2]
        stop = int(end) if end else (index + 1) * (block or 0)
        ends[index] = max(stop, ends.get(index, 0))
    done = sum(stop - index * (block or 0) for index, stop in ends.items())
    return (done if asked is None else min(done, asked)), asked


def _blocks(folder: Folder, failed: int) -> Progress:
    """Of a store that is being built or a run that is evaluated, by the blocks in place."""
    if folder.verb == "preprocess" and folder.is_complete:
        rows = int(number_of((record_of(folder.run / "build.json") or {}).get("counts") or {}, "rows"))
        return Progress(rows, rows, "items")
    label, total = str(folder.passing.get("label", "")), folder.passing.get("blocks")
    if folder.verb == "evaluate":
        names, prefix = folder.names, _MEASURES.get(label, "all-" if folder.is_read else "rows-")
    else:
        at = folder.run if label == "writing shards" else folder.run / "work"
        names, prefix = {path.name for path in listed(at, "")}, _PASSES.get(label, "")
    blocks = [name for name in names if name.startswith(prefix) and name.endswith((".h5", ".npz", ".npy", ".csv"))]
    done = len(blocks) if label else 0
    return Progress(done, total if isinstance(total, int) else None, "blocks", label, blocks_failed=failed)


def losses_of(folder: Folder) -> Losses | None:
    newest = {line.get("kind"): line for line in folder.metrics}
    if not newest:
        return None
    train, validation = newest.get("train", {}), newest.get("validation", {})
    age = folder.now - max(number_of(line, "time") for line in newest.values())
    return Losses(
        train.get("loss"), train.get("step"), validation.get("loss"), validation.get("step"),
        train.get("crystals_per_s"), round(max(age, 0.0), 1),
    )  # fmt: skip
