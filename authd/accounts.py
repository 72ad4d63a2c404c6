"""Who you are: registration, the form of a username, and the profile that a client sees."""

import unicodedata
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

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
from authd.weak_passwords import WeakPasswords

#: RFC 5321: the longest path, less its angle brackets.
USERNAME_CHARS_MAX = 254
FULL_NAME_CHARS_MAX = 200

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
    """The one form of an e-mail, by which users are unique: NFKC, no space around, case folded, the domain in ASCII.

    Takes any string, for login does: what is no e-mail has a key too, and finds nobody.
    """
    folded = _fold(username.replace("\0", "\ufffd"))  # Postgres knows no NUL
    local, at, domain = folded.rpartition("@")
    if not at:
        return folded
    try:
        ascii_domain = idna.encode(domain, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        ascii_domain = domain
    return f"{local}@{ascii_domain}"


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
        complaints = {
            "username": _check_username(username),
            "password": check_password(password) or self._weak_passwords.check(password, username),
            "full_name": _check_full_name(full_name),
        }
        errors = {field: complaint for field, complaint in complaints.items() if complaint}
        if errors:
            raise InvalidRequest(errors)
        # Hashed before the name is looked up: a taken name costs the same as a new one.
        password_hash = await self._hash(password, address)
        user = await self._users.insert(username, username_key(username), full_name, password_hash)
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


def _fold(text: str) -> str:
    # Folding can undo the normal form, and the other way round.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).strip()


def _check_username(username: str) -> str | None:
    if len(username) > USERNAME_CHARS_MAX:
        return f"An e-mail address of at most {USERNAME_CHARS_MAX} characters is needed."
    try:
        validate_email(username, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError:
        return "An e-mail address is needed."
    return None


def _check_full_name(full_name: str) -> str | None:
    if len(full_name) > FULL_NAME_CHARS_MAX:
        return f"At most {FULL_NAME_CHARS_MAX} characters are taken."
    # JSON brings any character but lone surrogates; Postgres stores any but this one.
    return "The character NUL cannot be stored." if "\0" in full_name else None
