"""Buffers between host and device are neither read nor overwritten before their events."""

from random import Random

import numpy as np
import pytest
import torch

from pdserve.engine.device.runtime import HOST, DeviceRuntime
from pdserve.engine.device.staging import Fetcher, Stager
from tests.support.sim_device import SimRuntime


def exchange(runtime: DeviceRuntime) -> None:
    """Arrays of many sizes go to the device one after the other, and what is there comes back."""
    chooser = Random(3)
    stager, fetcher = Stager(runtime), Fetcher(runtime)
    sent, arrived = [], []
    for _ in range(20):
        content = np.frombuffer(chooser.randbytes(8 * chooser.choice((1, 9, 20_000))), np.uint8)
        stager.take(len(content))[:] = content
        arrived.append(stager.send(len(content)))
        sent.append(content.tolist())
    for first, content in zip(arrived, sent, strict=True):
        numbers = first.view(torch.int64)
        got, doubled = fetcher.fetch(first, numbers + numbers).wait()
        assert got.tolist() == content
        assert torch.equal(doubled, got.view(torch.int64) * 2)
    stager.close()
    fetcher.close()


@pytest.mark.parametrize("late", [False, True])
@torch.inference_mode()
def test_what_is_sent_arrives_however_late_the_device_is(late: bool) -> None:
    with SimRuntime(late=late) as runtime:
        exchange(runtime)


@torch.inference_mode()
def test_the_host_is_a_device_too() -> None:
    exchange(HOST)


@torch.inference_mode()
def test_an_array_can_go_to_memory_that_there_is() -> None:
    with SimRuntime(late=True) as runtime:
        stager = Stager(runtime)
        target = runtime.empty(8, dtype=torch.uint8)
        stager.take(5)[:] = 7
        assert stager.send(5, target) is target
        stager.take(2)[:] = 9
        stager.send(2, target)
        runtime.synchronize()
        assert target.cpu().tolist()[:5] == [9, 9, 7, 7, 7]
        stager.close()
