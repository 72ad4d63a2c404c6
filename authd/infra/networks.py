"""Names the networks of a client's address: what one subscriber has, and what one organisation can easily get. Pure."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

#: An IPv6 subscriber has at least this network, and all its addresses to send from.
IPV6_PREFIX_BITS = 64
#: What a site gets, or a small provider: whoever has one of its subnetworks can often use the others, too.
WIDE_PREFIX_BITS = {4: 24, 6: 48}


def network_of(address: str) -> str:
    """Return what one client has: an IPv4 address, or an IPv6 network. Any other text is a network of its own."""
    parsed = _parse(address)
    if parsed is None:
        return address
    return _network(parsed, IPV6_PREFIX_BITS) if parsed.version == 6 else str(parsed)


def networks_of(address: str) -> tuple[str, str]:
    """Return the site's network (IPv4: /24, IPv6: /48), then `network_of`."""
    parsed = _parse(address)
    narrow = network_of(address)
    return (narrow if parsed is None else _network(parsed, WIDE_PREFIX_BITS[parsed.version])), narrow


def _parse(address: str) -> IPv4Address | IPv6Address | None:
    try:
        parsed = ip_address(address)
    except ValueError:
        return None
    # A socket for both families names its IPv4 peers like this: they are the same client.
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed


def _network(parsed: IPv4Address | IPv6Address, prefix_bits: int) -> str:
    return str(ip_network((int(parsed), prefix_bits), strict=False))
