"""Hosts and ports as text: the one place that knows of brackets around IPv6 addresses.

Inside a host has no brackets; an address, host:port, has them. All functions raise `ValueError`
that says what is wrong.
"""

import ipaddress
import re

MAX_PORT = 65535
_NAME = re.compile(
    r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*\.?"
)
_MAX_NAME_CHARS = 253


def parse_host(text: str) -> str:
    """A name, an IPv4 or an IPv6 address, with or without brackets, in its one usual form."""
    if text.startswith("[") or text.endswith("]"):
        if not (text.startswith("[") and text.endswith("]")):
            raise ValueError(f"{text!r} has only one of its two brackets")
        return _ipv6(text[1:-1])
    if text.count(":") == 1:
        raise ValueError(f"{text!r} is a host with a port; expected the host alone")
    if ":" in text:
        return _ipv6(text)
    if not text:
        raise ValueError("the host is missing")
    if text.replace(".", "").isdigit():
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise ValueError(f"{text!r} is not an IPv4 address") from None
    name = text.lower()
    if len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise ValueError(f"{text!r} is neither a host name nor an IP address")
    return name


def join_address(host: str, port: int) -> str:
    """`host`:`port`, as gRPC, URLs and people write it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str) -> tuple[str, int]:
    """Host and port of host:port; an IPv6 address, which has colons, stands in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        raise ValueError(f"{text!r} has no port; expected host:port, such as 127.0.0.1:7450")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r}: an IPv6 address stands in brackets, such as [::1]:7450")
    if not (port.isascii() and port.isdigit() and 0 < int(port) <= MAX_PORT):
        raise ValueError(f"{text!r}: the port must be from 1 to {MAX_PORT}, got {port!r}")
    return parse_host(host), int(port)


def parse_address(text: str) -> str:
    """host:port in its one usual form."""
    return join_address(*split_address(text))


def is_ip(host: str) -> bool:
    """Whether `host` is an address itself, so that no name server needs to be asked."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anywhere."""
    if host == "localhost":
        return True
    return is_ip(host) and _unmapped(host).is_loopback


def is_wildcard(host: str) -> bool:
    """Whether `host` stands for every address of the machine, of both families."""
    return is_ip(host) and _unmapped(host).is_unspecified


def _ipv6(text: str) -> str:
    try:
        return str(ipaddress.IPv6Address(text.replace("%25", "%")))  # % as URLs write it
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None


def _unmapped(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """::ffff:127.0.0.1 is an IPv4 address that IPv6 sockets take."""
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
