"""The form of a username: an e-mail address, and the one key by which users are unique. Pure."""

import re
import unicodedata
from hashlib import blake2b

import idna

from authd.infra.text import fold, holds_newer, is_bounded

#: RFC 5321: the longest path, less its angle brackets. A key has no more bytes, either.
USERNAME_CHARS_MAX = 254


#: RFC 1035. Within a longer label idna's rules look at each digit once for each other digit: 25 ms for 250 of them.
LABEL_CHARS_MAX = 63


#: What Postgres cannot store, or UTF-8 cannot write.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


#: Common letters of Thai and Lao that NFKC writes as two, and that look like the two.
_LETTERS_OF_TWO = frozenset("\u0e33\u0eb3\u0edc\u0edd")


def username_key(username: str) -> str:
    """Make the one form of an e-mail, by which users are unique: the local part case folded, the domain in ASCII.

    Takes any string, for login does. What can be no user's, because it is no such e-mail, is too long or holds too many
    combining marks in a row, has a key that no e-mail has, one for each text, and is not normalised for it.
    """
    text = username.strip()
    return address_key(text) or "\ufffd" + blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def address_key(username: str) -> str | None:
    """Make the key of what has the parts of an e-mail; None where nobody can be registered under that text.

    All texts of one key differ in case, width, normal form, the domain's spelling or the space around it alone. Signs
    that look alike only to NFKC, as the Kelvin sign and K, are two mailboxes to a mail server: who has the one must not
    be found by the other.
    """
    address = username.strip().replace("\uff20", "@")
    if not is_bounded(address, USERNAME_CHARS_MAX) or holds_newer(address) or _NO_TEXT.search(address):
        return None
    local, _, domain = address.rpartition("@")
    # The domain first and as it came: to fold it would make straße.de of strasse.de, which is another's.
    ascii_domain = _ascii_domain(domain)
    if not local or ascii_domain is None or not all(map(_is_plain, local)):
        return None
    key = f"{fold(local, USERNAME_CHARS_MAX)}@{ascii_domain}"
    return key if len(key.encode()) <= USERNAME_CHARS_MAX else None


def _ascii_domain(domain: str) -> str | None:
    """Return the domain as DNS has it, None for what is no domain."""
    try:
        mapped = idna.uts46_remap(domain, std3_rules=False)
        if max(map(len, mapped.split("."))) > LABEL_CHARS_MAX:
            return None
        ascii_domain = idna.encode(mapped).decode("ascii")
        # Older Pythons cannot tell whether such a label is one.
        is_newer = "xn--" in ascii_domain and holds_newer(idna.decode(ascii_domain))
    except UnicodeError:  # IDNAError is one
        return None
    return None if is_newer else ascii_domain


def _is_plain(character: str) -> bool:
    """Return whether NFKC changes no more of the character than its width and how its marks are composed."""
    if character.isascii() or character in _LETTERS_OF_TWO:
        return True
    form = unicodedata.decomposition(character)
    # One code point for another is another sign, such as Kelvin's.
    if form and " " not in form:
        return False
    forms = map(unicodedata.decomposition, unicodedata.normalize("NFD", character))
    return all(not form.startswith("<") or form.startswith(("<wide>", "<narrow>")) for form in forms)
