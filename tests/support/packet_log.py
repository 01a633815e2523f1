"""Every IPv4 connection that is tried in a network namespace: one JSON line each.

`python packet_log.py` prints "ready", then [src, dst, protocol, port] the first time
that somebody sends a SYN, or a UDP packet that is no reply, from src to dst.
"""

import json
import socket

ALL_PROTOCOLS = 3  # ETH_P_ALL
IPV4 = 0x0800
TCP, UDP = 6, 17
SYN, ACK = 0x02, 0x10

Flow = tuple[str, int, str, int]


def main() -> None:
    seen: set[tuple[str, str, str, int]] = set()
    flows: set[Flow] = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS)) as tap:
        print("ready", flush=True)
        while True:
            packet = tap.recv(2048)
            start = read_start(packet, flows)
            if start is not None and start not in seen:
                seen.add(start)
                print(json.dumps(start), flush=True)


def read_start(packet: bytes, flows: set[Flow]) -> tuple[str, str, str, int] | None:
    """Source, destination, protocol and port of a packet that starts something."""
    if int.from_bytes(packet[12:14]) != IPV4:
        return None
    ip = packet[14:]
    body = ip[4 * (ip[0] & 0x0F) :]
    source, target = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20])
    from_port, to_port = int.from_bytes(body[0:2]), int.from_bytes(body[2:4])
    if ip[9] == TCP and body[13] & (SYN | ACK) == SYN:
        return source, target, "TCP", to_port
    if ip[9] == UDP:
        if (target, to_port, source, from_port) in flows:
            return None
        flows.add((source, from_port, target, to_port))
        return source, target, "UDP", to_port
    return None


if __name__ == "__main__":
    main()
