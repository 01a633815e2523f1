"""A report in a real browser: it draws, in light and in dark, and complains about nothing."""

from pathlib import Path

import pytest

from scripts.screenshot_report import SCHEMES, example_page, find_browser, take_picture, visit

BROWSER = find_browser()
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here; Debian: apt-get install chromium"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(example_page(), encoding="utf-8")
    return path


@needs_browser
@pytest.mark.parametrize("scheme", SCHEMES)
def test_page_draws_every_figure_without_a_console_message(page: Path, scheme: str) -> None:
    assert BROWSER is not None
    seen = visit(BROWSER, page, scheme)
    assert seen.console == ()
    parts = seen.dom.split('id="plot-')[1:]
    assert len(parts) == 4
    for part in parts:
        assert 'class="main-svg"' in part


@needs_browser
def test_a_broken_page_is_noticed(tmp_path: Path) -> None:
    assert BROWSER is not None
    broken = tmp_path / "broken.html"
    broken.write_text("<script>missing()</script>", encoding="utf-8")
    [message] = visit(BROWSER, broken).console
    assert "missing is not defined" in message


@needs_browser
def test_light_and_dark_differ(page: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    pictures = []
    for scheme in SCHEMES:
        picture = tmp_path / f"{scheme}.png"
        take_picture(BROWSER, page, picture, scheme)
        pictures.append(picture.read_bytes())
    assert pictures[0] != pictures[1]
