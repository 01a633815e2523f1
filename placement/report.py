"""`--report report.html`: a plan as one self-contained page.

The page is a function of what `--json` prints: `content`, whose `report` holds the curves. It
carries that JSON unchanged (the element with id `data`), so that a page can be read by programs.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.domain.errors import LocalFault
from placement.report_parts.figures import make_figures
from placement.report_parts.page import ReportTable, make_page

CURVES = "report"


def render_report(
    content: Mapping[str, Any],
    *,
    title: str,
    lines: Sequence[str] = (),
    tables: Sequence[ReportTable] = (),
) -> str:
    """The page of a plan. `content`: what `--json` prints, with `Curves.to_json()` as `report`.

    Raises `LocalFault` where plotly is not installed.
    """
    return make_page(
        title=title,
        lines=lines,
        tables=tables,
        figures=make_figures(content.get(CURVES) or {}),
        content=content,
    )


def read_report(page: str) -> dict[str, Any]:
    """The JSON that a page carries; raises `LocalFault` for another page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    if found is None:
        raise LocalFault("not a report of pdserve: it carries no data")
    content = json.loads(found[1])
    assert isinstance(content, dict)
    return content
