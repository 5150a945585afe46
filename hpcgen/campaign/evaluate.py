"""`hpcgen evaluate`: measure every crystal of a run in parallel, then print figures that come from that table alone."""

import csv
import hashlib
import io
import itertools
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hpcgen.campaign.aims import Aims
from hpcgen.campaign.config import SUMMARY
from hpcgen.campaign.describe import Side, describe
from hpcgen.campaign.likeness import Likeness
from hpcgen.campaign.measure import MeasureBlock, control_rows, header
from hpcgen.campaign.novelty import measure_novelty, screened
from hpcgen.campaign.pairs import BY_COMPOSITION, INDEX, Pairs, campaign_of, lines_of, pair
from hpcgen.campaign.request import Request
from hpcgen.errors import InputError, UsageError
from hpcgen.files import make_folder, whole, write_json
from hpcgen.metrics import novelty, prediction, summary, targeted
from hpcgen.metrics.bootstrap import LEVEL, RESAMPLES
from hpcgen.metrics.cells import Sets
from hpcgen.metrics.match import Comparison
from hpcgen.metrics.summary import Table, bond_figures, charge_figures, generate_figures, validity_figures
from hpcgen.runner.blocks import Block, How, once, run_blocks
from hpcgen.runner.lease import Lease
from hpcgen.runner.stop import StopFlag
from hpcgen.runner.team import Team
from hpcgen.screen.potential import potential_named
from hpcgen.store.layout import read_manifest
from hpcgen.store.read import Store, refuse_damaged

CONTROL = 2000  # crystals of the reference that the control looks at
PRELOAD = ("hpcgen.campaign.novelty", "hpcgen.campaign.measure", "pymatgen.analysis.structure_matcher",
           "pymatgen.analysis.bond_valence", "ase.data", "scipy.optimize")  # fmt: skip
_VERSIONS = ("hpcgen", "pymatgen", "pymatgen-core", "ase", "torch", "numpy", "scipy", "moyopy", "chgnet")


def evaluate(request: Request, out: Path | None, team: Team, processes: int | None = None) -> dict[str, Any] | None:
    """Evaluate, or finish what an earlier call began; on the member that speaks for the launch, what was found.

    Writes `out`, by default RUN/evaluate/TASK.json, and beside it the table as CSV, both whole. What was evaluated
    already, with the same settings and versions, is read from there. processes: None for all usable cores, 0 for none.
    Raises UsageError, InputError, StorageError, StoppedEarly, TooManyFailed if blocks failed.
    """
    out = out or request.run / "evaluate" / f"{request.task}.json"
    for store in filter(None, (request.run, request.reference)):
        refuse_damaged(store)
    if out.suffix == ".csv" or out.is_dir():
        raise UsageError(f"--json {out}: want the name of a JSON file; the table goes beside it as CSV")
    written = _written(request.run)
    reference = Store(request.reference, request.split, dtype=None) if request.reference else None
    counts = _counts(request, written)
    aims = Aims.read(request, counts.written, reference)
    making = _making(request, counts)
    work = out.with_name(f"{out.stem}.{making['hash']}.work")
    if not work.exists() and (found := _finished(out, making["hash"])) is not None:
        return found if team.rank == 0 else None
    likeness = _likeness(request, reference, counts)
    make_folder(work)
    with StopFlag() as stop, Lease.take(work, team) as lease:
        blocks = _measure(request, reference, counts, work, lease, stop, processes)
        for kind, side in (("own", likeness.run), ("known", likeness.reference)) if likeness else ():
            describe(side, kind, out.parent, lease, stop, processes, request.pair_timeout_s)
        more = None
        if request.novelty and request.task == "generate" and counts.written:
            sets = Sets(request.run, counts.written, request.reference, request.split, len(reference or ()))
            how = How(processes, PRELOAD, request.pair_timeout_s)
            more = measure_novelty(sets, work, lease=lease, stop=stop, how=how)

        def finish(draft: Path) -> None:
            _write_table(out.with_suffix(".csv"), blocks, request.task == "predict", more, lease.token)
            write_json(
                out, {**_told(request, reference, counts, work, out, likeness, aims), **making}, token=lease.token
            )
            write_json(draft, {"done": True})

        once(work / "done.json", finish, lease=lease, stop=stop)
        while (leader := lease.leads()) and lease.others_alive():  # they may still look for what is cleared up below
            stop.check()
            time.sleep(0.05)
    if not leader:
        return None
    shutil.rmtree(work, ignore_errors=True)
    return _finished(out, making["hash"])


@dataclass(frozen=True)
class _Counts:
    """asked = written + rejected, of what is evaluated."""

    asked: int
    written: int
    rejected: dict[str, int]
    note: str = ""
    lines: int | None = None  # compositions that a campaign was asked for; None: no such campaign


def _likeness(request: Request, reference: Store | None, counts: _Counts) -> Likeness | None:
    """What is asked of the fingerprints, if they are."""
    if reference is None or request.task != "generate" or not request.coverage or not counts.written:
        return None
    potential = potential_named() if request.energy else ""
    run = Side(request.run, None, counts.written, potential)
    sides = run, Side(reference.path, request.split, len(reference), potential)
    return Likeness(*sides, cut_offs=request.cut_offs, samples=request.samples, seed=request.seed)


def _told(
    request: Request,
    reference: Store | None,
    counts: _Counts,
    work: Path,
    out: Path,
    likeness: Likeness | None,
    aims: Aims,
) -> dict[str, Any]:
    """All that is to be said of an evaluation, from its table and fingerprints, beside what made it."""
    table_file = out.with_suffix(".csv")
    table, paired, seed = Table(_read(table_file)), None, request.seed
    figures = _own_figures(table, counts.asked, seed)
    if request.task == "predict":
        pairs = Pairs.load(work / "pairs.npz")
        lost = dict(zip(pairs.lost.tolist(), pairs.lost_valid.tolist(), strict=True))
        figures |= prediction.predict_figures(table, counts.asked, seed, counts.lines, lost)
        paired = pairs.by
        if reference is not None and paired == BY_COMPOSITION:
            stol = Comparison().tolerances.stol
            figures["metre"] = prediction.metre_figures(table, len(reference), stol, seed)
    else:
        largest = int(reference.sizes().atoms.max()) if reference is not None else None
        figures |= generate_figures(table, seed, largest)
    figures |= aims.figures(table, counts.asked)
    if likeness is not None:
        figures |= likeness.figures(out.parent, table.flag("valid"), counts.asked)
    if (work / "novelty.csv").exists():
        figures["novelty"] = novelty.novelty_figures(
            novelty.Verdicts(_read(table_file)), counts.asked, request.seed,
            compared=request.reference is not None, screened=screened(request.run),
        )  # fmt: skip
    control = json.loads((work / "control.json").read_text(encoding="utf-8"))
    return {
        "task": request.task,
        "run": str(request.run),
        "reference": _named(request),
        "reference_crystals": None if reference is None else len(reference),
        **asdict(counts),
        "not_measured": dict(sorted(table.reasons.items())),
        "paired": paired,
        "intervals": {"level": LEVEL, "resamples": RESAMPLES, "seed": seed},
        "figures": figures,
        "control": control,
        "definitions": summary.DEFINITIONS
        | targeted.DEFINITIONS
        | (prediction.DEFINITIONS if request.task == "predict" else {})
        | (novelty.DEFINITIONS if "novelty" in figures else {}),
        "tolerances": {"match": asdict(Comparison().tolerances), "strict": asdict(Comparison().strict)}
        | ({"same": novelty.tolerances()} if "novelty" in figures else {}),
        "table": table_file.name,
    }


def _own_figures(table: Table, asked: int, seed: int) -> dict[str, Any]:
    """Of crystals by themselves: validity, bonds, charges."""
    rules = {"validity": validity_figures, "bonds": bond_figures, "charges": charge_figures}
    return {name: figures(table, asked, seed) for name, figures in rules.items()}


def _measure(
    request: Request,
    reference: Store | None,
    counts: _Counts,
    work: Path,
    lease: Lease,
    stop: StopFlag,
    processes: int | None,
) -> list[Block]:
    """Control, pairs and the blocks of the table, in `work`."""
    split, count = request.split, counts.written
    pairs = work / "pairs.npz" if request.task == "predict" else None
    if pairs is not None and reference is not None:
        once(pairs, lambda draft: pair(request.pair, request.run, reference, count, counts.asked).save(draft),
             lease=lease, stop=stop)  # fmt: skip
    once(work / "control.json", lambda draft: write_json(draft, _control(request, reference, count)), lease=lease,
         stop=stop)  # fmt: skip
    size = rows_per_block(count, predicts=pairs is not None)
    blocks = [Block(number, work / f"rows-{number:06d}.csv", min(size, count - start))
              for number, start in enumerate(range(0, count, size))]  # fmt: skip
    work_on = MeasureBlock(request.run, size, (request.reference, split) if request.reference else None, pairs)
    how = How(processes, PRELOAD, request.pair_timeout_s, label="evaluating")
    run_blocks(blocks, work_on, lease=lease, stop=stop, how=how).refuse_failed(request.run, len(blocks))
    return blocks


def rows_per_block(count: int, predicts: bool) -> int:
    """Enough blocks for many ranks, few enough files: some seconds of work each."""
    least, most = (16, 1024) if predicts else (256, 4096)
    return min(max(count // 512, least), most)


def _control(request: Request, reference: Store | None, written: int) -> dict[str, Any] | None:
    """What the rules say of random coordinates in the cells of some crystals of the reference, and of these crystals.

    Without a reference in the cells of the run; None if nothing was written there.
    """
    if reference is None and not written:
        return None
    crystals = reference if reference is not None else Store(request.run, dtype=None, columns=[])
    rows = control_rows(crystals, CONTROL, request.seed)
    tables = {kind: Table({name: str(value) for name, value in row.items()} for row in own) for kind, own in rows}
    if reference is None:
        del tables["real"]  # is what is evaluated
    many = len(tables["random"])
    told: dict[str, Any] = {"of": "run" if reference is None else "reference", "crystals": many, "seed": request.seed}
    for kind, table in tables.items():
        figures = _own_figures(table, many, request.seed)
        told[kind] = {**figures.pop("validity"), **figures}
    return told


def _written(run: Path) -> int:
    """Crystals of a store. Raises InputError if there are none and no campaign says why."""
    count = sum(shard.crystals for shard in read_manifest(run).shards)
    return count if count or (run / SUMMARY).exists() else len(Store(run))


def _counts(request: Request, written: int) -> _Counts:
    """What the campaign's summary says, cut to the limit. Raises InputError if it does not fit the store."""
    file, asked, rejected = request.run / SUMMARY, written, {}
    if file.exists():
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            rejected = {str(reason): int(count) for reason, count in told["rejected"].items() if int(count)}
            asked = int(told["asked"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as fault:
            raise InputError(f"{file}: no summary of a campaign ({fault!r})") from fault
    if asked != written + sum(rejected.values()):
        raise InputError(
            f"{file}: {asked} crystals asked for are not the {written} of the store and {sum(rejected.values())} "
            "rejected ones; let the campaign finish"
        )
    campaign = campaign_of(request.run) if request.task == "predict" or request.limit else None
    lines = lines_of(campaign)
    if request.limit is None or request.limit >= written:
        return _Counts(asked, written, rejected, lines=lines)
    note = f"the first {request.limit:,} of {written:,} crystals written, of {asked:,} asked"
    if campaign is not None:
        first = int(Store(request.run).column(INDEX).values[request.limit - 1]) + 1  # asked for, down to the last one
        return _Counts(first, request.limit, _if_any("for-any-reason", first - request.limit), note, lines)
    share = -(-asked * request.limit // written)  # rejected ones count in proportion, rounded up
    return _Counts(share, request.limit, _if_any("in-proportion", share - request.limit), note)


def _if_any(reason: str, count: int) -> dict[str, int]:
    return {reason: count} if count else {}


def _named(request: Request) -> str | None:
    if request.reference is None:
        return None
    return f"{request.reference}" + (f" ({request.split})" if request.split else "")


def _making(request: Request, counts: _Counts) -> dict[str, Any]:
    """All that determines the figures: settings, the bytes of the stores, versions."""
    stores = {}
    for name, path in (("run", request.run), ("reference", request.reference)):
        if path is not None:
            shards = [(shard.name, shard.sha256) for shard in read_manifest(path).shards]
            stores[name] = hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:16]
    versions = {}
    for package in _VERSIONS:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(request).items()}
    made = {"request": asked, "stores": stores, "versions": versions}
    told = json.dumps([made, asdict(counts)], sort_keys=True)
    return {**made, "hash": hashlib.sha256(told.encode()).hexdigest()[:12]}


def _finished(out: Path, making: str) -> dict[str, Any] | None:
    """What stands in `out` if it is this very evaluation, its table beside it."""
    with suppress(OSError, ValueError, AttributeError):
        found = json.loads(out.read_text(encoding="utf-8"))
        if found.get("hash") == making and out.with_suffix(".csv").exists():
            return found
    return None


def _write_table(path: Path, blocks: list[Block], predicts: bool, more: Path | None, token: str) -> None:
    """All blocks as one CSV file under a header, with the columns of the file `more` behind those of the blocks."""
    names = header(predicts) + list(novelty.COLUMNS if more else ())
    with whole(path, token=token) as draft, draft.open("wb") as file:
        file.write((",".join(names) + "\n").encode())
        if more is None:
            for block in blocks:
                with block.path.open("rb") as part:
                    shutil.copyfileobj(part, file)
        else:
            own = itertools.chain.from_iterable(_lines(block.path) for block in blocks)
            with io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True) as text:
                rows = ([*one, *other] for one, other in zip(own, _lines(more), strict=True))
                csv.writer(text, lineterminator="\n").writerows(rows)


def _lines(part: Path) -> Iterator[list[str]]:
    with part.open(encoding="utf-8", newline="") as file:
        yield from csv.reader(file)


def _read(table: Path) -> Iterator[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)
