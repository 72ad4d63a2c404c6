"""Who is calling: the address that counts, and the bearer token."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address

from quart import Request

from authd.config import Network
from authd.errors import MissingToken
from authd.redis.sessions import Client, shorten_user_agent

Address = IPv4Address | IPv6Address

#: Texts whose address is remembered: a client's requests come in numbers.
ADDRESSES_MAX = 4096

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED = r'"(?:[^"\\]|\\.)*"'
_PAIR = re.compile(rf"({_WORD})=({_WORD}|{_QUOTED})")
_NODE = re.compile(r"(?P<v4>[0-9.]+)(?::[0-9]{1,5})?|\[(?P<v6>[0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")


def find_client(request: Request, trusted: Sequence[Network]) -> Client:
    """The socket's peer, or, where that is a trusted proxy, the rightmost hop that is not: never the leftmost, which
    the caller writes itself. Hops are read from `X-Forwarded-For` or from `Forwarded` (RFC 7239). Where a request has
    both and they disagree, the peer counts: a proxy that writes the one hands on what the caller wrote in the other.
    """
    peer = _address(str((request.scope.get("client") or ("",))[0])) or IPv4Address(0)
    found = {peer}
    if trusted and _is_in(peer, trusted):
        headers = request.headers
        chains = []
        if "X-Forwarded-For" in headers:
            chains.append(map(_address, ",".join(headers.getlist("X-Forwarded-For")).split(",")))
        if "Forwarded" in headers:
            chains.append(map(_forwarded_address, _forwarded_hops(",".join(headers.getlist("Forwarded")))))
        found = {_first_untrusted(peer, chain, trusted) for chain in chains} or found
    address = found.pop() if len(found) == 1 else peer
    return Client(str(address), shorten_user_agent(_text(request.headers.get("User-Agent", ""))))


def bearer_token(request: Request) -> str:
    """:raises MissingToken:"""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise MissingToken
    return token.strip()


def _text(value: str) -> str:
    """A header's text: Quart reads its bytes as Latin-1, and who sends more than ASCII sends UTF-8."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _first_untrusted(peer: Address, hops: Iterable[Address | None], trusted: Sequence[Network]) -> Address:
    """The rightmost hop that is no trusted proxy, or the last one before what is no address."""
    for address in reversed(list(hops)):
        if address is None:
            break
        peer = address
        if not _is_in(peer, trusted):
            break
    return peer


def _forwarded_hops(header: str) -> list[str | None]:
    """The `for` of each element; None where it has none. A header that is not well-formed throughout has no hops: a
    quote that the caller opened and never closed would swallow what the proxy added.
    """
    hops: list[str | None] = []
    place = 0
    while True:
        pairs: dict[str, str] = {}
        while found := _PAIR.match(header, _skip_space(header, place)):
            name, value = found[1].lower(), found[2]
            if name in pairs:
                return []
            pairs[name] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value
            place = _skip_space(header, found.end())
            if header[place : place + 1] != ";":
                break
            place += 1
        hops.append(pairs.get("for"))
        place = _skip_space(header, place)
        if place == len(header):
            return hops
        if header[place] != ",":
            return []
        place += 1


def _skip_space(text: str, place: int) -> int:
    while text[place : place + 1] in (" ", "\t"):
        place += 1
    return place


def _forwarded_address(node: str | None) -> Address | None:
    """`unknown` and names that a proxy made up are no addresses; a port is cut off."""
    found = _NODE.fullmatch(node or "")
    return _address(found["v4"] or found["v6"]) if found else None


@lru_cache(ADDRESSES_MAX)
def _address(text: str) -> Address | None:
    try:
        address = ip_address(text.strip().partition("%")[0])
    except ValueError:
        return None
    # ::ffff:192.0.2.1 is the same client as 192.0.2.1.
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
