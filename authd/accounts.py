"""Who you are: registration, the form of a username, and the profile that a client sees."""

import re
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from hashlib import blake2b

import email_validator
import idna
import msgspec
from email_validator import EmailNotValidError, validate_email

from authd.config import BUCKETS
from authd.errors import InvalidRequest, RegistrationLimited, Unavailable, UsernameTaken
from authd.hasher import Admission, Hasher
from authd.passwords import check_password
from authd.postgres.users import User, Users
from authd.redis.throttle import Throttle
from authd.text import fold, holds_newer, is_bounded
from authd.weak_passwords import WeakPasswords

#: RFC 5321: the longest path, less its angle brackets. A key has no more bytes, either.
USERNAME_CHARS_MAX = 254
FULL_NAME_CHARS_MAX = 200
#: RFC 1035. Within a longer label idna's rules look at each digit once for each other digit: 25 ms for 250 of them.
LABEL_CHARS_MAX = 63

#: What Postgres cannot store, or UTF-8 cannot write.
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
#: Common letters of Thai and Lao that NFKC writes as two, and that look like the two.
_LETTERS_OF_TWO = frozenset("\u0e33\u0eb3\u0edc\u0edd")

# Names such as `localhost` are no mail domains for the world, but they are for a company's own network.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sees of a user. `created_at`: ISO 8601 with offset."""

    user_id: int
    username: str
    full_name: str
    created_at: str


def make_profile(user_id: int, username: str, full_name: str, created_at: datetime) -> Profile:
    return Profile(user_id=user_id, username=username, full_name=full_name, created_at=created_at.isoformat())


def profile_of(user: User) -> Profile:
    return make_profile(user.id, user.username, user.full_name, user.created_at)


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


class Accounts:
    def __init__(self, users: Users, hasher: Hasher, throttle: Throttle, on_outbox: Callable[[int], None]) -> None:
        """`on_outbox` is called with each lane that got rows, after the commit."""
        self._users = users
        self._hasher = hasher
        self._throttle = throttle
        self._weak_passwords = WeakPasswords()
        self._on_outbox = on_outbox

    async def register(self, username: str, password: str, full_name: str, address: str) -> Profile:
        """Add a user; its event is promised in the same transaction. `address`: the client's.

        :raises InvalidRequest: naming each unusable field.
        :raises UsernameTaken: also for another spelling of a registered e-mail.
        :raises RegistrationLimited: without a hash.
        :raises Unavailable:
        """
        username = username.strip()
        key = address_key(username)
        username_complaint = _check_username(username, key)
        # In a refused username there is no name to look for: it may be of any length.
        name_in = "" if username_complaint else username
        complaints = {
            "username": username_complaint,
            "password": check_password(password) or self._weak_passwords.check(password, name_in),
            "full_name": _check_full_name(full_name),
        }
        errors = {field: complaint for field, complaint in complaints.items() if complaint}
        if errors or key is None:
            raise InvalidRequest(errors)
        # Hashed before the name is looked up: a taken name costs the same as a new one.
        password_hash = await self._hash(password, address)
        user = await self._users.insert(username, key, full_name, password_hash)
        if user is None:
            raise UsernameTaken
        self._on_outbox(user.id % BUCKETS)
        return make_profile(user.id, user.username, user.full_name, user.created_at)

    async def _hash(self, password: str, address: str) -> str:
        """The hash, which counts among the address's registrations whatever becomes of it: names that are taken, too.
        While Redis is away nothing is counted, and the hasher's own bounds hold.
        """
        with suppress(Unavailable):
            locked_s = await self._throttle.registrations_locked_s(address)
            if locked_s is not None:
                raise RegistrationLimited(locked_s)

        async def admit() -> Admission:
            with suppress(Unavailable):
                locked = await self._throttle.count_registration(address)
                if locked is not None:
                    raise RegistrationLimited(locked.retry_after_s)
            return Admission.HASH

        # The registrations of an address share one line. The NUL keeps its name apart from every account's.
        return await self._hasher.hash(password, admit=admit, address=address, account="\0registration")


def _ascii_domain(domain: str) -> str | None:
    """The domain as DNS has it, or None for what is no domain."""
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
    """Whether NFKC changes no more of the character than its width and how its marks are composed."""
    if character.isascii() or character in _LETTERS_OF_TWO:
        return True
    form = unicodedata.decomposition(character)
    # One code point for another is another sign, such as Kelvin's.
    if form and " " not in form:
        return False
    forms = map(unicodedata.decomposition, unicodedata.normalize("NFD", character))
    return all(not form.startswith("<") or form.startswith(("<wide>", "<narrow>")) for form in forms)


def _check_username(username: str, key: str | None) -> str | None:
    if len(username) > USERNAME_CHARS_MAX:
        return f"An e-mail address of at most {USERNAME_CHARS_MAX} characters is needed."
    if key is None:
        return "An e-mail address is needed."
    try:
        # The key, too: a full-width dot may stand where a dot may not.
        for address in {username, key}:
            validate_email(address, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError:
        return "An e-mail address is needed."
    return None


def _check_full_name(full_name: str) -> str | None:
    if len(full_name) > FULL_NAME_CHARS_MAX:
        return f"At most {FULL_NAME_CHARS_MAX} characters are taken."
    # JSON brings any character but lone surrogates; Postgres stores any but this one.
    return "The character NUL cannot be stored." if "\0" in full_name else None
