"""A report's figures, made from the JSON of its curves and from nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pdserve.domain.errors import LocalFault

COLOURS = ("#3b82c4", "#d1730f", "#2f9e6e", "#b8529c", "#8a7a1f", "#5b62c9")
"""Told apart with any colour vision, and with contrast on white as on near-black."""
COST_SCALE = [[0.0, "#3b82c4"], [0.5, "#c9a227"], [1.0, "#d1456b"]]
MS = 1e3
Curves = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFigure:
    """A chart, what it says in one sentence, and its numbers as a table."""

    name: str
    title: str
    about: str
    plot: dict[str, Any]  # plotly's data and layout
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def make_figures(curves: Curves) -> tuple[PageFigure, ...]:
    """Those for which there are numbers, in order; raises `LocalFault` without plotly."""
    makers: dict[str, Callable[[Curves], PageFigure]] = {
        "attainment": _attainment,
        "cost": _cost,
        "trade_offs": _trade_offs,
        "timeline": _timeline,
    }
    return tuple(make(curves) for name, make in makers.items() if curves.get(name))


def plotly_script() -> str:
    """The library itself, for the page to carry."""
    _graph_objects()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _attainment(curves: Curves) -> PageFigure:
    go, curve = _graph_objects(), curves["attainment"]
    figure, rates = go.Figure(), list(curve["rates"])
    for colour, each in zip(_cycle(), curve["classes"], strict=False):
        figure.add_scatter(
            x=rates + rates[::-1],
            y=list(each["high"]) + list(each["low"])[::-1],
            fill="toself",
            fillcolor=_faint(colour),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            name=f"{each['name']} 95 %",
        )
        figure.add_scatter(
            x=rates,
            y=list(each["attainment"]),
            mode="lines+markers",
            line={"color": colour},
            name=_class_name(each["name"], len(curve["classes"])),
        )
        figure.add_hline(y=each["target"], line={"color": colour, "dash": "dot", "width": 1})
    figure.add_vline(x=curve["planned_rate"], line={"dash": "dash", "width": 1, "color": "#888"})
    figure.update_layout(
        xaxis={"title": {"text": "requests/s"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "met both objectives"}, "tickformat": ".0%", "range": [0, 1.03]},
        showlegend=len(curve["classes"]) > 1,
    )
    rows = [
        (f"{rate:.3g}", each["name"], percent(each["attainment"][at]), _interval(each, at))
        for at, rate in enumerate(rates)
        for each in curve["classes"]
    ]
    return PageFigure(
        name="attainment",
        title="Attainment against rate",
        about="Share of requests that meet TTFT and TPOT, with its 95 % interval. Dotted: the "
        "target; dashed: the planned rate.",
        plot=_plot(figure),
        header=("requests/s", "class", "attainment", "95 % interval"),
        rows=rows,
    )


def _cost(curves: Curves) -> PageFigure:
    go, points = _graph_objects(), curves["cost"]
    figure = go.Figure()
    figure.add_scatter(
        x=[point["rate"] for point in points],
        y=[point["usd_per_hour"] for point in points],
        text=[point["label"] for point in points],
        mode="lines+markers",
        line={"color": COLOURS[0], "shape": "vh"},
        name="cheapest plan",
        hovertemplate="%{x:.3g} requests/s: $%{y:,.2f}/h<br>%{text}<extra></extra>",
    )
    figure.update_layout(
        xaxis={"title": {"text": "requests/s"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "$/h"}, "rangemode": "tozero"},
        showlegend=False,
    )
    rows = [
        (
            f"{point['rate']:.3g}",
            _dollars(point["usd_per_hour"]),
            _dollars(point["usd_per_million_tokens"]),
            point["label"],
        )
        for point in points
    ]
    return PageFigure(
        name="cost",
        title="Cost against rate",
        about="The cheapest mix of these kinds of worker that meets every objective at each rate; "
        "gaps: none does.",
        plot=_plot(figure),
        header=("requests/s", "$/h", "$ per million tokens", "plan"),
        rows=rows,
    )


def _trade_offs(curves: Curves) -> PageFigure:
    go, points = _graph_objects(), curves["trade_offs"]
    shown = [point for point in points if point["ttft_p90_s"] and point["tpot_p90_s"] is not None]
    front = sorted(
        (point for point in shown if point["is_on_front"]), key=lambda point: point["ttft_p90_s"]
    )
    figure = go.Figure()
    figure.add_scatter(
        x=[MS * point["ttft_p90_s"] for point in front],
        y=[MS * point["tpot_p90_s"] for point in front],
        mode="lines",
        line={"color": "#888", "width": 1, "shape": "hv"},
        hoverinfo="skip",
        name="front",
    )
    figure.add_scatter(
        x=[MS * point["ttft_p90_s"] for point in shown],
        y=[MS * point["tpot_p90_s"] for point in shown],
        text=[_design(point) for point in shown],
        mode="markers",
        marker={
            "color": [point["usd_per_hour"] for point in shown],
            "colorscale": COST_SCALE,
            "colorbar": {"title": {"text": "$/h"}},
            "showscale": True,
            "size": [18 if point["is_chosen"] else 10 for point in shown],
            "symbol": ["star" if point["is_chosen"] else "circle" for point in shown],
        },
        name="designs",
        hovertemplate="%{text}<br>TTFT %{x:,.0f} ms, TPOT %{y:,.1f} ms<extra></extra>",
    )
    for slo in curves.get("slo", ()):
        line = {"dash": "dot", "width": 1, "color": "#888"}
        figure.add_vline(x=MS * slo["ttft_s"], line=line)
        figure.add_hline(y=MS * slo["tpot_s"], line=line)
    figure.update_layout(
        xaxis={"title": {"text": "TTFT p90, ms"}, "type": "log"},
        yaxis={"title": {"text": "TPOT p90, ms"}, "type": "log"},
        showlegend=False,
    )
    rows = [
        (
            ("★ " if point["is_chosen"] else "") + point["label"],
            _ms(point["ttft_p90_s"]),
            _ms(point["tpot_p90_s"]),
            str(point["num_gpus"]),
            _dollars(point["usd_per_hour"]),
            _standing(point),
        )
        for point in points
    ]
    return PageFigure(
        name="trade_offs",
        title="TTFT against TPOT",
        about="Designs at the planned rate; the star is the plan. Left and down is faster; on the "
        "grey front no other design is faster in both. Dotted: the objectives. Overloaded designs "
        "are in the table only.",
        plot=_plot(figure),
        header=("design", "TTFT p90", "TPOT p90", "GPUs", "$/h", ""),
        rows=rows,
    )


def _timeline(curves: Curves) -> PageFigure:
    go, line = _graph_objects(), curves["timeline"]
    minutes = [start_s / 60 for start_s in line["start_s"]]
    panels = (
        ("requests/s", line["rate"], 1.0, ""),
        ("TTFT p90, ms", line["ttft_p90_s"], MS, ""),
        ("TPOT p90, ms", line["tpot_p90_s"], MS, ""),
        ("met both", line["attainment"], 1.0, ".0%"),
    )
    figure = go.Figure()
    height = 1 / len(panels)
    layout: dict[str, Any] = {"showlegend": False, "height": 640}
    for number, (name, values, scale, form) in enumerate(panels, start=1):
        axis = "y" if number == 1 else f"y{number}"
        figure.add_scatter(
            x=minutes,
            y=[None if value is None else scale * value for value in values],
            mode="lines",
            line={"color": COLOURS[number - 1]},
            name=name,
            yaxis=axis,
        )
        top = 1 - (number - 1) * height
        layout[f"yaxis{number if number > 1 else ''}"] = {
            "title": {"text": name},
            "domain": [top - height + 0.04, top],
            "rangemode": "tozero",
            "tickformat": form,
        }
    layout["xaxis"] = {"title": {"text": "minute"}, "anchor": f"y{len(panels)}"}
    figure.update_layout(layout)
    rows = [
        (f"{minute:.0f}", f"{rate:.3g}", _ms(ttft_s), _ms(tpot_s), percent(share))
        for minute, rate, ttft_s, tpot_s, share in zip(
            minutes,
            line["rate"],
            line["ttft_p90_s"],
            line["tpot_p90_s"],
            line["attainment"],
            strict=True,
        )
    ]
    return PageFigure(
        name="timeline",
        title="A replayed hour" if len(minutes) == 60 else f"{len(minutes)} replayed minutes",
        about="Requests by the minute in which they arrive.",
        plot=_plot(figure),
        header=("minute", "requests/s", "TTFT p90", "TPOT p90", "met both"),
        rows=rows,
    )


def _graph_objects() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise LocalFault("--report needs plotly: pip install 'pdserve[planner]'") from None
    return go


def _plot(figure: Any) -> dict[str, Any]:
    plain = figure.to_plotly_json()
    plain["layout"].pop("template", None)  # the page has its own colours, light and dark
    return {"data": list(plain["data"]), "layout": plain["layout"]}


def _cycle() -> tuple[str, ...]:
    return COLOURS * 8


def _faint(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def _class_name(name: str, num_classes: int) -> str:
    return name if num_classes > 1 else "attainment"


def _interval(each: Mapping[str, Any], at: int) -> str:
    return f"{percent(each['low'][at])} to {percent(each['high'][at])}"


def _design(point: Mapping[str, Any]) -> str:
    return f"{point['label']}, {point['num_gpus']} GPUs, ${point['usd_per_hour']:,.2f}/h"


def _standing(point: Mapping[str, Any]) -> str:
    if point["is_overloaded"]:
        return "overloaded"
    return "on the front" if point["is_on_front"] else ""


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{MS * seconds:,.1f} ms"


def _dollars(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"
