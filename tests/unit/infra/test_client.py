"""The address that counts: the socket's peer, or the rightmost hop that no trusted proxy is."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY
from quart import Request
from werkzeug.datastructures import Headers

from authd.errors import MissingToken
from authd.infra.caller import USER_AGENT_BYTES_MAX
from authd.infra.http.address import (
    ADDRESS_CHARS_MAX,
    HOPS_MAX,
    _parse_address,
    bearer_token,
    find_address,
    find_caller,
)

PROXIES = tuple(map(ip_network, ("10.0.0.0/8", "192.0.2.1/32", "fd00::/8")))


def make_request(peer: tuple[str, int] | None, *headers: tuple[str, str]) -> Request:
    async def no_push(*_: object) -> None:
        raise AssertionError

    scope = {"type": "http", "client": peer, "asgi": {}, "headers": []}
    return Request(
        "GET",
        "http",
        "/",
        b"",
        Headers(list(headers)),
        "",
        "1.1",
        scope,
        send_push_promise=no_push,  # type: ignore[arg-type]
    )


def address_of(peer: str, *forwarded: str, proxies=PROXIES) -> str:
    headers = [("X-Forwarded-For", line) for line in forwarded]
    return find_caller(make_request((peer, 4711), *headers), proxies).address


def test_without_trusted_proxies_the_peer_counts_whatever_it_says() -> None:
    assert address_of("10.0.0.1", "203.0.113.9", proxies=()) == "10.0.0.1"


def test_a_peer_that_is_no_proxy_says_nothing() -> None:
    assert address_of("198.51.100.1", "203.0.113.9") == "198.51.100.1"


@pytest.mark.parametrize(
    ("forwarded", "expected"),
    [
        ((), "10.0.0.1"),
        (("203.0.113.9",), "203.0.113.9"),
        (("1.1.1.1, 203.0.113.9",), "203.0.113.9"),
        (("1.1.1.1,203.0.113.9 , 10.9.9.9,192.0.2.1",), "203.0.113.9"),
        (("1.1.1.1", "203.0.113.9", "10.9.9.9"), "203.0.113.9"),
        (("10.1.1.1, 10.2.2.2",), "10.1.1.1"),
        (("2001:db8::7",), "2001:db8::7"),
        (("2001:DB8:0::7, fd00::1",), "2001:db8::7"),
        (("::ffff:203.0.113.9",), "203.0.113.9"),
        (("203.0.113.9, ::ffff:10.2.2.2",), "203.0.113.9"),
        (("fe80::1%eth0",), "fe80::1"),
        # With ports, as Azure's gateways, IIS and AWS's balancers may write them.
        (("203.0.113.9:4711",), "203.0.113.9"),
        (("[2001:db8::7]:443",), "2001:db8::7"),
        (("[2001:db8::7]",), "2001:db8::7"),
        (("[fe80::1%eth0]:443",), "fe80::1"),
        (("[::ffff:203.0.113.9]:443, 10.2.2.2:80",), "203.0.113.9"),
        (("203.0.113.9:1,[fd00::1]:2",), "203.0.113.9"),
    ],
)
def test_the_rightmost_untrusted_hop_counts(forwarded: tuple[str, ...], expected: str) -> None:
    assert address_of("10.0.0.1", *forwarded) == expected


@pytest.mark.parametrize(
    "garbage",
    [
        *("", "unknown", "_hidden", "1.2.3", "'", "٣.1.1.1", "203.0.113.9:", "203.0.113.9:http", "203.0.113.9:123456"),
        *("[2001:db8::1", "2001:db8::1]", "[]", "[]:80", "[203.0.113.9", "[[::1]]", "[2001:db8::1]:", ":80", "[::1]x"),
    ],
)
def test_garbage_ends_the_search_at_the_last_hop_that_was_believed(garbage: str) -> None:
    assert address_of("10.0.0.1", f"203.0.113.9, {garbage}") == "10.0.0.1"
    assert address_of("10.0.0.1", f"203.0.113.9, {garbage}, 10.2.2.2") == "10.2.2.2"
    assert address_of("10.0.0.1", f"{garbage}, 203.0.113.9") == "203.0.113.9"


def test_a_mapped_peer_is_the_proxy_that_it_maps() -> None:
    assert address_of("::ffff:10.0.0.1", "203.0.113.9") == "203.0.113.9"
    assert address_of("::ffff:198.51.100.1", "203.0.113.9") == "198.51.100.1"


def test_a_peer_without_an_address_is_nobody_in_particular() -> None:
    assert find_caller(make_request(None), PROXIES).address == "0.0.0.0"
    assert find_caller(make_request(("", 0)), PROXIES).address == "0.0.0.0"


def test_other_headers_say_nothing() -> None:
    headers = [("Remote-Addr", "1.1.1.1"), ("X-Real-IP", "1.1.1.1"), ("Client-IP", "1.1.1.1")]
    assert find_caller(make_request(("10.0.0.1", 1), *headers), PROXIES).address == "10.0.0.1"


@given(st.lists(st.text(st.characters(blacklist_characters="\r\n"), max_size=40), max_size=4))
def test_any_header_gives_an_address(lines: list[str]) -> None:
    ip_address(address_of("10.0.0.1", *lines))


@given(st.text(st.characters(blacklist_characters="\r\n")))
def test_a_user_agent_is_short_and_printable(text: str) -> None:
    agent = find_caller(make_request(("10.0.0.1", 1), ("User-Agent", text)), ()).user_agent
    assert len(agent.encode()) <= USER_AGENT_BYTES_MAX
    assert agent.isprintable()


def test_a_user_agent_is_kept() -> None:
    request = make_request(("10.0.0.1", 1), ("User-Agent", "authd-app/1.2 (Linux)"))
    assert find_caller(request, ()).user_agent == "authd-app/1.2 (Linux)"
    assert find_caller(make_request(("10.0.0.1", 1)), ()).user_agent == ""


@pytest.mark.parametrize("text", ["Bearer abc", "bearer abc", "BEARER   abc ", "Bearer abc"])
def test_a_bearer_token_is_found(text: str) -> None:
    assert bearer_token(make_request(None, ("Authorization", text))) == "abc"


@pytest.mark.parametrize("text", [None, "", "Bearer", "Bearer  ", "Basic abc", "abc", "Bearerabc"])
def test_no_bearer_token_is_said_so(text: str | None) -> None:
    headers = [] if text is None else [("Authorization", text)]
    with pytest.raises(MissingToken):
        bearer_token(make_request(None, *headers))


# What a stranger's text may cost


def test_only_one_header_is_read() -> None:
    """Or a guesser behind a proxy that writes this one would have a second budget by the other."""
    for forged in ("for=198.51.100.7", "for=unknown", 'for="'):
        headers = [("X-Forwarded-For", "203.0.113.9"), ("Forwarded", forged)]
        assert find_caller(make_request(("10.0.0.1", 1), *headers), PROXIES).address == "203.0.113.9"
        assert find_caller(make_request(("10.0.0.1", 1), ("Forwarded", forged)), PROXIES).address == "10.0.0.1"


def test_text_that_is_too_long_for_an_address_is_not_kept() -> None:
    before = _parse_address.cache_info().currsize
    for number in range(10):
        junk = f"{number}".rjust(ADDRESS_CHARS_MAX + 1, "1")
        assert address_of("10.0.0.1", junk) == "10.0.0.1"
        assert address_of("10.0.0.1", f"2001:db8::7%{junk}") == "10.0.0.1"
    assert _parse_address.cache_info().currsize <= before + 1  # the peer


def test_hops_are_looked_at_up_to_a_number() -> None:
    looked_at = _parse_address.cache_info
    hops = ["203.0.113.9", *(f"10.1.{number // 256}.{number % 256}" for number in range(1000))]
    before = looked_at().misses
    assert address_of("10.0.0.1", ",".join(hops)) == f"10.1.{(1000 - HOPS_MAX) // 256}.{(1000 - HOPS_MAX) % 256}"
    assert looked_at().misses - before <= HOPS_MAX + 1


@pytest.mark.parametrize(
    ("forwarded", "counted"),
    [(None, 0), ("203.0.113.9", 0), ("10.2.2.2", 0), ("junk, 203.0.113.9", 0), ("203.0.113.9, unknown", 1), ("", 1)],
)
def test_a_proxy_that_names_no_usable_hop_is_counted_once_a_request(forwarded: str | None, counted: int) -> None:
    def count() -> float:
        return REGISTRY.get_sample_value("authd_forwarded_unusable_total") or 0

    before = count()
    request = make_request(("10.0.0.1", 1), *([] if forwarded is None else [("X-Forwarded-For", forwarded)]))
    for _ in range(2):
        find_caller(request, PROXIES)
        find_address(request, PROXIES)
    assert count() - before == counted
