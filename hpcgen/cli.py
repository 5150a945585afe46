"""The command line: parses, imports inside each verb, calls, and turns errors into exit codes."""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpcgen import __version__
from hpcgen.errors import DONE, HpcgenError, InputError, StoppedEarly, UsageError
from hpcgen.runner.team import tell_script

_INTERNAL = HpcgenError.exit_code
_INTERRUPTED = 130
_PIPE_CLOSED = 141  # as any filter that ends by SIGPIPE

if TYPE_CHECKING:
    from hpcgen.campaign.config import CampaignConfig


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (see DESIGN.md). Never raises."""
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments, rest = parser().parse_known_args(argv)
    if rest and arguments.run is not _submit:  # whose command is read by its own parser
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}; see hpcgen --help")
    arguments.command = rest
    return guarded(lambda: arguments.run(arguments), resumable=arguments.resumable)


def guarded(call: Callable[[], int], *, resumable: bool = False) -> int:
    """The exit code of `call`, or of what it raised, said in one sentence on stderr. Never raises."""
    code = _guarded(call, resumable)
    tell_script(code)
    return code


def _guarded(call: Callable[[], int], resumable: bool) -> int:
    try:
        code = call()
        sys.stdout.flush()
        return code
    except SystemExit as leave:  # --help, --version
        return _flushed(int(leave.code or 0))
    except HpcgenError as fault:
        _complain(str(fault))
        return fault.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; the same command goes on from here" if resumable else "interrupted")
        return StoppedEarly.exit_code if resumable else _INTERRUPTED
    except BrokenPipeError:
        return _leave_pipe()
    except Exception:
        traceback.print_exc()
        _complain("an internal error, please report it with the lines above")
        return _INTERNAL


def _flushed(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _leave_pipe()
    return code


def _leave_pipe() -> int:
    """Nobody reads any more: say nothing, also not when the interpreter flushes on its way out."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _PIPE_CLOSED


def _complain(sentence: str) -> None:
    print(f"hpcgen: {sentence}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """All verbs and their arguments. Each leaf sets `run`, and `resumable` where ^C loses nothing."""
    top = _Parser(prog="hpcgen", description="Generative design of inorganic crystals on HPC clusters.")
    top.add_argument("--version", action="version", version=f"hpcgen {__version__}")
    top.set_defaults(resumable=False)
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)
    _add_store(verbs)
    _add_train(verbs)
    _add_campaign(verbs)
    _add_evaluate(verbs)
    _add_export(verbs)
    _add_report(verbs)
    _add_submit(verbs)
    _add_status(verbs)
    _add_doctor(verbs)
    return top


def _add_store(verbs: argparse._SubParsersAction) -> None:
    store = verbs.add_parser("store", help="look at, check and merge stores of crystals")
    actions = store.add_subparsers(title="actions", metavar="ACTION", required=True)

    info = actions.add_parser("info", help="what a store holds")
    info.add_argument("store", type=Path, metavar="STORE")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    info.set_defaults(run=_store_info)

    check = actions.add_parser("check", help="read every byte; exit code 4 if a shard is bad")
    check.add_argument("store", type=Path, metavar="STORE")
    check.set_defaults(run=_store_check)

    merge = actions.add_parser("merge", help="one store of several")
    merge.add_argument("stores", type=Path, nargs="+", metavar="STORE")
    merge.add_argument("--out", type=Path, required=True, help="folder of the new store, must not exist")
    merge.add_argument("--drop-edges", action="store_true", help="leave cached edges out")
    merge.add_argument("--prefix-ids", action="store_true", help="put the store's folder name before every id")
    merge.set_defaults(run=_store_merge)


def _store_info(arguments: argparse.Namespace) -> int:
    import json

    from hpcgen.store.inspect import describe, render

    told = describe(arguments.store)
    print(json.dumps(told, indent=1) if arguments.json else render(told))
    return DONE


def _store_check(arguments: argparse.Namespace) -> int:
    from hpcgen.store.inspect import check

    faults = check(arguments.store)
    for fault in faults:
        print(fault)
    if faults:
        raise InputError(f"{arguments.store}: faults found: {len(faults)}")
    print(f"{arguments.store}: all shards are good")
    return DONE


def _store_merge(arguments: argparse.Namespace) -> int:
    from hpcgen.runner.stop import StopFlag
    from hpcgen.store.merge import merge

    with StopFlag() as stop:
        made = merge(
            arguments.stores,
            arguments.out,
            drop_edges=arguments.drop_edges,
            prefix_ids=arguments.prefix_ids,
            stop=stop,
        )
    crystals = sum(shard.crystals for shard in made.shards)
    print(f"{arguments.out}: {crystals:,} crystals in {len(made.shards)} shards")
    return DONE


def _add_train(verbs: argparse._SubParsersAction) -> None:
    train = verbs.add_parser("train", help="train a model; again, to go on with it: alone, under torchrun or srun")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of what differs from the defaults")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings that go before those of the file")
    train.set_defaults(run=_train, resumable=True, job=_train_job)


def _train_job(arguments: argparse.Namespace) -> tuple[Path, list[str | Path]]:
    from hpcgen.train.config import TrainConfig, load

    config = load(TrainConfig, arguments.config, arguments.overrides)
    return Path(config.out), [arguments.config, config.store, config.init]


def _train(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.train.config import TrainConfig, load

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load(TrainConfig, arguments.config, arguments.overrides)

    from hpcgen.train.loop import train

    train(config)
    return DONE


def _add_campaign(verbs: argparse._SubParsersAction) -> None:
    from hpcgen.campaign.config import DEVICES, PRECISIONS, CampaignConfig

    default = CampaignConfig()
    campaign = verbs.add_parser(
        "campaign",
        help="make crystals with a trained model; again, to do what is missing: alone, under mpiexec or srun",
        description="Crystal i depends on checkpoint, settings, seed and i alone, on any number of processes.",
    )
    add = campaign.add_argument
    add("--n", type=int, metavar="N", help="number of crystals; may grow when the command is given again")
    add(
        "--checkpoint", default=default.checkpoint, metavar="FILE", help="a training's best.pt (default: the package's)"
    )
    add("--out", default=default.out, metavar="RUN", help="run folder, a store in the end (default: %(default)s)")
    add("--seed", type=int, default=default.seed, metavar="S", help="(default: %(default)s)")

    what = campaign.add_argument_group("what to make")
    add = what.add_argument
    add("--formula", type=_word, metavar="F", help="the whole content of the cell, as Li9P3S12")
    add("--formulas", type=_word, metavar="FILE",
        help="formulas, one a line; CSV with id,formula[,num_atoms]; or a STORE")  # fmt: skip
    add("--per-formula", type=int, default=1, metavar="K", help="crystals of each (default: %(default)s)")
    add("--split", type=_word, help="of that store (default: all)")
    add("--limit", type=int, default=0, metavar="L", help="only the first L formulas")
    add("--condition", action="append", default=[], metavar="NAME=X", help="a property, as band_gap=1.5; repeatable")
    add("--elements", type=_word, metavar="A-B-C", help="chemical system, as Li-P-S: no others are taken")
    add("--num-atoms", type=_word, metavar="N|MIN-MAX", help="atoms of a cell (default: as in training)")

    how = campaign.add_argument_group("how to make it")
    add = how.add_argument
    add("--steps", type=int, default=default.steps, metavar="N", help="calls of the network (default: %(default)s)")
    for name, meaning in (
        ("churn", "noise added before each step but the last, in steps; 0: deterministic"),
        ("speed", "coordinates move 1 + speed (1 - t) times as far"),
        ("guidance", "1: as trained; more: closer to conditions and elements asked for"),
    ):
        told = f"{meaning} (default: %(default)s)"
        add(f"--{name}", type=float, default=getattr(default, name), metavar="X", help=told)
    add("--precision", choices=PRECISIONS, default=default.precision, help="(default: %(default)s)")
    add("--device", choices=DEVICES, default=default.device, help="(default: %(default)s)")
    add("--tile", type=int, default=0, metavar="T", help="crystals always sampled together (default: by device)")
    add("--pairs", type=int, default=0, metavar="P", help="of atoms looked at together (default: by device)")
    add("--tune", action="store_true", help="measure for some seconds which tile and pairs are fastest, and keep them")
    add("--block", type=int, default=0, metavar="B", help="crystals of a file, a multiple of T (default: by n)")
    add("--processes", type=int, metavar="P", help="workers of each rank; 0: none but itself (default: all cores)")
    campaign.set_defaults(run=_campaign, resumable=True, job=_campaign_job)


def _word(text: str) -> str:
    """As a variable of a shell that is not set: not the same as a flag left out."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def _campaign_job(arguments: argparse.Namespace) -> tuple[Path, list[str | Path]]:
    config = _campaign_config(arguments)
    return Path(config.out), [config.checkpoint, config.formulas]


def _campaign_config(arguments: argparse.Namespace) -> "CampaignConfig":
    import dataclasses

    from hpcgen.campaign.config import CampaignConfig, read_conditions

    names = [field.name for field in dataclasses.fields(CampaignConfig)]
    told = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    return CampaignConfig(**told, conditions=read_conditions(arguments.condition)).checked()


def _campaign(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.campaign.config import PRELOAD

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = _campaign_config(arguments)
    if config.processes != 0 and config.device != "cuda":
        from hpcgen.runner.guard import prepare

        prepare(PRELOAD)  # the workers' imports and ours at the same time
    from hpcgen.campaign.generate import campaign

    summary = campaign(config)
    if summary is not None:
        print(summary.render())
    return DONE


def _add_evaluate(verbs: argparse._SubParsersAction) -> None:
    evaluate = verbs.add_parser("evaluate", help="metrics of a run: validity, or match rate against known crystals")
    evaluate.add_argument("evaluated", type=Path, metavar="RUN", help="a campaign's folder, or any store; of another "
                          "generator a folder or zip of CIFs, an extxyz, or a CSV with CIFs, which is read once into "
                          "RUN.store, beside FILE where one is named")  # fmt: skip
    evaluate.add_argument(
        "--reference", type=Path, metavar="STORE", help="known crystals: targets, what is not novel, and the control"
    )
    evaluate.add_argument("--split", help="of the reference: train, val, test (default: all)")
    evaluate.add_argument("--task", default="generate", help="generate (default), predict or optimize")
    evaluate.add_argument("--pair", choices=("target", "composition"),
                          help="predict: the crystal named in the column target (default where there is one), or every "
                          "one of the same composition and number of atoms")  # fmt: skip
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="default: RUN/evaluate/TASK.json; the table of all "
                          "crystals goes beside it as CSV")  # fmt: skip
    evaluate.add_argument("--processes", type=int, metavar="P", help="worker processes (default: all usable cores)")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N crystals only")
    evaluate.add_argument("--seed", type=int, default=0, help="of the control, the samples and the intervals")
    evaluate.add_argument("--pair-timeout", type=float, default=60.0, metavar="S",
                          help="seconds one match or one fingerprint may take")  # fmt: skip
    evaluate.add_argument("--no-coverage", dest="coverage", action="store_false",
                          help="generate: no fingerprints, so no coverage, no diversity")  # fmt: skip
    evaluate.add_argument("--cut-offs", default="mp20", help="of the coverage: mp20 (default), perov5 or carbon24")
    evaluate.add_argument("--energy", action="store_true", help="and energies by CHGNet (pip install 'hpcgen[mlip]')")
    evaluate.add_argument("--samples", type=int, default=1000, metavar="N",
                          help="valid crystals whose spread is compared (default: 1000)")  # fmt: skip
    evaluate.add_argument("--property", metavar="NAME", help="a column: optimize: what was optimised, the lowest being "
                          "best, --property=-NAME the highest; generate: with --rank-by")  # fmt: skip
    evaluate.add_argument("--start", metavar="COLUMN", help="optimize: what groups the candidates of one start "
                          "(default: start, where there is one; else each crystal is its own)")  # fmt: skip
    evaluate.add_argument("--rank-by", metavar="COLUMN", help="generate: for Recall@K: how many of the best crystals "
                          "by --property are among the first K by this column, lowest first")  # fmt: skip
    evaluate.add_argument("--recall-at", type=int, default=100, metavar="K", help="(default: %(default)s)")
    evaluate.add_argument("--recall-of", type=float, default=0.01, metavar="X",
                          help="share of the crystals that are the best (default: %(default)s)")  # fmt: skip
    evaluate.add_argument("--no-novelty", dest="novelty", action="store_false", help="generate: leave out which "
                          "crystals are unique, novel and stable")  # fmt: skip
    evaluate.set_defaults(run=_evaluate, resumable=True, job=_evaluate_job)


def _evaluate_job(arguments: argparse.Namespace) -> tuple[Path, list[str | Path]]:
    from hpcgen.store.foreign import kind_of, place_of

    given = arguments.evaluated
    run = given if kind_of(given) is None else place_of(given, arguments.json)
    return run, [given, arguments.reference or ""]


def _evaluate(arguments: argparse.Namespace) -> int:
    import logging
    from dataclasses import fields, replace

    from hpcgen.campaign.adopt import adopted
    from hpcgen.campaign.evaluate import evaluate
    from hpcgen.campaign.request import Request
    from hpcgen.metrics.render import render
    from hpcgen.runner.team import find_team

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if arguments.processes is not None and arguments.processes < 0:
        raise UsageError(f"--processes {arguments.processes}: want 0 (work in this very process) or more")
    given = {**vars(arguments), "run": arguments.evaluated, "pair_timeout_s": arguments.pair_timeout}
    request = Request(**{field.name: given[field.name] for field in fields(Request)})
    with find_team() as team:
        run = adopted(request.run, arguments.json, team, arguments.processes)
        found = evaluate(replace(request, run=run), arguments.json, team, arguments.processes)
    if found is not None:
        print(render(found))
    return DONE


def _add_export(verbs: argparse._SubParsersAction) -> None:
    export = verbs.add_parser("export", help="crystals of a run as CIF, extxyz, POSCAR, JSON, CSV, as arrays, "
                              "or another store")  # fmt: skip
    export.add_argument("exported", type=Path, metavar="RUN", help="a campaign's folder, or any store")
    export.add_argument("--format", required=True, help="cif, poscar: a file each; zip: CIFs in one file; extxyz, json "
                        "(pymatgen), csv (with cif_string): one file; cdvae, diffcsp: eval_gen.pt, the arrays that "
                        "their compute_metrics.py reads; store: another store")  # fmt: skip
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder, new or empty")
    export.add_argument("--where", metavar="CONDITION",
                        help="as 'band_gap > 1 and num_atoms <= 20 and \"Li\" in elements'")  # fmt: skip
    export.add_argument("--top", type=int, metavar="N", help="the first N only")
    export.add_argument("--by", metavar="COLUMN", help="order by a column, ascending; --by=-COLUMN: descending")
    export.add_argument("--split", help="train, val, test (default: all)")
    export.add_argument("--symprec", type=float, metavar="Å", help="CIFs: symmetrised within this, in the conventional "
                        "cell (default: P1, coordinates as they are)")  # fmt: skip
    export.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.store.export import Request, export

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    request = Request(
        arguments.exported, arguments.format, arguments.out, arguments.where, arguments.top, arguments.by,
        arguments.split, arguments.symprec,
    )  # fmt: skip
    print(f"{arguments.out}: {export(request):,} crystals as {arguments.format}")
    return DONE


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = verbs.add_parser("report", help="one HTML page of a run, or several side by side: rates, validity, "
                              "distributions, training curves, best candidates")  # fmt: skip
    report.add_argument("reported", type=Path, nargs="+", metavar="RUN", help="a campaign's or a training's folder, or "
                        "any store; at most 6")  # fmt: skip
    report.add_argument("--out", type=Path, required=True, metavar="FILE", help="as page.html; figures as PNG and "
                        "tables as CSV go into page_files beside it")  # fmt: skip
    report.add_argument("--reference", type=Path, metavar="STORE", help="known crystals to hold the runs against")
    report.add_argument("--split", help="of the reference: train, val, test (default: all)")
    report.add_argument("--sample", type=int, default=2000, metavar="N", help="crystals of each store looked at one by "
                        "one, for cells, bonds and space groups (default: %(default)s)")  # fmt: skip
    report.add_argument("--seed", type=int, default=0, help="of that sample (default: %(default)s)")
    report.add_argument("--top", type=int, default=8, metavar="N", help="candidates of each run (default: %(default)s)")
    report.set_defaults(run=_report, job=_report_job)


def _report_job(arguments: argparse.Namespace) -> tuple[Path, list[str | Path]]:
    return arguments.reported[0], [*arguments.reported, arguments.reference or ""]


def _report(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.report.run_page import Request, write_report

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    request = Request(
        arguments.reported, arguments.out, arguments.reference, arguments.split, arguments.sample, arguments.seed,
        arguments.top,
    )  # fmt: skip
    print(f"{arguments.out}: open it with a browser; figures and tables are in {write_report(request)}")
    return DONE


def _add_submit(verbs: argparse._SubParsersAction) -> None:
    from hpcgen.launch.site import VERBS

    submit = verbs.add_parser(
        "submit", help="a verb as a Slurm job that is queued again until it is done", allow_abbrev=False,
        usage="hpcgen submit VERB ... [--site FILE] [--set key=value] [--after JOB] [--dry-run | --test-only]",
        description="What follows VERB is what the verb itself takes; after `preprocess`, a script and what it takes.",
    )  # fmt: skip
    submit.add_argument("verb", choices=VERBS, metavar="VERB", help=", ".join(VERBS))
    submit.add_argument("--site", type=Path, metavar="FILE", help="site profile, as slurm/site.yaml")
    submit.add_argument("--set", action="append", default=[], metavar="key=value", help="goes before the profile, as "
                        "train.nodes=2; repeatable")  # fmt: skip
    submit.add_argument("--after", default="", metavar="JOB", help="begin when this job has ended well; 17:18: both")
    how = submit.add_mutually_exclusive_group()
    how.add_argument("--dry-run", action="store_true", help="print the batch script; needs no Slurm")
    how.add_argument("--test-only", action="store_true", help="ask Slurm when it would begin; queues nothing")
    submit.set_defaults(run=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.launch.sbatch import Job, new_name, render
    from hpcgen.launch.site import read_site

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if not re.fullmatch(r"(\d+(:\d+)*)?", arguments.after):
        raise UsageError(f"--after {arguments.after}: want the number of a job, or several as 17:18")
    site = read_site(arguments.site, arguments.set)
    run, needs, words = _submitted(arguments.verb, arguments.command)
    command = [site.python or sys.executable, "-u", *words]
    job = Job(arguments.verb, new_name(arguments.verb), run.absolute(), command, site, arguments.after, needs)
    if arguments.dry_run:
        print(render(job), end="")
        return DONE
    for path in needs:
        if not arguments.after and not path.exists():
            raise InputError(f"{path}: does not exist, want it now, or --after the job that makes it")
    from hpcgen.launch.submit import submit, test_only

    print(test_only(job) if arguments.test_only else submit(job))
    return DONE


def _submitted(verb: str, words: list[str]) -> tuple[Path, list[Path], list[str]]:
    """Run folder, files it needs, and command line of a verb, as the verb itself would read it. Raises UsageError."""
    if verb != "preprocess":
        told = parser().parse_args([verb, *words])
        run, needs = told.job(told)
        return run, [Path(path) for path in needs if path], ["-m", "hpcgen.cli", verb, *words]
    script = Path(words[0]) if words else Path()
    if script.suffix != ".py" or not script.is_file():
        raise UsageError(f"submit preprocess {script}: want a script, as preprocess/mp20.py, and what it takes")
    out = _Parser(prog=str(script), add_help=False, allow_abbrev=False)
    out.add_argument("--out", type=Path, required=True)
    return out.parse_known_args(words[1:])[0].out, [script], [str(script.absolute()), *words[1:]]


def _add_status(verbs: argparse._SubParsersAction) -> None:
    status = verbs.add_parser("status", help="how a run stands: progress, rate, restarts and why, the last error")
    status.add_argument(
        "followed", type=Path, metavar="RUN", help="folder of a training, a campaign, a store being built"
    )
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from hpcgen.launch.status import describe, render

    told = describe(arguments.followed)
    print(json.dumps(dataclasses.asdict(told), indent=1) if arguments.json else render(told))
    return DONE


def _add_doctor(verbs: argparse._SubParsersAction) -> None:
    doctor = verbs.add_parser("doctor", help="what of this machine and cluster fits, and what to do about the rest; "
                              "exit code 3 if something does not", allow_abbrev=False)  # fmt: skip
    doctor.add_argument("--nodes", type=int, default=0, metavar="N", help="also sum over N nodes and greet by MPI, "
                        "through srun; what follows -- goes to srun")  # fmt: skip
    doctor.add_argument(
        "--folder", type=Path, default=Path(), metavar="DIR", help="where runs are to be (default: here)"
    )
    doctor.add_argument("--json", action="store_true", help="as one JSON array")
    doctor.add_argument("srun", nargs="*", metavar="-- FLAG", help="of srun, as --partition=gpu")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    import dataclasses
    import json

    from hpcgen.launch.doctor import examine, exit_code, render

    if arguments.nodes < 0:
        raise UsageError(f"--nodes {arguments.nodes}: want 1 or more")
    if arguments.srun and not arguments.nodes:
        raise UsageError(f"{arguments.srun[0]}: means nothing without --nodes")
    found = examine(arguments.folder, arguments.nodes, arguments.srun)
    print(json.dumps([dataclasses.asdict(finding) for finding in found], indent=1) if arguments.json else render(found))
    return exit_code(found)


if __name__ == "__main__":
    sys.exit(main())
