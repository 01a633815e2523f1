"""Decode steps as recorded graphs beside the same steps launched operator by operator.

The graphs were recorded with padding alone. They are replayed for other lengths, tokens and tables,
in buckets that are full and that are not.
"""

from collections.abc import Iterator, Sequence

import torch

from bench.gpu_check.findings import Finding, must
from bench.gpu_check.machine import Machine
from bench.gpu_check.whole_models import OpenedModel, Requests, opened_model
from pdserve.domain.engine_spec import StepPath
from pdserve.engine.contract import StepBatch, StepLimits
from pdserve.engine.device.decode_graphs import DecodeGraphs
from pdserve.engine.device.device_attention import DeviceAttention
from pdserve.engine.device.device_draws import DrawPlan


def measure(machine: Machine) -> Iterator[Finding]:
    name = machine.size("1B", "tiny")
    limits = StepLimits(max_num_requests=machine.size(32, 4), max_num_tokens=machine.size(4096, 64))
    context = machine.size(1024, 48)
    blocks = limits.max_num_requests * -(-context // 16)
    with opened_model(machine, name, limits, context, blocks) as opened:
        requests = Requests(opened, limits.max_num_requests, context)
        requests.read_prompts(context - 1)
        with opened.runtime.on(opened.runtime.stream()):
            graphs = _graphs(opened, machine.size((1, 8, 32), (1, 4)), context)
            for count in machine.size((1, 6, 8, 24, 32), (1, 3, 4)):
                batch = requests.decode([context - 5 * place for place in range(count)])
                # Padding makes matrix products of other shapes, which add up in another order.
                yield _gap(opened, graphs, batch, limit=machine.size(2e-2, 1e-5))
            graphs.close()
        batch = requests.decode([context] * 3, temperature=0.8)
        recorded, path = opened.stepper.run(batch)
        opened.stepper.forget()
        launched_tokens, other = opened.stepper.run(batch)
        yield must("the engine takes a graph for decode", path is StepPath.GRAPH)
        yield must("and none once it has none", other is StepPath.EAGER)
        yield must("sampled tokens are the same", recorded == launched_tokens)


def _graphs(opened: OpenedModel, sizes: Sequence[int], context: int) -> DecodeGraphs:
    attention = opened.model.attention
    assert isinstance(attention, DeviceAttention)
    return DecodeGraphs(
        opened.model,
        attention,
        opened.runtime,
        opened.backend.stager,
        sizes=sizes,
        width=opened.model.layout.num_blocks_for(context),
    )


@torch.inference_mode()
def _gap(opened: OpenedModel, graphs: DecodeGraphs, batch: StepBatch, limit: float) -> Finding:
    """Between the logits of both, in parts of the largest logit."""
    size = graphs.size_for(batch)
    assert size is not None
    replayed = graphs.run(batch, DrawPlan.of([], 1), size).logits.float().clone()
    launched = opened.model.forward(batch).float()
    gap, largest = (replayed - launched).abs().amax(), launched.abs().amax()
    opened.runtime.synchronize()
    share = float(gap.cpu()) / float(largest.cpu())
    return must(
        f"graph of {size} replayed for {len(batch.sequences)} requests",
        share <= limit,
        value=share,
        note="difference to the logits of the step launched eagerly, in parts of the largest",
    )
