"""Who sends a request."""

import msgspec

USER_AGENT_BYTES_MAX = 64


class Caller(msgspec.Struct, frozen=True):
    """Who sends a request: an IP address and a user agent of at most USER_AGENT_BYTES_MAX bytes."""

    address: str
    user_agent: str


def shorten_user_agent(text: str) -> str:
    """Return at most USER_AGENT_BYTES_MAX bytes of printable text."""
    printable = text if text.isprintable() else "".join(character for character in text if character.isprintable())
    return printable.encode("utf-8", "replace")[:USER_AGENT_BYTES_MAX].decode("utf-8", "ignore")
