"""The page of a workload: its figures are those of the trace."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from pdserve.domain.errors import LocalFault
from placement.commands_simulate import workload as commands
from placement.report import read_report
from placement.workload_files import read_workload
from placement.workload_report import (
    _arrival_figure,
    _length_figure,
    write_workload_report,
)
from placement.workload_stats import describe


def test_every_request_is_in_each_figure() -> None:
    trace = read_workload(Path("azure-code"))
    for figure in (
        _length_figure("prompt", trace.prompt_tokens),
        _arrival_figure(trace, is_recorded=True),
    ):
        assert sum(int(row[1]) for row in figure.rows) == len(trace)
        assert len(figure.plot["data"][0]["x"]) == len(figure.rows)


def test_rates_over_time_add_up_to_the_requests() -> None:
    trace = read_workload(Path("azure-conv"))
    figure = _arrival_figure(trace, is_recorded=True)
    starts, rates = figure.plot["data"][0]["x"], figure.plot["data"][0]["y"]
    assert sum(rates) * (starts[1] - starts[0]) == pytest.approx(len(trace), rel=1e-4)


def test_describe_writes_a_page_that_carries_its_statistics(tmp_path: Path) -> None:
    app = typer.Typer()
    app.add_typer(commands, name="workload")
    path = tmp_path / "page.html"
    shown = CliRunner().invoke(app, ["workload", "describe", "azure-code", "--report", str(path)])
    assert shown.exit_code == 0, shown.output
    page = path.read_text()
    assert read_report(page)["num_requests"] == 1000
    assert 'id="plot-prompt_tokens"' in page


def test_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    trace = read_workload(Path("azure-code"))
    with pytest.raises(LocalFault, match="No such file"):
        write_workload_report(tmp_path / "no" / "page.html", trace, describe(trace))
