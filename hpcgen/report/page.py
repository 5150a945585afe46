"""The summary of a store as one picture and as one HTML page that needs neither network nor JavaScript."""

import base64
import csv
import dataclasses
import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hpcgen.errors import InputError
from hpcgen.files import make_folder, whole, write_whole
from hpcgen.report.pictures import Picture, pictures, summary_png
from hpcgen.report.style import four_digits, percent
from hpcgen.report.summary import ColumnCount, Summary
from hpcgen.store.inspect import in_words
from hpcgen.store.layout import REJECTS, Manifest, ShardInfo, flat, read_manifest
from hpcgen.store.read import Store
from hpcgen.store.settings import BuildSettings

_COLUMNS_SHOWN = 24  # a store with more of them folds the rest away
Cell = tuple[str, ...]


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
        _section("Key numbers", _facts(_key_numbers(summary))),
        _section("Elements and space groups", "\n".join(map(_figure, _of(shown, wide=True)))),
        _section("Sizes and properties", _grid(map(_figure, _of(shown, wide=False)))),
        _section("Splits", _table(("split", "crystals", "share", "atoms", "files"), _split_rows(manifest))),
        _section("Columns", _columns(summary)),
        _section("Rejected rows", _rejects(summary, examples or {})),
        _section("Made with", _made_with(manifest)),
    ]
    return _PAGE.format(title=text(name), style=_CSS, body="\n".join(body))


def text(value: object) -> str:
    """Any value as HTML text: escaped, control characters shown as a box."""
    words = "".join(letter if letter.isprintable() or letter == " " else "\ufffd" for letter in str(value))
    return html.escape(words, quote=True)


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
    more = f"<details><summary>{len(rest)} more columns</summary>{_table(heads, rest)}</details>" if rest else ""
    return _table(heads, first) + more


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
    return _table(("reason", "rows", "share of rejected", "the first one"), rows, "wordy")


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
        return _facts(facts)
    return _facts(facts) + _table(("setting", "value", "meaning"), rows, "settings")


# ------------------------------------------------------------------------------------------ HTML parts


def _section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n{body}\n</section>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in facts) + "</dl>"


def _table(heads: Cell, rows: Iterable[Cell], kind: str = "") -> str:
    """First column to the left, numbers to the right."""
    top = "".join(f"<th scope=col>{text(head)}</th>" for head in heads)
    lines = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table>"
    return f"<div class='scroll {kind}'>{table}</div>"


def _of(shown: Sequence[Picture], *, wide: bool) -> list[Picture]:
    return [picture for picture in shown if picture.wide is wide]


def _grid(figures: Iterable[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.svg).decode()
    image = f'<img alt="{text(picture.alt)}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure class={'wide' if picture.wide else 'small'}>{image}</figure>\n"


_CSS = """
:root { --ink: #1f2b36; --quiet: #5d6873; --rule: #d5dbe0; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 3rem; max-width: 1120px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .6rem; padding-bottom: .25rem; font-size: 1.05rem;
  border-bottom: 1px solid var(--rule); }
header p { margin: .4rem 0 0; color: var(--quiet); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 0 2rem; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .22rem 0;
  border-bottom: 1px solid #eef1f3; }
dt { color: var(--quiet); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.wide + .wide { margin-top: 1.2rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.2rem 1.6rem; }
.scroll, .wide { overflow-x: auto; }
table { border-collapse: collapse; min-width: min(100%, 34rem); font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--quiet); border-bottom: 1px solid var(--rule); }
th, td { padding: .28rem 1.3rem .28rem 0; text-align: right; white-space: nowrap; }
td { border-bottom: 1px solid #eef1f3; }
th:first-child, td:first-child { text-align: left; }
dl + .scroll { margin-top: 1rem; }
.wordy td:last-child, .wordy th:last-child {
  min-width: 16rem; text-align: left; white-space: normal; overflow-wrap: anywhere; }
.settings td, .settings th { text-align: left; vertical-align: top; white-space: normal; overflow-wrap: anywhere; }
.settings td:first-child, .settings th { overflow-wrap: normal; }
.settings td:nth-child(2) { min-width: 9rem; } .settings td:nth-child(3) { min-width: 12rem; }
details { margin-top: .8rem; } summary { cursor: pointer; color: var(--quiet); }
@media (max-width: 700px) {
  body { padding: 1.2rem 1rem 2rem; }
  h1 { font-size: 1.5rem; }
  dl, .grid { grid-template-columns: 1fr; }
  .wide img { width: 680px; }
  th, td { padding-right: .7rem; font-size: .9rem; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; filter: grayscale(1); }
  .grid { grid-template-columns: repeat(3, 1fr); gap: .8rem; }
  dl { grid-template-columns: repeat(3, 1fr); }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
