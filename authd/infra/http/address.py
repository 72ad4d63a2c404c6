"""Who is calling: the address that counts, and the bearer token."""

import re
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, cast

from quart import Request

from authd.config import Network
from authd.errors import MissingToken
from authd.infra.caller import Caller, shorten_user_agent
from authd.infra.observe import metrics

Address = IPv4Address | IPv6Address

#: Texts whose address is remembered: a client's requests come in numbers.
ADDRESSES_MAX = 4096
#: No address with brackets, zone and port is longer: the texts above are an attacker's.
ADDRESS_CHARS_MAX = 64
#: Hops that are checked, from the right.
HOPS_MAX = 32
#: What of a User-Agent is read; far less is kept.
USER_AGENT_CHARS_MAX = 1024

_WITH_PORT = re.compile(r"(?P<v4>[0-9.]+):[0-9]{1,5}|\[(?P<v6>[^\]]+)\](?::[0-9]{1,5})?")


def find_caller(request: Request, trusted: Sequence[Network]) -> Caller:
    """Return the caller's address (see `find_address`) and user agent."""
    user_agent = request.headers.get("User-Agent", "")[:USER_AGENT_CHARS_MAX]
    return Caller(find_address(request, trusted), shorten_user_agent(_text(user_agent)))


def find_address(request: Request, trusted: Sequence[Network]) -> str:
    """Return the socket's peer, or, where that is a trusted proxy, the rightmost hop of `X-Forwarded-For` that is not:
    never the leftmost, which the caller writes itself. No other header is read: a proxy that writes this one hands on
    what the caller wrote in the others.
    """
    scope = cast(dict[str, Any], request.scope)
    found: str | None = scope.get("authd.address")
    if found is None:
        # Kept: the line in the log needs it once more, and it is counted once.
        found = scope["authd.address"] = str(_find_address(request, trusted))
    return found


def bearer_token(request: Request) -> str:
    """Return the token of the request.

    :raises MissingToken:
    """
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise MissingToken
    return token.strip()


def _text(value: str) -> str:
    """Return a header's text: Quart reads its bytes as Latin-1, and who sends more than ASCII sends UTF-8."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _find_address(request: Request, trusted: Sequence[Network]) -> Address:
    found = _read_address(str((request.scope.get("client") or ("",))[0])) or IPv4Address(0)
    if not trusted or not _is_in(found, trusted):
        return found
    lines = request.headers.getlist("X-Forwarded-For")
    for text in reversed(",".join(lines).rsplit(",", HOPS_MAX)[-HOPS_MAX:] if lines else []):
        address = _read_address(text.strip())
        if address is None:
            metrics.forwarded_unusable.inc()
            break
        found = address
        if not _is_in(found, trusted):
            break
    return found


def _read_address(text: str) -> Address | None:
    """With or without a port, which some balancers write; IPv6 with or without brackets."""
    return _parse_address(text) if len(text) <= ADDRESS_CHARS_MAX else None


@lru_cache(ADDRESSES_MAX)
def _parse_address(text: str) -> Address | None:
    found = _WITH_PORT.fullmatch(text)
    try:
        address = ip_address((found["v4"] or found["v6"] if found else text).partition("%")[0])
    except ValueError:
        return None
    # ::ffff:192.0.2.1 is the same client as 192.0.2.1.
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)
