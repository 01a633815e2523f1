"""Write the state diagrams of ARCHITECTURE.md from the tables in the code; `--check` compares."""

import argparse
import re
import sys
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import TypeVar

from kvtransfer import session
from pdserve.engine import block_pool

ARCHITECTURE = Path(__file__).resolve().parent.parent / "ARCHITECTURE.md"


StateT = TypeVar("StateT", bound=Enum)
EventT = TypeVar("EventT", bound=Enum)


def diagram(table: Mapping[tuple[StateT, EventT], StateT], start: StateT) -> str:
    """A Mermaid state diagram; events between the same two states share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (state, event), after in table.items():
        arrows.setdefault((state.name.lower(), after.name.lower()), []).append(event.name.lower())
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {start.name.lower()}"]
    lines += [f"    {a} --> {b}: {', '.join(events)}" for (a, b), events in arrows.items()]
    return "\n".join([*lines, "```"])


DIAGRAMS = {
    "handoff": diagram(session.NEXT, session.Phase.IDLE),
    "block": diagram(block_pool.NEXT, block_pool.BlockState.FREE),
}


def with_diagrams(text: str) -> str:
    """`text` with what stands between each pair of markers replaced."""
    for name, drawing in DIAGRAMS.items():
        pattern = rf"(<!-- diagram: {name} -->\n).*?(<!-- end of diagram -->)"
        text, count = re.subn(pattern, rf"\1{drawing}\n\2", text, flags=re.DOTALL)
        if count != 1:
            sys.exit(f"{ARCHITECTURE.name} has {count} places for the diagram {name!r}, not 1")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    is_check = parser.parse_args().check
    text = ARCHITECTURE.read_text(encoding="utf-8")
    fresh = with_diagrams(text)
    if is_check and fresh != text:
        sys.exit("diagrams differ from the tables; run `make diagrams`")
    if not is_check:
        ARCHITECTURE.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
