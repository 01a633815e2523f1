"""Decode steps on the simulated device give the bits of the CPU, and mistakes are found out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.device_steps import differences
from tests.support.sim_device import DEVICE, SIM, Misuse, SimRuntime
from tests.support.tiny_models import SERVED

NOT_RECORDED = {"phimoe"}
"""Its code asks on the host how long requests are, in every step."""
RECORDED = sorted(set(SERVED) - NOT_RECORDED)
INTERPRETED = ("llama", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_step_gives_the_bits_of_the_cpu_for_other_lengths_tokens_and_tables(
    name: str,
) -> None:
    assert differences(name) == []


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe"])
def test_so_it_does_in_half_precision(name: str, dtype: str) -> None:
    assert differences(name, dtype=dtype) == []


def test_at_least_forty_types_of_models_are_recorded() -> None:
    assert len(RECORDED) >= 40


def test_kernels_in_the_interpreter_give_the_same_bits_too() -> None:
    """In a process of its own: the interpreter is chosen when triton is imported."""
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.device_steps", *INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines == [[name, []] for name in INTERPRETED]


def test_a_model_that_reads_lengths_on_the_host_cannot_be_recorded() -> None:
    with pytest.raises(Misuse, match="needs values of the device while a step is recorded"):
        differences("phimoe")


HOST_TABLE = torch.arange(8)
MISTAKES: dict[str, Callable[[Tensor], Any]] = {
    "a tensor of the host": lambda rows: rows + HOST_TABLE,
    "an index on the host": lambda rows: rows.index_select(0, HOST_TABLE[:2]),
    "item": lambda rows: rows.sum().item(),
    "int": lambda rows: rows[: int(rows[0])],
    "tolist": lambda rows: rows.tolist(),
    "a branch": lambda rows: rows + 1 if rows.any() else rows,
    "a boolean index": lambda rows: rows[rows > 3],
    "a boolean index that is written to": lambda rows: rows.index_put_((rows > 3,), rows[0]),
    "nonzero": lambda rows: rows.nonzero(),
    "unique": lambda rows: torch.unique(rows),
    "repeats": lambda rows: rows.repeat_interleave(rows),
    "a copy from the host": lambda rows: rows + HOST_TABLE.to(DEVICE),
    "a copy to the host": lambda rows: rows.cpu(),
}


@pytest.mark.parametrize("what", sorted(MISTAKES))
@torch.inference_mode()
def test_a_mistake_in_a_step_is_refused_while_it_is_recorded(what: str) -> None:
    with SimRuntime() as runtime:
        rows = HOST_TABLE.to(DEVICE)
        with pytest.raises((Misuse, RuntimeError)):
            runtime.capture(lambda: MISTAKES[what](rows))
        assert SIM.recorded is None


class Counted:
    """A step that counts on the host."""

    def __init__(self) -> None:
        self.num_steps = 0

    def add_count(self, rows: Tensor) -> Tensor:
        self.num_steps += 1
        return rows + self.num_steps


@torch.inference_mode()
def test_what_python_holds_is_fixed_when_a_step_is_recorded() -> None:
    counted = Counted()
    with SimRuntime() as runtime:
        rows = HOST_TABLE.to(DEVICE)
        graph = runtime.capture(lambda: counted.add_count(rows))
        for _ in range(3):
            result = graph.replay()
        assert result.cpu().tolist() == (HOST_TABLE + 1).tolist()
        rows.copy_(rows * 2)
        assert graph.replay().cpu().tolist() == (HOST_TABLE * 2 + 1).tolist()


@torch.inference_mode()
def test_late_streams_show_what_is_read_or_overwritten_too_early() -> None:
    with SimRuntime(late=True) as runtime:
        sent, got = runtime.pinned(8), runtime.pinned(8)
        on_device = runtime.empty(8, dtype=torch.uint8)
        sent.tensor.fill_(3)
        runtime.copy(on_device, sent.tensor)
        is_sent = runtime.record()
        runtime.copy(got.tensor, on_device + 1)
        assert got.tensor.tolist() == [0] * 8, "nothing is there before its event"
        sent.tensor.fill_(5)
        runtime.record().wait()
        assert got.tensor.tolist() == [6] * 8, "what was overwritten too early is lost"
        is_sent.wait()
        sent.close()
        got.close()
