"""The attention kernels as compiled for GPUs that are not there: registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.attention_kinds import REALISTIC, WORST

MOST_SHARED_BYTES = 100 << 10
ARCHITECTURES = {80, 90, 100}


def compiled(cache: Path, *options: str, timeout_s: float) -> list[dict[str, object]]:
    """What every kernel takes of a GPU, in a process that compiles and does not interpret."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.compiled_kernels", *options],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


def check(usages: list[dict[str, object]]) -> None:
    assert {usage["architecture"] for usage in usages} == ARCHITECTURES
    assert {usage["kernel"] for usage in usages} == {"store", "attend", "combine"}
    too_large = [
        usage
        for usage in usages
        if usage["spilled_bytes"] != 0 or int(str(usage["shared_bytes"])) >= MOST_SHARED_BYTES
    ]
    assert too_large == []


def test_the_largest_variants_spill_nothing_and_share_less_than_100_kib(tmp_path: Path) -> None:
    usages = compiled(tmp_path, timeout_s=300)
    assert len({usage["variant"] for usage in usages}) >= 2 * len(WORST)
    check(usages)


@pytest.mark.slow
def test_no_variant_of_a_published_model_spills_or_shares_more(tmp_path: Path) -> None:
    usages = compiled(tmp_path, "--all", timeout_s=7200)
    assert len({usage["variant"] for usage in usages}) >= len(REALISTIC)
    check(usages)
