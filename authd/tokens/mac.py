"""Tokens that no other service reads: fields of fixed size under a MAC. Pure: no I/O."""

import hashlib
import hmac
import struct
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from authd.infra.encoding import decode_base64url, encode_base64url

MAC_BYTES = hashlib.sha256().digest_size


class MacToken:
    """One kind of token: a prefix, then base64url of its big-endian fields and their HMAC-SHA-256. The first field of
    every kind is the id of its MAC key, u32. Equal fields give equal texts, and there is one text for each token.
    """

    def __init__(self, prefix: str, layout: str, *, purpose: str = "") -> None:
        """`layout`: the fields after the key's id, in the notation of `struct`. Their bytes and those of the MAC fill
        base64url without padding.

        `purpose` derives a key for this kind alone (HKDF, RFC 5869, of which a random key needs only the second step),
        so that no MAC of another kind proves it. Without one the MAC key itself is used, as by the kinds that are older
        than this rule.
        """
        self._prefix = prefix
        self._fields = struct.Struct(f">I{layout}")
        bytes_count = self._fields.size + MAC_BYTES
        if bytes_count % 3:
            raise ValueError(f"{prefix} would have padding")
        self._chars = len(prefix) + bytes_count // 3 * 4
        self._info = f"authd token {purpose}".encode() if purpose else b""

    def make(self, key_id: int, secret: bytes, *fields: Any) -> str:
        """Return the text of a token. `secret`: that of the MAC key `key_id`."""
        packed = self._fields.pack(key_id, *fields)
        return self._prefix + encode_base64url(packed + self._mac(secret, packed))

    def read(self, text: str, find_secret: Callable[[int], bytes | None]) -> tuple[Any, ...] | None:
        """Return the fields, the key's id first, or None for anything that was not made by `make` with a secret that
        `find_secret` has for the id. Any text may come.
        """
        if len(text) != self._chars or not text.startswith(self._prefix):
            return None
        raw = decode_base64url(text[len(self._prefix) :])
        if raw is None:
            return None
        packed, mac = raw[: self._fields.size], raw[self._fields.size :]
        fields = self._fields.unpack(packed)
        secret = find_secret(fields[0])
        if secret is None or not hmac.compare_digest(mac, self._mac(secret, packed)):
            return None
        return fields

    def _mac(self, secret: bytes, packed: bytes) -> bytes:
        if self._info:
            secret = HKDFExpand(SHA256(), MAC_BYTES, self._info).derive(secret)
        return hmac.digest(secret, self._prefix.encode() + packed, "sha256")
