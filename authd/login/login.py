"""Opens a session for whoever proves to be a user."""

import msgspec

from authd.infra.caller import Caller
from authd.login.password import PasswordCheck
from authd.sessions.sessions import Sessions, TokenPair


class LoginPair(TokenPair, frozen=True, kw_only=True):
    """What a login answers. `device_token`: to be sent along with this device's next login; it opens nothing."""

    device_token: str

    def __repr__(self) -> str:
        return "LoginPair(***)"


class Login:
    def __init__(self, passwords: PasswordCheck, sessions: Sessions) -> None:
        self._passwords = passwords
        self._sessions = sessions

    async def log_in(self, username: str, password: str, caller: Caller, device_token: str = "") -> LoginPair:
        """Open a session for whoever knows the password.

        :raises InvalidCredentials, LoginLocked, Unavailable: see `PasswordCheck.verify`.
        :raises SessionLimit: only with the policy `refuse`.
        """
        verified = await self._passwords.verify(username, password, caller.address, device_token)
        pair = await self._sessions.open(verified.user, caller)
        return LoginPair(**msgspec.structs.asdict(pair), device_token=verified.device_token)
