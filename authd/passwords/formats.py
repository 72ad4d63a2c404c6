"""Password rules and hash formats. Pure; the functions that say so take long, and belong on the Hasher's threads.

authd makes plain bcrypt only of ASCII passwords below 72 bytes, and passlib's bcrypt-sha256 of all others. So a longer
or non-ASCII password that meets a plain hash meets one of the service that authd replaces, which hashed the text as it
came, cut at 72 bytes: both kinds are verified exactly, by one bcrypt each, and authd itself cuts nothing.
"""

import base64
import hmac
import re
from typing import Literal, NamedTuple

import bcrypt

from authd.infra.text import MARKS_MAX, normalise

#: Characters (code points) after normalisation: NIST SP 800-63B counts these.
PASSWORD_CHARS_MIN = 8
#: Bytes of UTF-8 after normalisation.
PASSWORD_BYTES_MAX = 1024
#: Code points before normalisation. No text above it comes to at most PASSWORD_BYTES_MAX: three code points compose
#: into two bytes at best.
PASSWORD_INPUT_CHARS_MAX = 2 * PASSWORD_BYTES_MAX
#: bcrypt reads no more of its key.
BCRYPT_BYTES_MAX = 72
#: log2 of rounds. A stored hash beyond these is not computed: one imported row of cost 31 would hold a thread for days.
COST_MIN = 4
COST_MAX = 18

Scheme = Literal["bcrypt", "bcrypt-sha256"]

# The last character of a salt carries two bits.
_SALT = r"(?P<salt>[./A-Za-z0-9]{21}[.Oeu])"
_DIGEST = r"(?P<digest>[./A-Za-z0-9]{31})"
_FORMATS: dict[Scheme, re.Pattern[str]] = {
    "bcrypt": re.compile(rf"\$2[aby]\$(?P<cost>[0-9]{{2}})\${_SALT}{_DIGEST}"),
    "bcrypt-sha256": re.compile(rf"\$bcrypt-sha256\$v=2,t=2b,r=(?P<cost>[0-9]{{1,2}})\${_SALT}\${_DIGEST}"),
}
_DUMMY_SALT = "." * 22


class Effort(NamedTuple):
    """What the time of a hash depends on. `cost` is log2 of rounds."""

    scheme: Scheme
    cost: int


class _Stored(NamedTuple):
    effort: Effort
    salt: str
    digest: str | None


def check_password(password: str) -> str | None:
    """Return the broken rule as a sentence, or None for a password that can be set."""
    if _utf8(password) is None:
        return "The password must be valid Unicode without NUL characters."
    if len(password) <= PASSWORD_INPUT_CHARS_MAX:
        normal = normalise(password, PASSWORD_INPUT_CHARS_MAX)
        if normal is None:
            return f"The password must have at most {MARKS_MAX} combining marks in a row."
        if len(normal) < PASSWORD_CHARS_MIN:
            return f"The password must have at least {PASSWORD_CHARS_MIN} characters."
        if len(normal.encode()) <= PASSWORD_BYTES_MAX:
            return None
    return f"The password must have at most {PASSWORD_BYTES_MAX} bytes in UTF-8."


def hash_password(password: str, cost: int) -> str:
    """Return a new hash of the password, whole and NFKC-normalised. Takes long: only on a hashing thread.

    :raises ValueError: for text that `check_password` calls invalid or too long.
    """
    effort = effort_to_hash(password, cost)
    key = _key(effort.scheme, password)
    if key is None:
        raise ValueError("this password cannot be hashed")
    salt = bcrypt.gensalt(cost).decode()[-22:]
    digest = _bcrypt(effort, salt, key)
    if effort.scheme == "bcrypt":
        return f"$2b${cost:02d}${salt}{digest}"
    return f"$bcrypt-sha256$v=2,t=2b,r={cost}${salt}${digest}"


def verify_password(password: str, stored: str | None, cost: int) -> bool:
    """Return whether the stored hash is of this password. Takes long: only on a hashing thread. Raises nothing.

    Always one bcrypt: of the stored hash's cost, or of `cost` where there is no user, the hash is not usable, or its
    cost is out of bounds. Whoever measures the time learns nothing from a password that could never match either.
    """
    found = _parse(stored, cost)
    key = _key(found.effort.scheme, password)
    digest = _bcrypt(found.effort, found.salt, key or b"")
    return key is not None and found.digest is not None and hmac.compare_digest(digest, found.digest)


def needs_rehash(password: str, stored: str, cost: int) -> bool:
    """Return whether a password that just matched should be hashed anew, for its cost or its format."""
    found = _parse(stored, cost)
    if found.effort.scheme == "bcrypt" and len(_utf8(password) or b"") >= BCRYPT_BYTES_MAX:
        # Only its first 72 bytes were compared. To keep the rest as typed now could lock the owner out.
        return False
    is_current = found.effort == effort_to_hash(password, cost)
    return found.digest is not None and not is_current and _normalised(password) is not None


def effort_to_verify(stored: str | None, cost: int) -> Effort:
    return _parse(stored, cost).effort


def effort_to_hash(password: str, cost: int) -> Effort:
    return Effort(_scheme_for(password), cost)


def _scheme_for(password: str) -> Scheme:
    return "bcrypt" if password.isascii() and len(password) < BCRYPT_BYTES_MAX else "bcrypt-sha256"


def _parse(stored: str | None, cost: int) -> _Stored:
    for scheme, pattern in _FORMATS.items():
        found = pattern.fullmatch(stored or "")
        if found and COST_MIN <= int(found["cost"]) <= COST_MAX:
            return _Stored(Effort(scheme, int(found["cost"])), found["salt"], found["digest"])
    return _Stored(Effort("bcrypt", cost), _DUMMY_SALT, None)


def _key(scheme: Scheme, password: str) -> bytes | None:
    """Return what the scheme hashes, or None for a password that no hash can be of."""
    if scheme == "bcrypt-sha256":
        return _normalised(password)
    raw = _utf8(password)
    return raw[:BCRYPT_BYTES_MAX] if raw is not None and len(raw) <= PASSWORD_BYTES_MAX else None


def _bcrypt(effort: Effort, salt: str, key: bytes) -> str:
    """Return the 31 characters of the digest. `2a`, `2b` and `2y` are one algorithm in today's libraries."""
    if effort.scheme == "bcrypt-sha256":
        key = base64.b64encode(hmac.digest(salt.encode(), key, "sha256"))
    return bcrypt.hashpw(key, f"$2b${effort.cost:02d}${salt}".encode()).decode()[-31:]


def _normalised(password: str) -> bytes | None:
    if _utf8(password) is None:
        return None
    normal = normalise(password, PASSWORD_INPUT_CHARS_MAX)
    if normal is None:
        return None
    key = normal.encode()
    return key if len(key) <= PASSWORD_BYTES_MAX else None


def _utf8(password: str) -> bytes | None:
    """Return the bytes, None for lone surrogates, which JSON can carry, and for NUL, where other bcrypts stop
    reading.
    """
    try:
        raw = password.encode()
    except UnicodeEncodeError:
        return None
    return None if b"\0" in raw else raw
