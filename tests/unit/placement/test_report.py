"""A report's page says what its JSON says, and carries it."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from pdserve.domain.errors import LocalFault
from placement.report import read_report, render_report
from placement.report_parts.curves import (
    AttainmentCurve,
    ClassCurve,
    CostPoint,
    Curves,
    Timeline,
    TradeOff,
)
from placement.report_parts.page import ReportTable
from placement.simulation.values import TrafficClass

CURVES = Curves(
    slo=(TrafficClass(ttft_s=0.2, tpot_s=0.1),),
    attainment=AttainmentCurve(
        planned_rate=4.0,
        rates=(2.0, 4.0, 8.0),
        classes=(
            ClassCurve(
                name="chat",
                target=0.9,
                attainment=(1.0, 0.93, 0.41),
                low=(0.99, 0.91, 0.3),
                high=(1.0, 0.95, 0.5),
            ),
            ClassCurve(
                name="</script><b>",
                target=0.8,
                attainment=(0.9, 0.8, 0.1),
                low=(0.8, 0.7, 0.0),
                high=(1.0, 0.9, 0.2),
            ),
        ),
    ),
    cost=(
        CostPoint(rate=2.0, usd_per_hour=4.0, usd_per_million_tokens=1.5, label="1 : 1"),
        CostPoint(rate=9.0, usd_per_hour=None, label="none"),
    ),
    trade_offs=(
        TradeOff(
            label="2 : 3",
            ttft_p90_s=0.12,
            tpot_p90_s=0.03,
            usd_per_hour=14.0,
            num_gpus=7,
            is_chosen=True,
            is_on_front=True,
        ),
        TradeOff(
            label="1 : 1",
            ttft_p90_s=None,
            tpot_p90_s=None,
            usd_per_hour=4.0,
            num_gpus=2,
            is_overloaded=True,
        ),
    ),
    timeline=Timeline(
        bucket_s=60.0,
        start_s=(0.0, 60.0),
        rate=(4.0, 0.0),
        ttft_p90_s=(0.1, None),
        tpot_p90_s=(0.02, None),
        attainment=(0.95, None),
    ),
)


def page_of(curves: Curves = CURVES, **options: Any) -> str:
    return render_report({"plan": "p", "report": curves.to_json()}, title="A plan", **options)


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(
        r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL
    )
    assert found is not None
    figures = json.loads(found[1])
    assert isinstance(figures, dict)
    return figures


def lines_of(figure: dict[str, Any]) -> list[dict[str, Any]]:
    """The traces that stand for numbers, without bands and fronts."""
    return [trace for trace in figure["data"] if trace.get("hoverinfo") != "skip"]


def test_page_carries_the_json_that_is_printed() -> None:
    content = {"plan": "p", "report": CURVES.to_json()}
    printed = json.loads(json.dumps(content, allow_nan=False))
    assert read_report(page_of()) == printed


def test_attainment_figure_is_the_json() -> None:
    page = page_of()
    curve = read_report(page)["report"]["attainment"]
    figure = figures_of(page)["attainment"]
    drawn = lines_of(figure)
    assert [trace["x"] for trace in drawn] == [curve["rates"]] * 2
    assert [trace["y"] for trace in drawn] == [each["attainment"] for each in curve["classes"]]
    bands = [trace for trace in figure["data"] if trace.get("hoverinfo") == "skip"]
    for band, each in zip(bands, curve["classes"], strict=True):
        assert band["y"] == each["high"] + each["low"][::-1]
    shapes = figure["layout"]["shapes"]
    assert curve["planned_rate"] in [shape["x0"] for shape in shapes]
    assert {0.9, 0.8} <= {shape["y0"] for shape in shapes}


def test_cost_figure_is_the_json_and_leaves_gaps() -> None:
    page = page_of()
    points = read_report(page)["report"]["cost"]
    [line] = lines_of(figures_of(page)["cost"])
    assert line["x"] == [point["rate"] for point in points]
    assert line["y"] == [4.0, None]


def test_trade_off_figure_is_the_json_without_overloaded_designs() -> None:
    page = page_of()
    points = read_report(page)["report"]["trade_offs"]
    [dots] = lines_of(figures_of(page)["trade_offs"])
    assert dots["x"] == [1e3 * points[0]["ttft_p90_s"]]
    assert dots["y"] == [1e3 * points[0]["tpot_p90_s"]]
    assert "overloaded" in page


def test_timeline_figure_is_the_json() -> None:
    page = page_of()
    line = read_report(page)["report"]["timeline"]
    rate, ttft, tpot, attainment = lines_of(figures_of(page)["timeline"])
    assert rate["x"] == [start_s / 60 for start_s in line["start_s"]]
    assert rate["y"] == line["rate"]
    assert ttft["y"] == [1e3 * line["ttft_p90_s"][0], None]
    assert tpot["y"] == [1e3 * line["tpot_p90_s"][0], None]
    assert attainment["y"] == line["attainment"]


def test_every_figure_has_its_numbers_as_a_table() -> None:
    page = page_of()
    for text in ("93.0%", "91.0% to 95.0%", "120.0 ms", "14.00", "1.50"):
        assert f">{text}<" in page


def test_figures_without_numbers_are_left_out() -> None:
    page = page_of(replace(CURVES, cost=(), timeline=None))
    assert list(figures_of(page)) == ["attainment", "trade_offs"]


def test_page_without_curves_has_no_scripts_to_run() -> None:
    page = render_report({"plan": "p"}, title="A plan")
    assert read_report(page) == {"plan": "p"}
    assert "Plotly" not in page


def test_tables_and_lines_are_shown_and_escaped() -> None:
    table = ReportTable(title="Pools & co", header=("pool", "n"), rows=(("<prefill>", "2"),))
    page = page_of(lines=("a < b",), tables=(table,))
    for text in ("Pools &amp; co", "&lt;prefill&gt;", "a &lt; b", '<td class="text">'):
        assert text in page


def test_names_cannot_end_the_embedded_script() -> None:
    page = page_of()
    classes = read_report(page)["report"]["attainment"]["classes"]
    assert classes[1]["name"] == "</script><b>"
    assert "<b>" not in page.split("<script>")[0]


def test_page_needs_nothing_from_elsewhere() -> None:
    head = page_of().split('<script type="application/json"')[0]
    assert "src=" not in head
    assert "@import" not in head
    assert 'href="data:,"' in head


def test_numbers_that_json_lacks_become_null() -> None:
    curves = replace(CURVES, cost=(CostPoint(rate=1.0, usd_per_hour=float("inf")),))
    assert read_report(page_of(curves))["report"]["cost"][0]["usd_per_hour"] is None


def test_another_page_is_told() -> None:
    with pytest.raises(LocalFault, match="not a report"):
        read_report("<html></html>")
