"""What every preprocessing script shares: the options, the run, the summary page, the exit code."""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcgen.cli import guarded
from hpcgen.errors import SiteError, UsageError
from hpcgen.runner.guard import prepare
from hpcgen.runner.team import find_team
from hpcgen.store.settings import BuildSettings
from hpcgen.store.source import Source

_LOG = logging.getLogger("hpcgen.preprocess")
DISORDER_HELP = "partially occupied sites: drop (refuse the entry), majority, or order:K (up to K orderings)"


def run(parser: argparse.ArgumentParser, make_source: Callable[[argparse.Namespace], Source]) -> int:
    """Parse the command line, build the store, write its summary page. Returns the exit code of DESIGN.md."""
    _add_options(parser)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return guarded(lambda: _build(parser.parse_args(), make_source), resumable=True)


def _build(args: argparse.Namespace, make_source: Callable[[argparse.Namespace], Source]) -> int:
    settings = BuildSettings(**{f.name: getattr(args, f.name) for f in dataclasses.fields(BuildSettings)}).checked()
    _refuse_wild(args)
    if args.processes != 0:
        prepare(settings.preload())  # the workers' imports and ours at the same time
    from hpcgen.store.build import build

    with find_team() as team:  # from here on a rank that fails ends the others too
        built = build(
            make_source(args),
            settings,
            args.out,
            team,
            processes=args.processes,
            item_timeout_s=args.item_timeout,
            max_refused=args.max_refused,
        )
    if built.leader and not args.no_page:
        _page(args.out)
    return built.exit_code


def _refuse_wild(args: argparse.Namespace) -> None:
    if args.processes is not None and args.processes < 0:
        raise UsageError(f"--processes {args.processes}: want 0 (work in this very process) or more")
    if not 0 < args.item_timeout < float("inf"):
        raise UsageError(f"--item-timeout {args.item_timeout}: want seconds above 0")
    if not 0 <= args.max_refused <= 1:
        raise UsageError(f"--max-refused {args.max_refused}: want a share between 0 and 1")


def _page(store: Path) -> None:
    """Write the summary page, once. Without matplotlib the store is complete all the same."""
    page = store / "summary.html"
    if page.exists() and page.stat().st_mtime >= (store / "manifest.json").stat().st_mtime:
        return
    try:
        from hpcgen.report.page import write_summary

        write_summary(store, store / "summary.png", page)
        _LOG.info("%s: a page to look at", page)
    except SiteError as absent:
        _LOG.warning("no summary page: %s", absent)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="folder of the store")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: all usable cores)")
    parser.add_argument("--item-timeout", type=float, default=60.0, metavar="S", help="seconds one structure may take")
    parser.add_argument("--max-refused", type=float, default=0.5, metavar="SHARE",
                        help="end with 5 if a larger share of the rows is refused")  # fmt: skip
    parser.add_argument("--no-page", action="store_true", help="do not write summary.html and summary.png")
    shared = parser.add_argument_group("settings of the store")
    for setting in dataclasses.fields(BuildSettings):
        flag = "--" + setting.name.replace("_", "-")
        told: dict[str, Any] = {
            "default": setting.default,
            "help": f"{setting.metadata['help']} (default: {setting.default})",
        }
        if isinstance(setting.default, bool):
            shared.add_argument(flag, action=argparse.BooleanOptionalAction, **told)
        else:
            choices = setting.metadata["choices"] or None
            shared.add_argument(flag, type=type(setting.default), choices=choices, **told)
