"""Whether a password is right: nothing else is told, and no guess is given beyond the limits."""

from contextlib import suppress

import msgspec
import structlog

from authd.accounts import username_key
from authd.config import Settings
from authd.devices import Device, DeviceMint
from authd.errors import InvalidCredentials, LoginLocked, Unavailable
from authd.hasher import Admission, Hasher, Job
from authd.passwords import effort_to_verify, hash_password, needs_rehash, verify_password
from authd.postgres.users import User, Users
from authd.redis.throttle import Locked, Outcome, Reserved, Throttle, Wait

_log = structlog.get_logger()


class Checked(msgspec.Struct, frozen=True):
    """Whose password it was, and a token by which the device is known at its next login."""

    user: User
    device_token: str

    def __repr__(self) -> str:
        return f"Checked({self.user.id})"


class _Guess(msgspec.Struct, frozen=True):
    """One attempt. `user`: who has the username, disabled or not. `device`: one that may be believed."""

    address: str
    account: str
    password: str
    user: User | None
    device: Device | None

    @property
    def user_id(self) -> int:
        return self.user.id if self.user is not None else 0


class PasswordCheck:
    def __init__(
        self, settings: Settings, users: Users, throttle: Throttle, hasher: Hasher, devices: DeviceMint
    ) -> None:
        self._users = users
        self._throttle = throttle
        self._hasher = hasher
        self._devices = devices
        self._cost = settings.bcrypt_cost

    async def check(self, username: str, password: str, address: str, device_token: str = "") -> Checked:
        """The user whose password this is. `username`, `device_token`: any strings; `address`: the client's.

        A device token of this user, since its password was last changed, has the attempt counted under its device
        alone. Any other, and one whose device has failed too often, is ignored.

        :raises InvalidCredentials: the same, after the same work, for an unknown user, a wrong password and a disabled
            user.
        :raises LoginLocked: without a hash.
        :raises Unavailable:
        """
        account = username_key(username)
        claimed = self._devices.read(device_token)
        standing = await self._throttle.look(address, account, claimed.id if claimed is not None else None)
        # A token that proves itself is looked at further, whoever it is of: else the answer's time would tell.
        if standing.locked_s is not None and claimed is None:
            raise LoginLocked(standing.locked_s)
        user = await self._users.find_by_username_key(account)
        device = claimed if standing.device_locked_s is None and _is_of(claimed, user) else None
        if standing.locked_s is not None and device is None:
            raise LoginLocked(standing.locked_s)
        guess = _Guess(address, account, password, user, device)
        found = await self._verify(guess)
        if found is None:
            raise InvalidCredentials
        # An ignored device gets a new id: whoever stole its token does not share a counter with its owner again.
        device_id = device.id if device is not None else None
        return Checked(found, self._devices.make(found.subject, found.password_version, device_id))

    async def _verify(self, guess: _Guess) -> User | None:
        """The user, if the password matches: after exactly one hash, which counts whatever becomes of the request."""
        user, cost, password = guess.user, self._cost, guess.password
        # A disabled user's own hash is computed too: its cost must not tell that it is disabled.
        stored = user.password_hash if user is not None else None
        may_log_in = user is not None and not user.disabled
        attempt: Reserved | None = None
        renewed: str | None = None

        def work() -> bool:
            nonlocal renewed
            matches = verify_password(password, stored, cost) and may_log_in
            if matches and stored is not None and needs_rehash(password, stored, cost):
                renewed = hash_password(password, cost)
            return matches

        async def admit() -> Admission:
            nonlocal attempt
            answer = await self._reserve(guess)
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
                    _log.warning("login_locked", counter=kind, address=guess.address, user_id=guess.user_id or None)
            return bool(matches)

        if not await self._hasher.run_job(
            Job(
                effort=effort_to_verify(stored, cost),
                work=work,
                admit=admit,
                settle=settle,
                account=guess.account,
                is_known=guess.device is not None,
            )
        ):
            return None
        if user is None or renewed is None or stored is None:
            return user
        with suppress(Unavailable):  # the next login renews it
            if await self._users.set_password_hash(user.id, stored, renewed):
                return msgspec.structs.replace(user, password_hash=renewed)
        return user

    async def _reserve(self, guess: _Guess) -> Reserved | Locked | Wait:
        if guess.device is not None:
            answer = await self._throttle.reserve_device(guess.device.id, guess.address, guess.user_id)
            if not isinstance(answer, Locked):
                return answer
        return await self._throttle.reserve(guess.address, guess.account, guess.user_id)


def _is_of(device: Device | None, user: User | None) -> bool:
    return (
        device is not None and user is not None and device.is_of(user.subject, user.password_version, user.created_at)
    )
