"""Verdicts, and what is moved to reach them."""

import itertools
import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from deploy.link_check.links import GIB, Link, Side
from deploy.link_check.rank import layout_fields, layout_of, scattered
from deploy.link_check.report import links_as_json, print_links
from pdserve.domain.layout import BlockOrder, KvLayout, LayerKv, ShardedLayout

WHOLE = KvLayout(
    layers=(LayerKv(4, 8, 8), LayerKv(2, 8, 0)),
    block_size=12,
    dtype="float32",
    item_bytes=4,
    order=BlockOrder.HEADS,
)
LAYOUT = ShardedLayout(whole=WHOLE, tp=2, pp=2)
LINK = Link(
    prefill=Side(name="prefill-0", protocol_version=3, layout=LAYOUT),
    decode=Side(name="decode-0", protocol_version=2, layout=None),
    transport="tcp",
    why="the only one that both have",
    num_bytes=5,
    bytes_per_s=2 * GIB,
    latency_s=0.002,
)


def test_verdict_is_what_failed_or_that_it_is_too_slow() -> None:
    assert LINK.verdict(2 * GIB) == ""
    assert LINK.verdict(3 * GIB) == "2 GiB/s is less than --min-gib-per-s 3"
    assert replace(LINK, failure="no way").verdict(0) == "no way"


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 100, 101])
def test_scattered_blocks_are_all_of_them_and_no_neighbours(num_blocks: int) -> None:
    found = scattered(num_blocks)
    assert sorted(found) == list(range(num_blocks))
    if num_blocks > 4:
        assert not any(b == a + 1 for a, b in itertools.pairwise(found))


def test_layout_survives_the_way_to_a_process() -> None:
    assert layout_of(json.loads(json.dumps(layout_fields(LAYOUT)))) == LAYOUT


def test_report_has_a_line_for_each_link_and_what_its_ends_are() -> None:
    out = StringIO()
    failed = replace(LINK, transport="", why="", bytes_per_s=None, latency_s=None, failure="gone")
    print_links(Console(file=out, width=120), [LINK, failed], 0.0, ["a note"])
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
    assert "prefill-0 decode-0 tcp ok 2 2 ms 1" in lines
    assert "prefill-0 decode-0 - gone - - 1" in lines
    assert "prefill-0: protocol 3, tp 2 pp 2, 12 tokens a block, heads first, float32" in lines
    assert "decode-0: protocol 2, not described" in lines
    assert "tcp: the only one that both have" in lines
    assert "a note" in lines


def test_json_says_what_the_exit_code_says() -> None:
    said = json.loads(links_as_json([LINK], 3 * GIB, ["a note"]))
    assert (said["is_ok"], said["notes"]) == (False, ["a note"])
    [line] = said["links"]
    assert (line["is_ok"], line["verdict"]) == (False, "2 GiB/s is less than --min-gib-per-s 3")
    assert line["prefill"]["block_order"] == "heads"
    assert line["decode"] == {
        "name": "decode-0",
        "protocol_version": 2,
        **dict.fromkeys(("tp", "pp", "block_size", "block_order", "dtype")),
    }
