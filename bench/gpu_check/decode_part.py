"""How fast decode attention reads KV, by the order inside a block and by the number of splits.

One launch a layer, recorded as a graph, as decode steps run. The order `nhd` is the product's;
`apart` is what block-major memory is held against.
"""

from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu_check.findings import Finding
from bench.gpu_check.machine import Machine
from bench.gpu_check.paged_rows import BLOCK_SIZE, ORDERS, PagedMemory, Rows, Shape
from pdserve.engine.device.opening import open_runtime
from pdserve.engine.device.runtime import HOST, DeviceRuntime
from pdserve.engine.device.variants import choose_splits


def measure(machine: Machine) -> Iterator[Finding]:
    runtime: DeviceRuntime = open_runtime(str(machine.device)) or HOST
    dtype = machine.size(torch.bfloat16, torch.float32)
    layers = machine.size(32, 2)
    shape = Shape(heads=32, kv_heads=8, dim=machine.size(128, 16), num_layers=layers, dtype=dtype)
    ceiling = machine.copy_bytes_per_s()
    batches = machine.size([(1, 8192), (16, 2048), (128, 2048)], [(2, 40)])
    for batch, context in batches:
        num_bytes = batch * shape.kv_bytes(context) * layers
        chosen = choose_splits(batch, shape.kv_heads, runtime.num_processors, context)
        for order in ORDERS:
            memory = PagedMemory(machine, shape, batch * -(-context // BLOCK_SIZE), order)
            rows = Rows(machine, shape, memory, [(context - 1, 1)] * batch)
            found = {}
            for splits in sorted({chosen, *machine.size((1, 2, 4, 8, 16, 32), (1,))}):
                if splits != chosen and (order != "nhd" or batch * splits > 512):
                    continue  # what the number of splits costs is shown in one order
                with torch.inference_mode():
                    rows.attend(splits)
                    graph = runtime.capture(partial(rows.attend, splits))
                    found[splits] = num_bytes / machine.median_s(graph.replay, 10)
                    del graph
            best = max(found, key=lambda splits: found[splits])
            yield Finding(
                what=f"{order}: {batch} rows x {context} positions",
                value=found[chosen] / 1e12,
                unit="TB/s",
                note=f"{100 * found[chosen] / ceiling:.0f} % of a copy's rate with the chosen "
                f"{chosen} splits; best: {best} splits, {found[best] / 1e12:.2f} TB/s",
            )
            del memory, rows
