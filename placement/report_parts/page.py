"""The page around the figures: one file that needs nothing else, in light and in dark."""

import json
import re
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

from placement.report_parts.figures import PageFigure, plotly_script

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --faint: #5a6675; --back: #ffffff;
  --panel: #f5f7fa; --line: #d5dbe3; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8ee; --faint: #9aa6b4; --back: #14181e;
  --panel: #1c222a; --line: #353e4a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .25rem; }
p { margin: 0 0 .75rem; color: var(--faint); }
section { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.25rem; margin: 1rem 0; overflow-x: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: 1rem; }
.charts section { margin: 0; min-width: 0; }
.charts section.wide { grid-column: 1 / -1; }
.plot { min-height: 22rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td.long { white-space: normal; min-width: 18rem; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
summary { cursor: pointer; color: var(--faint); }
@media print { section { break-inside: avoid; } }
"""
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function colours() {
  const style = getComputedStyle(document.documentElement);
  return {text: style.getPropertyValue("--text").trim(),
          line: style.getPropertyValue("--line").trim()};
}
function themed(layout) {
  const {text, line} = colours();
  const found = {...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: text, family: "system-ui, sans-serif", size: 12},
    margin: {l: 64, r: 16, t: 12, b: 48},
    legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0}};
  for (const key of Object.keys(layout).filter(name => /^[xy]axis/.test(name)))
    found[key] = {...layout[key], gridcolor: line, zerolinecolor: line, linecolor: line,
                  automargin: true};
  return found;
}
function draw() {
  for (const [name, figure] of Object.entries(figures))
    Plotly.react("plot-" + name, figure.data, themed(figure.layout),
                 {responsive: true, displayModeBar: false});
}
dark.addEventListener("change", draw);
draw();
"""
WIDE = ("trade_offs", "timeline")
LONG_CELL = 44
NUMBER = re.compile(r"(-|[-+]?[\d.,]+( ?(%|ms))?( to [\d.]+%)?)?")
"""Cells that stand on the right; a column is text as soon as one of its cells is."""


class ReportTable(NamedTuple):
    """A table of the page; every row has as many cells as the header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def make_page(
    *,
    title: str,
    lines: Sequence[str],
    tables: Sequence[ReportTable],
    figures: Sequence[PageFigure],
    content: object,
) -> str:
    """HTML; `content` is kept in the page as JSON, id `data`."""
    plots = {figure.name: figure.plot for figure in figures}
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in lines),
        *(
            f"<section><h2>{escape(name)}</h2>{_table(header, rows)}</section>"
            for name, header, rows in tables
        ),
        '<div class="charts">',
        *(_figure(figure) for figure in figures),
        "</div>",
        _embedded("data", content),
        _embedded("figures", plots),
        f"<script>{plotly_script()}</script>" if figures else "",
        f"<script>{SCRIPT}</script>" if figures else "",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _figure(figure: PageFigure) -> str:
    wide = ' class="wide"' if figure.name in WIDE else ""
    return (
        f'<section{wide} id="{figure.name}"><h2>{escape(figure.title)}</h2>'
        f'<p>{escape(figure.about)}</p><div class="plot" id="plot-{figure.name}"></div>'
        f"<details><summary>numbers</summary>{_table(figure.header, figure.rows)}</details>"
        "</section>"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    texts = [
        any(not _is_number(row[column]) for row in rows if column < len(row))
        for column in range(len(header))
    ]

    def cell(kind: str, text: str, is_text: bool) -> str:
        classes = ["text"] * is_text + ["long"] * (len(text) > LONG_CELL)
        attribute = f' class="{" ".join(classes)}"' if classes else ""
        return f"<{kind}{attribute}>{escape(text)}</{kind}>"

    head = "".join(cell("th", text, flag) for text, flag in zip(header, texts, strict=True))
    body = "".join(
        "<tr>"
        + "".join(cell("td", text, flag) for text, flag in zip(row, texts, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _is_number(text: str) -> bool:
    return NUMBER.fullmatch(text) is not None


def _embedded(name: str, value: Any) -> str:
    # In a script element only "</" and "<!--" could end or change what follows.
    text = json.dumps(value, allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'
