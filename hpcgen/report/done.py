"""What a run was asked for, with which settings, and what became of it, in words."""

from datetime import datetime

from hpcgen.files import read_json_lines
from hpcgen.launch.folder import number_of
from hpcgen.report.run import METRICS, Run, is_number
from hpcgen.report.training import read_training
from hpcgen.store.inspect import in_words
from hpcgen.store.layout import flat

_HIDDEN = {"out", "n", "checkpoint_sha256", "targets_sha256", "processes"}  # said elsewhere, or nothing to a reader


def asked_and_done(run: Run) -> dict[str, str]:
    """What was asked for and what became of it, in the order of the page."""
    told: dict[str, str] = {"kind": _kind(run)}
    if run.manifest is not None:
        if run.kind == "campaign":
            told["crystals asked for"] = f"{run.asked:,}"
        told |= {"crystals": f"{run.crystals:,}", "atoms": f"{sum(shard.atoms for shard in run.manifest.shards):,}"}
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
    blocks = [line for line in read_json_lines(run.path / METRICS) if isinstance(line, dict)]
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
        return {name: in_words(value) for name, value in flat(run.manifest.head.settings)}
    told = {name: value for name, value in run.settings.items() if value and name not in _HIDDEN}
    if sha := run.settings.get("checkpoint_sha256"):
        told["checkpoint"] = f"{told.get('checkpoint', '')} (sha256 {sha[:12]})"
    return told
