"""Verifies a password within the throttle's limits."""

from contextlib import suppress

import msgspec
import structlog

from authd.errors import InvalidCredentials, LoginLocked, Unavailable
from authd.login.redis import Locked, Outcome, Reserved, Throttle, Wait
from authd.passwords.formats import effort_to_verify, hash_password, needs_rehash, verify_password
from authd.passwords.hasher import Admission, Hasher, Job
from authd.tokens.device import Device, DeviceMint
from authd.users.postgres import User, Users
from authd.users.usernames import username_key

_log = structlog.get_logger()


class Verified(msgspec.Struct, frozen=True):
    """Whose password it was, and a token by which the device is known at its next login."""

    user: User
    device_token: str

    def __repr__(self) -> str:
        return f"Verified({self.user.id})"


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
    def __init__(self, bcrypt_cost: int, users: Users, throttle: Throttle, hasher: Hasher, devices: DeviceMint) -> None:
        self._users = users
        self._throttle = throttle
        self._hasher = hasher
        self._devices = devices
        self._cost = bcrypt_cost

    async def verify(self, username: str, password: str, address: str, device_token: str = "") -> Verified:
        """Return the user whose password this is. `username`, `device_token`: any strings; `address`: the client's.

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
        # A token that proves itself is checked further, whoever it is of: otherwise the answer's time would tell.
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
        return Verified(found, self._devices.make(found.subject, found.password_version, device_id))

    async def _verify(self, guess: _Guess) -> User | None:
        """Return the user if the password matches, after exactly one hash, which counts in any case."""
        attempt = _Attempt(guess, self._throttle, self._cost)
        if not await self._hasher.run_job(attempt.job()):
            return None
        user, renewed = guess.user, attempt.renewed
        if user is None or renewed is None:
            return user
        with suppress(Unavailable):  # the next login renews it
            if await self._users.set_password_hash(user.id, user.password_hash, renewed):
                return msgspec.structs.replace(user, password_hash=renewed)
        return user


class _Attempt:
    """A guess on its way through the Hasher: reserved, then hashed, then settled."""

    def __init__(self, guess: _Guess, throttle: Throttle, cost: int) -> None:
        self._guess = guess
        self._throttle = throttle
        self._cost = cost
        # A disabled user's own hash is computed too: its cost must not tell that it is disabled.
        self._stored = guess.user.password_hash if guess.user is not None else None
        #: From `_admit` on: what has to be settled.
        self._reserved: Reserved | None = None
        #: From `_work` on: a new hash of a password that matched a stored one of another form.
        self.renewed: str | None = None

    def job(self) -> Job[bool, bool]:
        """Return the job, to be run once; its result is whether the password matches, and of one who may log in."""
        return Job(
            effort=effort_to_verify(self._stored, self._cost),
            admit=self._admit,
            work=self._work,
            settle=self._settle,
            address=self._guess.address,
            account=self._guess.account,
            is_known=self._guess.device is not None,
        )

    async def _admit(self) -> Admission:
        answer = await self._reserve()
        if isinstance(answer, Locked):
            raise LoginLocked(answer.retry_after_s)
        if isinstance(answer, Wait):
            return Admission.WAIT
        self._reserved = answer
        return Admission.HASH

    async def _reserve(self) -> Reserved | Locked | Wait:
        guess = self._guess
        if guess.device is not None:
            answer = await self._throttle.reserve_device(guess.device.id, guess.address, guess.user_id)
            if not isinstance(answer, Locked):
                return answer
        return await self._throttle.reserve(guess.address, guess.account, guess.user_id)

    def _work(self) -> bool:
        """Runs on a hashing thread."""
        user, password, stored, cost = self._guess.user, self._guess.password, self._stored, self._cost
        may_log_in = user is not None and not user.disabled
        matches = verify_password(password, stored, cost) and may_log_in
        if matches and stored is not None and needs_rehash(password, stored, cost):
            self.renewed = hash_password(password, cost)
        return matches

    async def _settle(self, matches: bool | None) -> bool:
        if self._reserved is not None:
            outcome = Outcome.RELEASED if matches is None else Outcome.SUCCEEDED if matches else Outcome.FAILED
            for kind in await self._throttle.settle(self._reserved, outcome):
                user_id = self._guess.user_id or None
                _log.warning("login_locked", counter=kind, address=self._guess.address, user_id=user_id)
        return bool(matches)


def _is_of(device: Device | None, user: User | None) -> bool:
    return (
        device is not None and user is not None and device.is_of(user.subject, user.password_version, user.created_at)
    )
