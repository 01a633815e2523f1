"""Hosts and addresses as people write them: one form inside, and errors that name what is wrong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.domain.addresses import (
    is_ip,
    is_loopback,
    is_wildcard,
    join_address,
    parse_address,
    parse_host,
    split_address,
)


@pytest.mark.parametrize(
    ("written", "host"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("0:0:0:0:0:0:0:1", "::1"),
        ("[2001:DB8::A]", "2001:db8::a"),
        ("::ffff:127.0.0.1", "::ffff:7f00:1"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("[fe80::1%25eth0]", "fe80::1%eth0"),
        ("::", "::"),
        ("LocalHost", "localhost"),
        ("decode-0.pdserve_decode.svc", "decode-0.pdserve_decode.svc"),
        ("host.example.org.", "host.example.org."),
    ],
)
def test_host_has_one_form(written: str, host: str) -> None:
    assert parse_host(written) == host


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("", "the host is missing"),
        ("[::1", "only one of its two brackets"),
        ("::1]", "only one of its two brackets"),
        ("[127.0.0.1]", "not an IPv6 address"),
        ("[localhost]", "not an IPv6 address"),
        ("::1::2", "not an IPv6 address"),
        ("[::g]", "not an IPv6 address"),
        ("fe80::1%", "not an IPv6 address"),
        ("127.0.0.1:7450", "a host with a port"),
        ("300.1.1.1", "not an IPv4 address"),
        ("127.1", "not an IPv4 address"),
        ("a b", "neither a host name nor an IP address"),
        (" ::1", "not an IPv6 address"),
        ("-a", "neither a host name nor an IP address"),
        ("a..b", "neither a host name nor an IP address"),
        ("http", ""),
        ("caf\u00e9", "neither a host name nor an IP address"),
        ("a" * 64, "neither a host name nor an IP address"),
        ("a." * 130, "neither a host name nor an IP address"),
    ],
)
def test_host_that_is_none_is_refused_with_what_is_wrong(written: str, problem: str) -> None:
    if not problem:
        assert parse_host(written) == written
        return
    with pytest.raises(ValueError, match=problem) as caught:
        parse_host(written)
    assert not written or repr(written.strip("[]"))[1:-1] in str(caught.value)


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("127.0.0.1:7450", ("127.0.0.1", 7450)),
        ("[::1]:7450", ("::1", 7450)),
        ("[FE80::1%25eth0]:1", ("fe80::1%eth0", 1)),
        ("Router:65535", ("router", 65535)),
    ],
)
def test_address_is_split_at_the_colon_before_its_port(
    written: str, parts: tuple[str, int]
) -> None:
    assert split_address(written) == parts
    assert parse_address(written) == join_address(*parts)


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("127.0.0.1", "has no port"),
        ("[::1]", "has no port"),
        ("", "has no port"),
        ("::1:7450", "an IPv6 address stands in brackets"),
        ("::1", "an IPv6 address stands in brackets"),
        (":7450", "the host is missing"),
        ("a:", "the port must be from 1 to 65535, got ''"),
        ("a:0", "the port must be from 1 to 65535, got '0'"),
        ("a:65536", "the port must be from 1 to 65535, got '65536'"),
        ("a:7\u0664", "the port must be from 1 to 65535"),
        ("a:-1", "the port must be from 1 to 65535"),
        ("[::1]7450", "in brackets"),
        ("http://a:7450", "in brackets"),
    ],
)
def test_address_that_is_none_is_refused_with_what_is_wrong(written: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        split_address(written)


@given(
    host=st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(str),
    port=st.integers(min_value=1, max_value=65535),
)
def test_what_is_joined_is_split_again(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:7f00:1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "::", "0.0.0.0", "fe80::1%lo", "localhost.evil.org"])
def test_what_others_can_reach_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_wildcards_are_known_in_every_form() -> None:
    forms = ("0.0.0.0", "::", "[::]", "0:0:0:0:0:0:0:0", "[::0]", "::ffff:0.0.0.0")
    assert all(is_wildcard(parse_host(each)) for each in forms)
    assert not any(map(is_wildcard, ("127.0.0.1", "::1", "localhost")))
    assert not is_ip("localhost")
