"""Who is calling: the address that counts, and the bearer token."""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

from quart import Request

from authd.config import Network
from authd.errors import MissingToken
from authd.redis.sessions import Client, shorten_user_agent

Address = IPv4Address | IPv6Address


def find_client(request: Request, trusted: Sequence[Network]) -> Client:
    """The socket's peer, or, where that is a trusted proxy, the rightmost hop that is not: never the leftmost, which
    the caller writes itself.
    """
    peer = _address(str((request.scope.get("client") or ("",))[0])) or IPv4Address(0)
    if trusted and _is_in(peer, trusted):
        hops = ",".join(request.headers.getlist("X-Forwarded-For")).split(",")
        for hop in reversed(hops):
            address = _address(hop.strip())
            if address is None:
                break
            peer = address
            if not _is_in(peer, trusted):
                break
    return Client(str(peer), shorten_user_agent(_text(request.headers.get("User-Agent", ""))))


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


def _address(text: str) -> Address | None:
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # ::ffff:192.0.2.1 is the same client as 192.0.2.1.
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
