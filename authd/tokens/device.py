"""Device tokens: that a browser logged in before, so that guesses from elsewhere do not lock its owner out.

A device token is ``d2.`` and base64url of these big-endian fields and their HMAC-SHA-256:

    MAC key id u32 | user id u64 | incarnation u32 | password version u32 | device id 16 bytes | expires u64 ms
    | trusted until u32 s | factors version u32

It is no credential: it opens nothing without the password. The last two are 0: this version has no second factor that
a device could be trusted to leave out. Tokens ``d1.`` of before are read and no longer made: they lack the incarnation
and the last two. Pure: no I/O, the clock is an argument.
"""

import secrets
import time
from datetime import datetime

import msgspec

from authd.infra.clocks import Clock
from authd.infra.subject import Subject
from authd.tokens.mac import MacToken
from authd.tokens.ring import KeyRing

#: Longer than any time a user who still uses the service stays away.
DEVICE_TTL_S = 180 * 86_400
DEVICE_ID_BYTES = 16

_DEVICE_V1 = MacToken("d1.", "QI16sQ")
_DEVICE = MacToken("d2.", "QII16sQII", purpose="device")


class Device(msgspec.Struct, frozen=True):
    """What a device token of ours says, of a user as it was when the token was made. It has not expired. An incarnation
    of 0, which no user has, is that of a token from before there were any.
    """

    subject: Subject
    password_version: int
    id: bytes
    made_ms: int

    def is_of(self, subject: Subject, password_version: int, registered_at: datetime) -> bool:
        """Return whether it is a device of this user, since the password was last changed."""
        if self.password_version != password_version:
            return False
        if self.subject.incarnation:
            return self.subject == subject
        # An id that was given twice: what was made before this user registered is the other one's.
        return self.subject.user_id == subject.user_id and self.made_ms >= registered_at.timestamp() * 1000


class DeviceMint:
    """Makes and proves device tokens with the MAC keys of the key ring."""

    def __init__(self, ring: KeyRing, clock: Clock = time.time) -> None:
        self._ring = ring
        self._clock = clock

    def make(self, subject: Subject, password_version: int, device_id: bytes | None = None) -> str:
        """Return a token that is good for DEVICE_TTL_S from now, of a new device where none is named."""
        now = self._clock()
        key = self._ring.mac_key(now)
        device_id = device_id or secrets.token_bytes(DEVICE_ID_BYTES)
        expires_ms = int((now + DEVICE_TTL_S) * 1000)
        return _DEVICE.make(key.id, key.secret, *subject, password_version, device_id, expires_ms, 0, 0)

    def read(self, text: str) -> Device | None:
        """Return the device of a token of ours; None for anything else, which is then as good as no token."""
        if fields := _DEVICE.read(text, self._find_secret):
            _, user_id, incarnation, password_version, device_id, expires_ms, _, _ = fields
        elif fields := _DEVICE_V1.read(text, self._find_secret):
            _, user_id, password_version, device_id, expires_ms = fields
            incarnation = 0
        else:
            return None
        if expires_ms <= self._clock() * 1000:
            return None
        made_ms = expires_ms - DEVICE_TTL_S * 1000
        return Device(Subject(user_id, incarnation), password_version, device_id, made_ms)

    def _find_secret(self, key_id: int) -> bytes | None:
        key = self._ring.find_mac_key(key_id)
        return None if key is None else key.secret
