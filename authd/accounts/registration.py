"""Registers users."""

from collections.abc import Callable
from contextlib import suppress

import email_validator
from email_validator import EmailNotValidError, validate_email

from authd.accounts.creation import Creation
from authd.errors import InvalidRequest, RegistrationLimited, Unavailable, UsernameTaken
from authd.infra.subject import bucket_of_user
from authd.login.redis import Throttle
from authd.passwords.formats import check_password
from authd.passwords.hasher import Admission, Hasher
from authd.passwords.weak import WeakPasswords
from authd.users.profile import Profile, make_profile
from authd.users.usernames import USERNAME_CHARS_MAX, address_key

FULL_NAME_CHARS_MAX = 200


# Names such as `localhost` are no mail domains for the world, but they are for a company's own network.
email_validator.SPECIAL_USE_DOMAIN_NAMES.clear()


class Accounts:
    def __init__(
        self, creation: Creation, hasher: Hasher, throttle: Throttle, on_outbox: Callable[[int], None]
    ) -> None:
        """`on_outbox` is called with each lane that got rows, after the commit."""
        self._creation = creation
        self._hasher = hasher
        self._throttle = throttle
        self._weak_passwords = WeakPasswords()
        self._on_outbox = on_outbox

    async def register(self, username: str, password: str, full_name: str, address: str) -> Profile:
        """Add a user; its event is enqueued in the same transaction. `address`: the client's.

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
        user = await self._creation.create(username, key, full_name, password_hash)
        if user is None:
            raise UsernameTaken
        self._on_outbox(bucket_of_user(user.id))
        return make_profile(user.id, user.username, user.full_name, user.created_at)

    async def _hash(self, password: str, address: str) -> str:
        """Return the hash. It counts among the address's registrations whatever happens to it, also for a taken name.
        While Redis is unavailable nothing is counted, and the hasher's own bounds hold.
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

        # The registrations of an address share one line. The leading NUL keeps this name apart from every account key.
        return await self._hasher.hash(password, admit=admit, address=address, account="\0registration")


def _check_username(username: str, key: str | None) -> str | None:
    if len(username) > USERNAME_CHARS_MAX:
        return f"The username must be an e-mail address of at most {USERNAME_CHARS_MAX} characters."
    if key is None:
        return "The username must be an e-mail address."
    try:
        # The key, too: a full-width dot may stand where a dot may not.
        for address in {username, key}:
            validate_email(address, check_deliverability=False, globally_deliverable=False)
    except EmailNotValidError:
        return "The username must be an e-mail address."
    return None


def _check_full_name(full_name: str) -> str | None:
    if len(full_name) > FULL_NAME_CHARS_MAX:
        return f"The full name must have at most {FULL_NAME_CHARS_MAX} characters."
    # JSON brings any character but lone surrogates; Postgres stores any but this one.
    return "The full name must not contain the character NUL." if "\0" in full_name else None
