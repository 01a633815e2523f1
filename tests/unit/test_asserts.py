"""No check that matters is an assert: `python -O` removes them all."""

import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.domain.invariants import BrokenInvariant, check_invariant
from scripts.check_asserts import ROOT, bad_asserts


@pytest.mark.parametrize(
    "line",
    [
        "assert queue.pop() == block",
        "assert (found := search(key)) is not None",
        "assert queue.pop() is not None",
        "assert isinstance(stream.read(), bytes)",
        "assert isinstance(items[next(places)], int)",
        "assert 0 <= message.block < num_blocks",
        "assert message.ok, 'a peer said no'",
        "assert all(seen)",
    ],
)
def test_lint_finds_asserts_that_do_more_than_narrow_a_type(line: str) -> None:
    assert list(bad_asserts(f"first = 1\n{line}\n")) == [2]


def test_lint_finds_awaits() -> None:
    source = "async def run():\n    assert isinstance(await receive(), bytes)\n"
    assert list(bad_asserts(source)) == [2]


@pytest.mark.parametrize(
    "line",
    [
        "assert self.table is not None, 'admitted'",
        "assert isinstance(content, dict | list)",
        "assert isinstance(items[0], tuple)",
    ],
)
def test_lint_leaves_asserts_that_narrow_a_type(line: str) -> None:
    assert list(bad_asserts(line)) == []


def test_the_code_passes_its_lint() -> None:
    script = Path(ROOT) / "scripts" / "check_asserts.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_invariants_hold_under_optimisation() -> None:
    """In a process of its own with -O: an illegal move of a block changes nothing."""
    code = """if True:
        from pdserve.domain.invariants import BrokenInvariant
        from pdserve.engine.block_pool import BlockPool
        assert False, "this process runs with asserts"
        pool = BlockPool(4)
        first, second = pool.reserve(2), pool.reserve(2)
        try:
            first.pin(0, 1)
        except BrokenInvariant:
            print(*first.block_ids, *second.block_ids, pool.usage().reserved)
    """
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1", "2", "3", "4"], done.stderr


def test_broken_invariant_names_rule_and_values() -> None:
    check_invariant(True, "held")
    with pytest.raises(BrokenInvariant, match=r"^blocks add up; saw 3, 4$"):
        check_invariant(False, "blocks add up", 3, 4)
