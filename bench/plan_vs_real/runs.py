"""Load runs beside their predictions, what they come to, and the file that keeps them."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

from bench.plan_vs_real.figures import Figures
from placement.simulation.summary import clean

SHARES = (0.3, 0.6, 0.9)
LIMIT = 0.15
MAX_FOREIGN_CORES = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One load run beside its prediction, which is the mean of two: by the profile made just before
    and by the one made just after."""

    share: float
    rate: float
    num_requests: int
    predicted: Figures
    measured: Figures
    failures: Mapping[str, int]  # by reason
    drift: Mapping[str, float]  # time of a step in the later profile / in the earlier, by phase
    foreign_cores: float | None  # busy with other programs, the most of both profiles and the run
    own_cores: Mapping[str, float]

    @property
    def disturbance(self) -> str | None:
        """Why this run cannot be judged, or None; looks at no figure of the run."""
        if self.foreign_cores is not None and self.foreign_cores > MAX_FOREIGN_CORES:
            return f"other programs kept {self.foreign_cores:.2f} cores busy"
        for phase, ratio in self.drift.items():
            if max(ratio, 1 / ratio) > 1 + LIMIT:
                return f"the machine changed its speed: {phase} steps x{ratio:.2f} since before"
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure at one load, medians over repetitions."""

    share: float
    name: str
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """predicted / measured - 1; infinite where nothing was answered."""
        is_known = math.isfinite(self.measured) and self.measured != 0
        return self.predicted / self.measured - 1 if is_known else math.inf


def judged(runs: list[Run]) -> list[Run]:
    """Those that nothing disturbed; at a load that has none, all of it."""
    found = []
    for share in SHARES:
        chosen = [run for run in runs if run.share == share]
        found += [run for run in chosen if run.disturbance is None] or chosen
    return found


def rows_of(runs: list[Run]) -> list[Row]:
    """Medians of the runs that are judged, by load and figure."""
    rows = []
    for share in SHARES:
        chosen = [run for run in judged(runs) if run.share == share]
        predicted = Figures.median_of([run.predicted for run in chosen])
        found = Figures.median_of([run.measured for run in chosen])
        rows += [
            Row(
                share=share,
                name=field.name,
                predicted=getattr(predicted, field.name),
                measured=getattr(found, field.name),
            )
            for field in fields(Figures)
        ]
    return rows


def read_runs(path: Path) -> list[Run]:
    """The runs of an earlier call."""
    kept = json.loads(path.read_text())["runs"]
    figures = [{name: Figures(**run[name]) for name in ("predicted", "measured")} for run in kept]
    return [Run(**{**run, **pair}) for run, pair in zip(kept, figures, strict=True)]


def write_runs(runs: list[Run], path: Path) -> None:
    """All that was measured and, once every load was, what it comes to."""
    is_whole = {run.share for run in runs} == set(SHARES)
    content: dict[str, Any] = {
        "cores": os.cpu_count(),
        "foreign_cores": foreign_cores(runs),
        "rows": [{**asdict(row), "error": row.error} for row in rows_of(runs)] if is_whole else [],
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(clean(content), indent=1, allow_nan=False) + "\n")


def foreign_cores(runs: list[Run]) -> float:
    """What other programs kept busy, the median; 0 where the system does not tell."""
    known = [run.foreign_cores for run in runs if run.foreign_cores is not None]
    return median(known) if known else 0.0
