"""Where a process may listen: loopback, unless somebody says that the network is safe."""

import errno
import socket
from typing import Annotated

from pydantic import AfterValidator

from pdserve.domain.addresses import (
    is_loopback,
    is_wildcard,
    join_address,
    parse_address,
    parse_host,
)

Host = Annotated[str, AfterValidator(parse_host)]
Address = Annotated[str, AfterValidator(parse_address)]
"""host:port to dial."""


def check_binding(host: str, *, insecure: bool) -> None:
    """Raise `ValueError` for a host that others can reach, unless that was asked for."""
    if not insecure and not is_loopback(host):
        raise ValueError(
            f"host must be a loopback address, got {host!r}: the ports have neither TLS nor login; "
            "where the network around them is closed, say so with insecure: true (--insecure)"
        )


def check_advertised(host: str) -> None:
    """Raise `ValueError` for a host that peers cannot dial: a worker says where it listens."""
    if is_wildcard(host):
        raise ValueError(f"host is what peers dial: give one address of this machine, not {host!r}")


def listen(host: str, port: int, *, backlog: int = 128) -> socket.socket:
    """A listening socket, for both families if `host` is a wildcard; raises `OSError`.

    Port 0 picks a free one. A port whose old connections are winding down is free.
    """
    if is_wildcard(host):
        if _has_ipv6():
            return socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog
            )
        host = "0.0.0.0"
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    # A name with both is dialled by its IPv4 address by whoever knows only that family.
    family, _, _, _, address = min(found, key=lambda each: each[0] != socket.AF_INET)
    return socket.create_server(address, family=family, backlog=backlog)


def _has_ipv6() -> bool:
    """Whether one socket here can take both families; IPv6 may be built in and switched off."""
    if not socket.has_dualstack_ipv6():
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
    except OSError:
        return False
    return True


def explain_listening(host: str, port: int, error: OSError) -> str:
    """Why nothing can listen there, in words that begin with the address."""
    address = join_address(host, port)
    if isinstance(error, socket.gaierror):
        return f"{address}: the name {host} is not known here"
    if error.errno == errno.EADDRINUSE:
        return f"{address}: the port is in use"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address}: the host is not an address of this machine"
    if error.errno == errno.EACCES:
        return f"{address}: a port below 1024 needs more rights than this user has"
    return f"{address}: {error.strerror}"
