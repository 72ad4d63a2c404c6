"""The address that counts: the socket's peer, or the rightmost hop that no trusted proxy is."""

from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quart import Request
from werkzeug.datastructures import Headers

from authd.errors import MissingToken
from authd.http.client import bearer_token, find_client
from authd.redis.sessions import USER_AGENT_BYTES_MAX

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
    return find_client(make_request((peer, 4711), *headers), proxies).address


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
    ],
)
def test_the_rightmost_untrusted_hop_counts(forwarded: tuple[str, ...], expected: str) -> None:
    assert address_of("10.0.0.1", *forwarded) == expected


@pytest.mark.parametrize(
    "garbage", ["", "unknown", "_hidden", "203.0.113.9:80", "[2001:db8::1]", "1.2.3", "'", "٣.1.1.1"]
)
def test_garbage_ends_the_search_at_the_last_hop_that_was_believed(garbage: str) -> None:
    assert address_of("10.0.0.1", f"203.0.113.9, {garbage}") == "10.0.0.1"
    assert address_of("10.0.0.1", f"203.0.113.9, {garbage}, 10.2.2.2") == "10.2.2.2"
    assert address_of("10.0.0.1", f"{garbage}, 203.0.113.9") == "203.0.113.9"


def test_a_mapped_peer_is_the_proxy_that_it_maps() -> None:
    assert address_of("::ffff:10.0.0.1", "203.0.113.9") == "203.0.113.9"
    assert address_of("::ffff:198.51.100.1", "203.0.113.9") == "198.51.100.1"


def test_a_peer_without_an_address_is_nobody_in_particular() -> None:
    assert find_client(make_request(None), PROXIES).address == "0.0.0.0"
    assert find_client(make_request(("", 0)), PROXIES).address == "0.0.0.0"


def test_other_headers_say_nothing() -> None:
    headers = [("Remote-Addr", "1.1.1.1"), ("X-Real-IP", "1.1.1.1"), ("Client-IP", "1.1.1.1")]
    assert find_client(make_request(("10.0.0.1", 1), *headers), PROXIES).address == "10.0.0.1"


@given(st.lists(st.text(st.characters(blacklist_characters="\r\n"), max_size=40), max_size=4))
def test_any_header_gives_an_address(lines: list[str]) -> None:
    ip_address(address_of("10.0.0.1", *lines))


@given(st.text(st.characters(blacklist_characters="\r\n")))
def test_a_user_agent_is_short_and_printable(text: str) -> None:
    agent = find_client(make_request(("10.0.0.1", 1), ("User-Agent", text)), ()).user_agent
    assert len(agent.encode()) <= USER_AGENT_BYTES_MAX
    assert agent.isprintable()


def test_a_user_agent_is_kept() -> None:
    request = make_request(("10.0.0.1", 1), ("User-Agent", "authd-app/1.2 (Linux)"))
    assert find_client(request, ()).user_agent == "authd-app/1.2 (Linux)"
    assert find_client(make_request(("10.0.0.1", 1)), ()).user_agent == ""


@pytest.mark.parametrize("text", ["Bearer abc", "bearer abc", "BEARER   abc ", "Bearer abc"])
def test_a_bearer_token_is_found(text: str) -> None:
    assert bearer_token(make_request(None, ("Authorization", text))) == "abc"


@pytest.mark.parametrize("text", [None, "", "Bearer", "Bearer  ", "Basic abc", "abc", "Bearerabc"])
def test_no_bearer_token_is_said_so(text: str | None) -> None:
    headers = [] if text is None else [("Authorization", text)]
    with pytest.raises(MissingToken):
        bearer_token(make_request(None, *headers))


# Forwarded (RFC 7239)


def address_by(*headers: tuple[str, str], peer: str = "10.0.0.1") -> str:
    return find_client(make_request((peer, 4711), *headers), PROXIES).address


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("for=203.0.113.9",), "203.0.113.9"),
        (("For=203.0.113.9;proto=https;by=10.0.0.1",), "203.0.113.9"),
        (('proto=http; for="203.0.113.9:4711" ;host=example.org',), "203.0.113.9"),
        (('for="[2001:db8:cafe::17]:4711"',), "2001:db8:cafe::17"),
        (('for="[2001:db8::7]"',), "2001:db8::7"),
        (('for="[::ffff:203.0.113.9]"',), "203.0.113.9"),
        (("for=1.1.1.1, for=203.0.113.9, for=10.9.9.9",), "203.0.113.9"),
        (("for=1.1.1.1", "for=203.0.113.9 , for=192.0.2.1"), "203.0.113.9"),
        (('for="20\\3.0.113.9"',), "203.0.113.9"),
        (("for=10.2.2.2",), "10.2.2.2"),
        # No address: the last hop that was believed.
        (("for=203.0.113.9, for=unknown",), "10.0.0.1"),
        (("for=203.0.113.9, for=_hidden, for=10.2.2.2",), "10.2.2.2"),
        (("for=203.0.113.9, proto=https",), "10.0.0.1"),
        (("",), "10.0.0.1"),
        (("for=203.0.113.9,",), "10.0.0.1"),
    ],
)
def test_the_rightmost_untrusted_hop_of_forwarded_counts(lines: tuple[str, ...], expected: str) -> None:
    assert address_by(*[("Forwarded", line) for line in lines]) == expected


@pytest.mark.parametrize(
    "written",
    [
        # By the caller, before the proxy adds its own element.
        'for=1.1.1.1;x="',
        'for="1.1.1.1',
        'for="1.1.1.1\\',
        "for=1.1.1.1 for=2.2.2.2",
        "for=1.1.1.1;for=2.2.2.2",
        "for",
        "for==",
    ],
)
def test_what_the_caller_wrote_cannot_swallow_what_the_proxy_adds(written: str) -> None:
    for added in ("for=203.0.113.9", 'for="[2001:db8::7]:80"', 'for="203.0.113.9:80"'):
        assert address_by(("Forwarded", f"{written}, {added}")) == "10.0.0.1"
        assert address_by(("Forwarded", written), ("Forwarded", added)) == "10.0.0.1"


def test_headers_that_disagree_are_not_believed_and_one_that_is_alone_is() -> None:
    both = [("X-Forwarded-For", "1.1.1.1, 203.0.113.9"), ("Forwarded", "for=203.0.113.9;proto=https")]
    assert address_by(*both) == address_by(*reversed(both)) == "203.0.113.9"
    # Either may be the caller's: a proxy that writes the one hands the other on.
    assert address_by(("X-Forwarded-For", "1.1.1.1"), ("Forwarded", "for=203.0.113.9")) == "10.0.0.1"
    assert address_by(("X-Forwarded-For", "203.0.113.9"), ("Forwarded", "for=1.1.1.1")) == "10.0.0.1"
    assert address_by(("X-Forwarded-For", "203.0.113.9"), ("Forwarded", "junk")) == "10.0.0.1"


def test_forwarded_of_no_trusted_proxy_says_nothing() -> None:
    assert address_by(("Forwarded", "for=1.1.1.1"), peer="198.51.100.1") == "198.51.100.1"
    assert find_client(make_request(("10.0.0.1", 1), ("Forwarded", "for=1.1.1.1")), ()).address == "10.0.0.1"


@given(st.lists(st.text('for=1.2,;"\\ []:x', max_size=60), max_size=3))
def test_any_forwarded_gives_an_address(lines: list[str]) -> None:
    ip_address(address_by(*[("Forwarded", line) for line in lines]))
