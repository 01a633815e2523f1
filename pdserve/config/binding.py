"""Where a process may listen: loopback, unless somebody says that the network is safe."""

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`; a name other than localhost may be anywhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_binding(host: str, *, insecure: bool) -> None:
    """Raise `ValueError` for a host that others can reach, unless that was asked for."""
    if not insecure and not is_loopback(host):
        raise ValueError(
            f"host must be a loopback address, got {host!r}: the ports have neither TLS nor login; "
            "where the network around them is closed, say so with insecure: true (--insecure)"
        )


def check_advertised(host: str) -> None:
    """Raise `ValueError` for a host that peers cannot dial: a worker says where it listens."""
    if host in ("0.0.0.0", "::"):
        raise ValueError(f"host is what peers dial: give one address of this machine, not {host!r}")
