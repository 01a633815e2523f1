"""The check's results as JSON and as tables in Markdown, for docs/benchmarks.md."""

from collections.abc import Sequence
from typing import Any

from bench.gpu_check.running import Outcome


def as_data(
    outcomes: Sequence[Outcome], device: str, elapsed_s: float, date: str
) -> dict[str, Any]:
    return {
        "device": device,
        "date": date,
        "elapsed_s": round(elapsed_s, 1),
        "is_good": all(outcome.is_good for outcome in outcomes),
        "parts": [
            {
                "name": outcome.part.name,
                "answers": outcome.part.answers,
                "elapsed_s": round(outcome.elapsed_s, 1),
                "left_out": outcome.left_out,
                "failure": outcome.failure,
                "findings": [
                    {
                        "what": finding.what,
                        "value": finding.value,
                        "unit": finding.unit,
                        "note": finding.note,
                        "is_good": finding.is_good,
                    }
                    for finding in outcome.findings
                ],
            }
            for outcome in outcomes
        ],
    }


def as_markdown(outcomes: Sequence[Outcome], device: str, date: str) -> str:
    """One table; parts that did not run have one line that says why."""
    lines = [
        f"`python -m bench.gpu_check --device {device}`, {date}:",
        "",
        "| part | what | found | note |",
        "| --- | --- | --- | --- |",
    ]
    for outcome in outcomes:
        name = outcome.part.name
        for finding in outcome.findings:
            verdict = {None: "", True: "yes ", False: "**no** "}[finding.is_good]
            found = f"{verdict}{finding.value_text} {finding.unit}".strip()
            lines.append(_row(name, finding.what, found, finding.note))
        if outcome.left_out:
            lines.append(_row(name, outcome.part.answers, "left out", outcome.left_out))
        if outcome.failure:
            lines.append(_row(name, outcome.part.answers, "**failed**", outcome.failure[-200:]))
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    clean = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
    return f"| {' | '.join(clean)} |"
