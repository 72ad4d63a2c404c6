"""Device tokens: that a browser logged in before, so that guesses from elsewhere do not lock its owner out.

A device token is ``d1.`` and base64url of these big-endian fields and their HMAC-SHA-256:

    MAC key id u32 | user id u64 | password version u32 | device id 16 bytes | expires u64 ms

It is no credential: it opens nothing without the password. The MAC is over ``d1.`` and the fields, so that under the
same keys no refresh token is a device token, nor the other way round. Pure: no I/O, the clock is an argument.
"""

import hmac
import secrets
import struct
import time

import msgspec

from authd.tokens import Clock, KeyRing, decode_base64url, encode_base64url

#: Longer than any time a user who still uses the service stays away.
DEVICE_TTL_S = 180 * 86_400
DEVICE_ID_BYTES = 16

_PREFIX = "d1."
_FIELDS = struct.Struct(">IQI16sQ")
_MAC_BYTES = 32
_CHARS = len(_PREFIX) + -(-(_FIELDS.size + _MAC_BYTES) * 4 // 3)


class Device(msgspec.Struct, frozen=True):
    """What a device token of ours says, of a user as it was when the token was made. It has not expired."""

    user_id: int
    password_version: int
    id: bytes


class DeviceMint:
    """Makes and proves device tokens with the MAC keys of the key ring."""

    def __init__(self, ring: KeyRing, clock: Clock = time.time) -> None:
        self._ring = ring
        self._clock = clock

    def make(self, user_id: int, password_version: int, device_id: bytes | None = None) -> str:
        """A token that is good for DEVICE_TTL_S from now, of a new device where none is named."""
        now = self._clock()
        key = self._ring.mac_key(now)
        device_id = device_id or secrets.token_bytes(DEVICE_ID_BYTES)
        expires_ms = int((now + DEVICE_TTL_S) * 1000)
        fields = _FIELDS.pack(key.id, user_id, password_version, device_id, expires_ms)
        return _PREFIX + encode_base64url(fields + key.mac(_PREFIX, fields))

    def read(self, text: str) -> Device | None:
        """The device of a token of ours; None for anything else, which is then as good as no token."""
        if len(text) != _CHARS or not text.startswith(_PREFIX):
            return None
        raw = decode_base64url(text[len(_PREFIX) :])
        if raw is None:
            return None
        fields, mac = raw[: _FIELDS.size], raw[_FIELDS.size :]
        key_id, user_id, password_version, device_id, expires_ms = _FIELDS.unpack(fields)
        key = self._ring.find_mac_key(key_id)
        if key is None or not hmac.compare_digest(mac, key.mac(_PREFIX, fields)):
            return None
        return Device(user_id, password_version, device_id) if expires_ms > self._clock() * 1000 else None
