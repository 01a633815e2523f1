"""A name server for tests: A records out of a JSON file, which is read again for each question.

`python dns_stub.py ZONE.json [--host 0.0.0.0] [--port 53]`; the file maps names to
lists of addresses.
"""

import argparse
import json
import socket
import struct
from pathlib import Path

HEADER = struct.Struct(">HHHHHH")
TYPE_A, CLASS_IN = 1, 1
IS_ANSWER, NO_SUCH_NAME = 0x8180, 0x8183
POINTER_TO_QUESTION = 0xC00C
TTL_S = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("zone", type=Path)
    parser.add_argument("--host", default="0.0.0.0")
    parser.add_argument("--port", type=int, default=53)
    arguments = parser.parse_args()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((arguments.host, arguments.port))
        print("ready", flush=True)
        while True:
            question, peer = server.recvfrom(512)
            zone = json.loads(arguments.zone.read_text())
            server.sendto(answer(question, zone), peer)


def answer(message: bytes, zone: dict[str, list[str]]) -> bytes:
    """The reply to one question; names that the zone lacks do not exist."""
    number, *_ = HEADER.unpack_from(message)
    labels, place = [], HEADER.size
    while length := message[place]:
        labels.append(message[place + 1 : place + 1 + length].decode())
        place += 1 + length
    kind, _ = struct.unpack_from(">HH", message, place + 1)
    question = message[HEADER.size : place + 5]
    addresses = zone.get(".".join(labels).lower())
    flags = IS_ANSWER if addresses is not None else NO_SUCH_NAME
    records = [
        struct.pack(">HHHIH", POINTER_TO_QUESTION, TYPE_A, CLASS_IN, TTL_S, 4)
        + socket.inet_aton(address)
        for address in (addresses or [])
        if kind == TYPE_A
    ]
    return HEADER.pack(number, flags, 1, len(records), 0, 0) + question + b"".join(records)


if __name__ == "__main__":
    main()
