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

from placement.demand import ArrivalProcess, Lengths, WorkloadSpec
from placement.report import (
    Candidate,
    Curves,
    ReportTable,
    attainment_curve,
    cost_curve,
    render_report,
    replay_hour,
    trade_offs,
)
from placement.simulation.settings import parse_config

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 2080
LIMIT_S = 60.0
SCHEMES = {"light": 1, "dark": 0}
"""Blink's `preferredColorScheme`."""
CONSOLE = re.compile(r":(?:ERROR|WARNING|INFO):CONSOLE[:(].*")
"""Chromium logs errors of scripts as INFO, too."""
RATE = 24.0
DESIGNS = (
    (("prefill", 2, 2), ("decode", 3, 1)),
    (("prefill", 1, 1), ("decode", 1, 1)),
    (("prefill", 1, 2), ("decode", 2, 1)),
    (("prefill", 3, 1), ("decode", 3, 1)),
    (("prefill", 2, 2), ("decode", 2, 2)),
    (("prefill", 4, 1), ("decode", 5, 1)),
    (("prefill", 4, 2), ("decode", 6, 1)),
    (("colocated", 5, 1),),
    (("colocated", 7, 1),),
)
USD_PER_GPU_HOUR = 2.0


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
    """A plan for OPT-13B on A100s, from DistServe's published profile; seconds to make."""
    workload = WorkloadSpec(
        num_requests=round(RATE * 3660),
        arrivals=ArrivalProcess(cv=1.5),
        prompt_tokens=Lengths(mean=250, cv=1.2, max=1500),
        output_tokens=Lengths(mean=180, cv=0.8, max=500),
    ).generate()
    candidates = [_candidate(*pools) for pools in DESIGNS]
    candidates[0] = plan = dataclasses.replace(candidates[0], is_chosen=True)
    sample = workload.head(6000)
    curves = Curves(
        slo=plan.config.slo,
        attainment=attainment_curve(plan.config, sample, RATE),
        cost=cost_curve(candidates, sample, [RATE * share / 5 for share in range(1, 9)]),
        trade_offs=trade_offs(candidates, sample, RATE),
        timeline=replay_hour(plan.config, workload, RATE),
    )
    table = ReportTable(
        title="Pools",
        header=("pool", "GPU", "replicas", "TP", "PP"),
        rows=tuple(
            (str(pool.role), pool.gpu, str(pool.replicas), str(pool.tp), str(pool.pp))
            for pool in plan.config.pools
        ),
    )
    return render_report(
        {"curves": curves.to_json()},
        title="OPT-13B on A100s",
        lines=(f"{plan.label}: {plan.config.num_gpus} GPUs, ${plan.usd_per_hour:,.2f}/h.",),
        tables=(table,),
    )


def _candidate(*pools: tuple[str, int, int]) -> Candidate:
    """Pools are (role, replicas, tensor parallelism)."""
    config = parse_config(
        {
            "latency": {"profile": "profiler-a100-80g.distserve.json", "model": "facebook/opt-13b"},
            "pools": [
                {"role": role, "replicas": replicas, "tp": tp, "link_gb_per_s": 25.0}
                for role, replicas, tp in pools
            ],
            "slo": {"ttft_s": 0.2, "tpot_s": 0.1, "attainment": 0.9},
        },
        source="example",
    )
    label = " : ".join(f"{replicas} {role} TP{tp}" for role, replicas, tp in pools)
    return Candidate(label=label, config=config, usd_per_hour=USD_PER_GPU_HOUR * config.num_gpus)


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
