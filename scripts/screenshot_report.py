"""Pictures of a planner's report in light and dark, by headless Chromium: `make screenshots`.

    python scripts/screenshot_report.py --output docs/images [report.html]

Without a report it makes one of a small example. Without Chromium (Debian: `apt-get install
chromium`) it says so and leaves the pictures as they are.
"""

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from placement.plan_inputs import parse_inputs
from placement.plan_report import add_curves, plan_page
from placement.search.results import PlanResult
from placement.solver import solve

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 3000
LIMIT_S = 60.0
SCHEMES = {"light": 1, "dark": 0}
"""Blink's `preferredColorScheme`."""
CONSOLE = re.compile(r":(?:ERROR|WARNING|INFO):CONSOLE[:(].*")
"""Chromium logs errors of scripts as INFO, too."""
EXAMPLE = {
    "model": "facebook/opt-13b",
    "latency": {"profile": "profiler-a100-80g.distserve.json"},
    "cluster": {"nodes": [{"gpu": "a100_sxm", "nodes": 1, "gpus_per_node": 4}]},
    "workload": {
        "prompt_tokens": {"mean": 250, "cv": 1.2, "max": 1500},
        "output_tokens": {"mean": 180, "cv": 0.8, "max": 500},
    },
    "slo": {"ttft_s": 0.2, "tpot_s": 0.1, "attainment": 0.9},
    "search": {"duration_s": 300, "seeds": 3, "tp": [1, 2], "max_step_tokens": [512]},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """What a browser made of a page."""

    dom: str
    console: tuple[str, ...]  # every message, whatever its level


def main() -> None:
    """Take the pictures; exits 0 without a browser."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("report", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        print("screenshots skipped: no Chromium here; Debian: apt-get install chromium")
        return
    with tempfile.TemporaryDirectory() as folder:
        report = arguments.report
        if report is None:
            report = Path(folder) / "report.html"
            report.write_text(example_page(), encoding="utf-8")
        arguments.output.mkdir(parents=True, exist_ok=True)
        for scheme in SCHEMES:
            picture = arguments.output / f"report-{scheme}.png"
            take_picture(browser, report, picture, scheme)
            print(f"wrote {picture}")
        if console := visit(browser, report).console:
            sys.exit("the page complained:\n" + "\n".join(console))


def find_browser() -> str | None:
    """Chromium, by whatever name it is installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def visit(browser: str, page: Path, scheme: str = "light") -> Visit:
    """Open a page and let its scripts run."""
    done = _run(browser, scheme, page, "--dump-dom")
    return Visit(dom=done.stdout, console=tuple(CONSOLE.findall(done.stderr)))


def take_picture(browser: str, page: Path, picture: Path, scheme: str) -> None:
    """A PNG of the page's first `WIDTH` x `HEIGHT` pixels."""
    picture.unlink(missing_ok=True)
    done = _run(
        browser,
        scheme,
        page,
        f"--screenshot={picture.resolve()}",
        f"--window-size={WIDTH},{HEIGHT}",
    )
    if not picture.exists():
        sys.exit(f"{browser} took no picture:\n{done.stderr}")


def example_page() -> str:
    """A plan for OPT-13B on four A100s, from DistServe's published profile; seconds to make."""
    inputs = parse_inputs(EXAMPLE, source="example")
    result = solve(inputs)
    assert isinstance(result, PlanResult)
    return plan_page(add_curves(inputs, result, result.to_json()))


def _run(browser: str, scheme: str, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
            "--virtual-time-budget=10000",
            *options,
            page.resolve().as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)


if __name__ == "__main__":
    main()
