"""A cluster of one prefill and one decode worker that share the GPU, as `pdserve up` starts it.

Its tokens must be those of a colocated worker on the CPU, in float32, greedy and sampled.
"""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine
from tests.support.prompts import demo_prompts

_START_S, _STOP_S = 90.0, 20.0
_AT_A_TIME = 16


def measure(machine: Machine) -> Iterator[Finding]:
    prompts = demo_prompts(machine.size(50, 12), seed=11, max_new_tokens=24)
    with _cluster("cpu", num_prefill=0) as address:
        wanted, _ = asyncio.run(_answers(address, prompts))
    began_s = time.perf_counter()
    with _cluster(str(machine.device), num_prefill=1) as address:
        yield Finding(what="cluster ready after", value=time.perf_counter() - began_s, unit="s")
        got, elapsed_s = asyncio.run(_answers(address, prompts))
    for name, one, other in zip(("greedy", "sampled"), wanted, got, strict=True):
        same = sum(mine == theirs for mine, theirs in zip(one, other, strict=True))
        yield must(
            f"{name} tokens through prefill and decode as on the CPU",
            same == len(prompts),
            value=f"{same}/{len(prompts)}",
        )
    num_tokens = sum(len(answer) for answers in got for answer in answers)
    yield Finding(
        what="output of the demo model",
        value=num_tokens / elapsed_s,
        unit="tokens/s",
        note=f"{_AT_A_TIME} requests at a time; says nothing about large models",
    )


@contextmanager
def _cluster(device: str, num_prefill: int) -> Iterator[str]:
    """The address of a running cluster, whose processes are gone afterwards."""
    data = {
        "model": "demo",
        "dtype": "float32",
        "device": device,
        "memory_fraction": 0.4,  # two workers share a GPU
        "num_blocks": 2048,
        "start_s": _START_S,
        "prefill": {"replicas": num_prefill},
        "decode": {"replicas": 1},
        "router": {"port": 0, "internal_port": 0},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cluster.yaml")
        file.write_text(json.dumps(data))  # JSON is YAML
        child = subprocess.Popen(
            [sys.executable, "-m", "pdserve.cli", "up", str(file), "--json"],
            stdout=subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"},
        )
        try:
            assert child.stdout is not None
            if not select.select([child.stdout], [], [], _START_S + 10)[0]:
                raise TimeoutError(f"pdserve up says nothing within {_START_S + 10:.0f} s")
            line = child.stdout.readline()
            if not line:
                raise ChildProcessError("pdserve up ended before its cluster was ready")
            yield json.loads(line)["address"]
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


Tokens = list[tuple[int, ...]]


async def _answers(
    address: str, prompts: Sequence[tuple[tuple[int, ...], int]]
) -> tuple[tuple[Tokens, Tokens], float]:
    """Greedy answers and sampled ones, and the seconds that they took together."""
    from pdserve.client.inference import InferenceClient
    from pdserve.client.values import Sampling

    async with InferenceClient(address) as client:
        gate = asyncio.Semaphore(_AT_A_TIME)

        async def answer(place: int, temperature: float) -> tuple[int, ...]:
            prompt, max_tokens = prompts[place]
            sampling = Sampling(
                temperature=temperature, top_p=0.9, seed=place, max_tokens=max_tokens
            )
            async with gate:
                answer = await client.complete(prompt, sampling, timeout_s=60)
            return tuple(token.token_id for token in answer.tokens)

        began_s = time.perf_counter()
        places = range(len(prompts))
        greedy = await asyncio.gather(*(answer(place, 0.0) for place in places))
        sampled = await asyncio.gather(*(answer(place, 0.9) for place in places))
        return (list(greedy), list(sampled)), time.perf_counter() - began_s
