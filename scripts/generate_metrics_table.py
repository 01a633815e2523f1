"""Write the table of docs/metrics.md from `pdserve.observe.metrics`; `--check` compares."""

import argparse
import re
import sys
from pathlib import Path

from pdserve.observe.metrics import METRICS, Kind, MetricSpec, Process

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"
PLACE = re.compile(r"(<!-- metrics -->\n).*?(<!-- end of metrics -->)", re.DOTALL)


def table() -> str:
    """One row for each metric."""
    rows = ["| metric | type | labels | process | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*rows, *map(_row, METRICS)])


def _row(spec: MetricSpec) -> str:
    labels = ", ".join(f"`{label}`" for label in spec.labels)
    is_everywhere = set(spec.processes) == set(Process)
    processes = "all" if is_everywhere else ", ".join(spec.processes)
    return f"| `{spec.name}` | {spec.kind} | {labels} | {processes} | {spec.help}{_range(spec)} |"


def _range(spec: MetricSpec) -> str:
    if spec.kind is not Kind.HISTOGRAM:
        return ""
    return f"; {len(spec.buckets)} buckets from {spec.buckets[0]:g} to {spec.buckets[-1]:g}"


def with_table(text: str) -> str:
    """`text` with what stands between the markers replaced."""
    fresh, count = PLACE.subn(lambda place: f"{place[1]}\n{table()}\n\n{place[2]}", text)
    if count != 1:
        sys.exit(f"{PAGE.name} has {count} places for the table, not 1")
    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    is_check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    fresh = with_table(text)
    if is_check and fresh != text:
        sys.exit("docs/metrics.md differs from the code; run `make diagrams`")
    if not is_check:
        PAGE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
