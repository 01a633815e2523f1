"""What `pdserve check-links` prints: a line for each link, or JSON."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape

from deploy.link_check.links import GIB, Link
from pdserve.cli.plain_json import json_text
from pdserve.cli.tables import titled_table


def links_as_json(links: Sequence[Link], min_bytes_per_s: float, notes: Sequence[str]) -> str:
    """One object; `is_ok` says what the exit code says."""
    lines = []
    for link in links:
        verdict = link.verdict(min_bytes_per_s)
        lines.append(
            {
                **asdict(link),
                "prefill": _side(link, "prefill"),
                "decode": _side(link, "decode"),
                "is_ok": not verdict,
                "verdict": verdict or "ok",
            }
        )
    is_ok = all(line["is_ok"] for line in lines)
    return json_text({"is_ok": is_ok, "links": lines, "notes": list(notes)})


def _side(link: Link, role: str) -> dict[str, object]:
    side = link.prefill if role == "prefill" else link.decode
    layout = side.layout
    return {
        "name": side.name,
        "protocol_version": side.protocol_version,
        "tp": layout.tp if layout else None,
        "pp": layout.pp if layout else None,
        "block_size": layout.whole.block_size if layout else None,
        "block_order": layout.whole.order if layout else None,
        "dtype": layout.whole.dtype if layout else None,
    }


def print_links(
    console: Console, links: Sequence[Link], min_bytes_per_s: float, notes: Sequence[str]
) -> None:
    table = titled_table("", "from", "to", "transport", "verdict", num_left=4)
    for name in ("GiB/s", "a block", "pairs"):
        table.add_column(name, justify="right")
    for link in links:
        rate, latency_s = link.bytes_per_s, link.latency_s
        table.add_row(
            escape(link.prefill.name),
            escape(link.decode.name),
            link.transport or "-",
            escape(link.verdict(min_bytes_per_s) or "ok"),
            "-" if rate is None else f"{rate / GIB:.3g}",
            "-" if latency_s is None else f"{latency_s * 1e3:.3g} ms",
            str(link.num_pairs),
        )
    console.print(table)
    sides = {side.name: side for link in links for side in (link.prefill, link.decode)}
    for name, side in sides.items():
        console.print(f"{escape(name)}: protocol {side.protocol_version}, {side.shape}")
    for why in sorted({f"{link.transport}: {link.why}" for link in links if link.why}):
        console.print(escape(why))
    for note in notes:
        console.print(escape(note))
