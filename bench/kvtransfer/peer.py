"""The process that is read: serves one memory by each transport, plain sockets and plain gloo."""

import asyncio
import json
import socket
import struct
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
import uvloop

from kvtransfer.transports import open_transports
from pdserve.config.timers import Timers
from pdserve.domain.ids import BlockId
from pdserve.domain.layout import KvLayout, LayerKv
from pdserve.engine.kv_memory import KvMemory


def layout_of(block_bytes: int) -> KvLayout:
    """16 tokens a block, one layer of bytes."""
    head_dim = block_bytes // 32
    layer = LayerKv(num_kv_heads=1, k_head_dim=head_dim, v_head_dim=head_dim)
    return KvLayout(layers=(layer,), block_size=16, dtype="uint8", item_bytes=1)


async def recv_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        data += await asyncio.get_running_loop().sock_recv(sock, num_bytes - len(data))
    return data


async def serve_raw(listener: socket.socket, memory: KvMemory) -> None:
    """One connection: a count and block ids in, the blocks out."""
    loop = asyncio.get_running_loop()
    sock, _ = await loop.sock_accept(listener)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        (num_blocks,) = struct.unpack("<I", await recv_exactly(sock, 4))
        for block_id in struct.unpack(f"<{num_blocks}I", await recv_exactly(sock, 4 * num_blocks)):
            await loop.sock_sendall(sock, memory.block(BlockId(block_id)))


def open_gloo(store: Any, rank: int) -> Any:
    """A group of two; blocks until both have it."""
    dist: Any = torch.distributed
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    return dist.ProcessGroupGloo(store, rank, 2, options)


def serve_gloo(store: Any, memory: KvMemory, num_moved: int) -> None:
    """Block ids in, the blocks out: packed, then sent in one piece."""
    group = open_gloo(store, 0)
    ids = torch.empty(num_moved, dtype=torch.int64)
    packed = torch.empty(num_moved, memory.layout.block_bytes, dtype=torch.uint8)
    blocks, rows = memory.tensor().numpy(), packed.numpy()
    while True:
        group.recv([ids], 1, 0).wait()
        for place, block in enumerate(ids.tolist()):
            rows[place] = blocks[block]
        group.send([packed], 1, 0).wait()


async def main(num_blocks: int, block_bytes: int, num_moved: int) -> None:
    memory = KvMemory(layout_of(block_bytes), num_blocks)
    memory.bytes[:] = b"\xaa" * memory.num_bytes
    names = ["shm", "tcp", "collective", "nixl"]
    transports = open_transports(names, "127.0.0.1", timers=Timers())

    async def may_read(block_ids: Sequence[BlockId]) -> bool:
        return True

    dist: Any = torch.distributed
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    arguments = (store, memory, num_moved)
    threading.Thread(target=serve_gloo, args=arguments, daemon=True).start()
    servers = [await transport.serve(memory, may_read) for transport in transports]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        hello = {
            "regions": [asdict(server.region) for server in servers],
            "raw_port": listener.getsockname()[1],
            "gloo_port": store.port,
        }
        print(json.dumps(hello), flush=True)
        await serve_raw(listener, memory)


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:4])))
