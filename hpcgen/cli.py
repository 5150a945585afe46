"""The command line: parses, imports inside each verb, calls, and turns errors into exit codes."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from hpcgen import __version__
from hpcgen.errors import DONE, HpcgenError, InputError, StoppedEarly, UsageError

_INTERNAL = HpcgenError.exit_code
_INTERRUPTED = 130
_PIPE_CLOSED = 141  # as any filter that ends by SIGPIPE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code (see DESIGN.md). Never raises."""
    return guarded(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    return guarded(lambda: arguments.run(arguments), resumable=arguments.resumable)


def guarded(call: Callable[[], int], *, resumable: bool = False) -> int:
    """The exit code of `call`, or of what it raised, said in one sentence on stderr. Never raises."""
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
    train.set_defaults(run=_train, resumable=True)


def _train(arguments: argparse.Namespace) -> int:
    import logging

    from hpcgen.train.config import TrainConfig, load

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load(TrainConfig, arguments.config, arguments.overrides)

    from hpcgen.train.loop import train

    train(config)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
