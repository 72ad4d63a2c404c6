"""Base64url without padding (RFC 4648, section 5), with one text for each sequence of bytes."""

from base64 import urlsafe_b64decode, urlsafe_b64encode


def encode_base64url(raw: bytes) -> str:
    return urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def decode_base64url(text: str) -> bytes | None:
    """Return the bytes, or None where the text is not the one canonical encoding: two texts of one token would be two
    tokens to every cache and log.
    """
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError:
        return None
    return raw if encode_base64url(raw) == text else None
