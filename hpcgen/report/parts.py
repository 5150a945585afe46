"""The parts of an HTML page that needs no network: headings, facts, tables, figures, and the sheet around them."""

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from hpcgen.report.pictures import Picture

Cell = tuple[str, ...]


def whole_page(title: str, body: Sequence[str], script: str = "", sheet: str = "") -> str:
    """The page as text. Its policy lets nothing be loaded, and no script run but this one. sheet: more CSS."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    tail = f"\n<script>{script}</script>" if script else ""
    return _PAGE.format(title=text(title), policy=policy, style=_CSS + sheet, body="\n".join(body) + tail)


def text(value: object) -> str:
    """Any value as HTML text: escaped, control characters shown as a box."""
    words = "".join(letter if letter.isprintable() or letter == " " else "\ufffd" for letter in str(value))
    return html.escape(words, quote=True)


def section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>\n{body}\n</section>"


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    return "<dl>" + "".join(f"<div><dt>{text(n)}</dt><dd>{text(v)}</dd></div>" for n, v in facts) + "</dl>"


def table(heads: Cell, rows: Iterable[Cell], kind: str = "") -> str:
    """First column to the left, numbers to the right."""
    top = "".join(f"<th scope=col>{text(head)}</th>" for head in heads)
    lines = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    inner = f"<table><thead><tr>{top}</tr></thead>\n<tbody>{lines}</tbody></table>"
    return f"<div class='scroll {kind}'>{inner}</div>"


def grid(figures: Iterable[str]) -> str:
    return f"<div class=grid>{''.join(figures)}</div>"


def figure(picture: Picture) -> str:
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
  content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
