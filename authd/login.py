"""Whether a password is right: nothing else is told, and no guess is given beyond the limits."""

from contextlib import suppress

import msgspec
import structlog

from authd.accounts import username_key
from authd.config import Settings
from authd.errors import InvalidCredentials, LoginLocked, Unavailable
from authd.hasher import Admission, Hasher, Job
from authd.passwords import effort_to_verify, hash_password, needs_rehash, verify_password
from authd.postgres.users import User, Users
from authd.redis.throttle import Locked, Outcome, Reserved, Throttle

_log = structlog.get_logger()


class PasswordCheck:
    def __init__(self, settings: Settings, users: Users, throttle: Throttle, hasher: Hasher) -> None:
        self._users = users
        self._throttle = throttle
        self._hasher = hasher
        self._cost = settings.bcrypt_cost

    async def check(self, username: str, password: str, address: str) -> User:
        """The user whose password this is. `username`: any string; `address`: the client's.

        :raises InvalidCredentials: the same, after the same work, for an unknown user, a wrong password and a disabled
            user.
        :raises LoginLocked: without a hash.
        :raises Unavailable:
        """
        account = username_key(username)
        locked_s = await self._throttle.locked_s(address, account)
        if locked_s is not None:
            raise LoginLocked(locked_s)
        found = await self._users.find_by_username_key(account)
        active = found if found is not None and not found.disabled else None
        user = await self._verify(address, account, password, active)
        if user is None:
            raise InvalidCredentials
        return user

    async def _verify(self, address: str, account: str, password: str, user: User | None) -> User | None:
        """The user, if the password matches: after exactly one hash, which counts whatever becomes of the request."""
        stored = user.password_hash if user is not None else None
        cost = self._cost
        attempt: Reserved | None = None
        renewed: str | None = None

        def work() -> bool:
            nonlocal renewed
            matches = verify_password(password, stored, cost)
            if matches and stored is not None and needs_rehash(password, stored, cost):
                renewed = hash_password(password, cost)
            return matches

        async def admit() -> Admission:
            nonlocal attempt
            answer = await self._throttle.reserve(address, account, user.id if user else 0)
            if isinstance(answer, Locked):
                raise LoginLocked(answer.retry_after_s)
            if isinstance(answer, Reserved):
                attempt = answer
                return Admission.HASH
            return Admission.WAIT

        async def settle(matches: bool | None) -> bool:
            if attempt is not None:
                outcome = Outcome.RELEASED if matches is None else Outcome.SUCCEEDED if matches else Outcome.FAILED
                for kind in await self._throttle.settle(attempt, outcome):
                    _log.warning("login_locked", counter=kind, address=address, user_id=user.id if user else None)
            return bool(matches)

        effort = effort_to_verify(stored, cost)
        job = Job(effort=effort, work=work, admit=admit, settle=settle, account=account)
        if not await self._hasher.run_job(job) or user is None:
            return None
        if renewed is None or stored is None:
            return user
        with suppress(Unavailable):  # the next login renews it
            if await self._users.set_password_hash(user.id, stored, renewed):
                return msgspec.structs.replace(user, password_hash=renewed)
        return user
