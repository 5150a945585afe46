"""The summary of a store as one picture and as one HTML page that needs neither network nor JavaScript."""

import csv
import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcgen.errors import InputError
from hpcgen.files import make_folder, whole, write_whole
from hpcgen.report.parts import Cell, fact_list, figure, grid, section, table, text, whole_page
from hpcgen.report.pictures import Picture, pictures, summary_png
from hpcgen.report.style import four_digits, percent
from hpcgen.report.summary import ColumnCount, Summary
from hpcgen.store.inspect import in_words
from hpcgen.store.layout import REJECTS, Manifest, ShardInfo, flat, read_manifest
from hpcgen.store.read import Store
from hpcgen.store.settings import BuildSettings

_COLUMNS_SHOWN = 24  # a store with more of them folds the rest away


def write_summary(store_path: Path, out_png: Path | None, out_html: Path | None) -> None:
    """Count a store at flat memory, and its reject table; write the picture and the page, each whole.

    Raises InputError for a store that is missing or broken, SiteError without matplotlib, StorageError.
    """
    store_path = Path(store_path)
    manifest = read_manifest(store_path)
    filled = any(shard.crystals for shard in manifest.shards)
    rejects, examples = read_rejects(store_path / REJECTS)
    summary = Summary.of(Store(store_path, dtype=None).iter_rows() if filled else (), rejects.items())
    name = store_path.resolve().name
    for out in filter(None, (out_png, out_html)):
        make_folder(Path(out).parent)
    if out_png is not None:
        picture = summary_png(summary, name, subtitle(summary, manifest))
        with whole(Path(out_png)) as draft:
            draft.write_bytes(picture)
    if out_html is not None:
        write_whole(Path(out_html), page(name, summary, manifest, pictures(summary), examples))


def read_rejects(file: Path) -> tuple[Counter[str], dict[str, str]]:
    """Rows turned away, by code, and of each code the first one in words. No table is an empty one.

    Raises InputError for a table without the columns id, code and message.
    """
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    if not file.exists():
        return counts, examples
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        table = csv.DictReader(lines)
        missing = {"id", "code", "message"} - set(table.fieldnames or ())
        if missing:
            raise InputError(f"{file}: no column {', '.join(sorted(missing))}; want row, id, code, message")
        for row in table:
            counts[row["code"]] += 1
            examples.setdefault(row["code"], f"{row['id']}: {row['message']}")
    return counts, examples


def subtitle(summary: Summary, manifest: Manifest) -> str:
    """The store in one line."""
    splits = [f"{split} {count:,}" for split, count in _splits(manifest.shards).items()]
    facts = [f"{summary.crystals:,} crystals", f"{summary.atoms:,} atoms", f"source {manifest.head.source}"]
    return "  ·  ".join([*facts, *(splits if len(splits) > 1 else []), manifest.writer])


def _splits(shards: Sequence[ShardInfo]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for shard in shards:
        counts[shard.split] = counts.get(shard.split, 0) + shard.crystals
    return counts


# ----------------------------------------------------------------------------------------------- page


def page(
    name: str,
    summary: Summary,
    manifest: Manifest,
    shown: Sequence[Picture],
    examples: Mapping[str, str] | None = None,
) -> str:
    """The page as text. All that comes from files is escaped; nothing is loaded from elsewhere.

    examples: of each reject code, a row in words.
    """
    body = [
        f"<header><h1>{text(name)}</h1>\n<p>{_lead(summary, manifest)}</p></header>",
        section("Key numbers", fact_list(_key_numbers(summary))),
        section("Elements and space groups", "\n".join(map(figure, _of(shown, wide=True)))),
        section("Sizes and properties", grid(map(figure, _of(shown, wide=False)))),
        section("Splits", table(("split", "crystals", "share", "atoms", "files"), _split_rows(manifest))),
        section("Columns", _columns(summary)),
        section("Rejected rows", _rejects(summary, examples or {})),
        section("Made with", _made_with(manifest)),
    ]
    return whole_page(name, body)


def _lead(summary: Summary, manifest: Manifest) -> str:
    made = f"from the source <b>{text(manifest.head.source)}</b>, written by {text(manifest.writer)}"
    if not summary.crystals:
        return f"An empty store {made}."
    return f"{summary.crystals:,} crystals with {summary.atoms:,} atoms {made}."


def _key_numbers(summary: Summary) -> list[tuple[str, str]]:
    sizes = summary.of_size.nonzero()[0]
    rejected = summary.rejects.total()
    seen = int((summary.in_space_group[1:] > 0).sum())
    facts = [
        ("crystals", f"{summary.crystals:,}"),
        ("atoms", f"{summary.atoms:,}"),
        ("elements", f"{int((summary.with_element > 0).sum())} of 118"),
        ("atoms in the cell", f"{sizes[0]}–{sizes[-1]}" if len(sizes) else "–"),
        ("atoms in the cell, mean", f"{summary.atoms / summary.crystals:.3g}" if summary.crystals else "–"),
        ("space groups", f"{seen} of 230" if summary.has_space_groups else "not known"),
        ("density, median", _measure(summary.density.median, "g/cm³")),
        ("volume per atom, median", _measure(summary.volume_per_atom.median, "Å³")),
    ]
    if rejected:
        facts.append(("rows rejected", f"{rejected:,}"))
    return facts


def _measure(value: float, unit: str) -> str:
    return f"{four_digits(value)} {unit}" if value == value else "–"


def _split_rows(manifest: Manifest) -> list[Cell]:
    total = sum(shard.crystals for shard in manifest.shards)
    rows: list[Cell] = []
    for split, count in _splits(manifest.shards).items():
        shards = [shard for shard in manifest.shards if shard.split == split]
        atoms = sum(shard.atoms for shard in shards)
        rows.append((split, f"{count:,}", percent(count, total), f"{atoms:,}", f"{len(shards):,}"))
    return rows


def _columns(summary: Summary) -> str:
    heads = ("column", "kind", "unit", "missing", "min", "median", "max")
    rows = [_column_row(name, count, summary.missing(name)) for name, count in summary.columns.items()]
    if not rows:
        return "<p>The store has no columns.</p>"
    first, rest = rows[:_COLUMNS_SHOWN], rows[_COLUMNS_SHOWN:]
    more = f"<details><summary>{len(rest)} more columns</summary>{table(heads, rest)}</details>" if rest else ""
    return table(heads, first) + more


def _column_row(name: str, count: ColumnCount, missing: int) -> Cell:
    spread, kind = count.spread, count.spec.kind
    values: tuple[str, ...] = ("–", "–", "–")
    if len(spread):
        values = tuple(four_digits(value) for value in (spread.low, spread.median, spread.high))
    elif kind == "bool" and count.present:
        values = ("–", f"{percent(count.true, count.present)} true", "–")
    return (name, kind, count.spec.unit or "–", f"{missing:,}" if missing else "0", *values)


def _rejects(summary: Summary, examples: Mapping[str, str]) -> str:
    if not summary.rejects:
        return "<p>None recorded.</p>"
    total = summary.rejects.total()
    ranked = sorted(summary.rejects.items(), key=lambda item: (-item[1], item[0]))
    rows = [(code, f"{count:,}", percent(count, total), examples.get(code, "–")) for code, count in ranked]
    return table(("reason", "rows", "share of rejected", "the first one"), rows, "wordy")


def _made_with(manifest: Manifest) -> str:
    head = manifest.head
    facts = [
        ("source", head.source),
        ("writer", manifest.writer),
        ("settings hash", head.settings_hash),
        ("cached edges", str(head.edges) if head.edges is not None else "none"),
    ]
    meanings = {each.name: each.metadata.get("help", "") for each in dataclasses.fields(BuildSettings)}
    rows = [
        (name, in_words(value), meanings.get(name.removeprefix("settings."), "")) for name, value in flat(head.settings)
    ]
    if not rows:
        return fact_list(facts)
    return fact_list(facts) + table(("setting", "value", "meaning"), rows, "settings")


def _of(shown: Sequence[Picture], *, wide: bool) -> list[Picture]:
    return [picture for picture in shown if picture.wide is wide]
