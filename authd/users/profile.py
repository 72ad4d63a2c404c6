"""Shows a user to itself."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Protocol

import msgspec

from authd.errors import InvalidAccessToken, Unavailable
from authd.infra.subject import Subject
from authd.users.postgres import User, Users
from authd.users.redis import UserCache


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """What a client sees of a user. `created_at`: ISO 8601 with offset."""

    user_id: int
    username: str
    full_name: str
    created_at: str


class Bearer(Protocol):
    """Whose token was authenticated. `cached_profile`: what `UserCache` has of the user, or empty."""

    @property
    def subject(self) -> Subject: ...

    @property
    def cached_profile(self) -> bytes: ...


class Profiles:
    def __init__(self, users: Users, cache: UserCache, authenticate: Callable[[str], Awaitable[Bearer]]) -> None:
        """`authenticate` takes an access token and raises InvalidAccessToken or Unavailable."""
        self._users = users
        self._cache = cache
        self._authenticate = authenticate

    async def read(self, access_token: str) -> Profile:
        """Return the profile of the token's user: from the cache, or from Postgres behind it.

        :raises InvalidAccessToken, Unavailable:
        """
        bearer = await self._authenticate(access_token)
        if bearer.cached_profile:
            return msgspec.json.decode(bearer.cached_profile, type=Profile)
        user = await self._users.find(*bearer.subject)
        if user is None or user.disabled:
            raise InvalidAccessToken
        profile = profile_of(user)
        with suppress(Unavailable):  # a Redis without memory reads, and caches nothing
            await self._cache.store(user.subject, user.version, msgspec.json.encode(profile))
        return profile


def make_profile(user_id: int, username: str, full_name: str, created_at: datetime) -> Profile:
    """Return what clients see of a row's fields."""
    return Profile(user_id=user_id, username=username, full_name=full_name, created_at=created_at.isoformat())


def profile_of(user: User) -> Profile:
    """Return what clients see of the user."""
    return make_profile(user.id, user.username, user.full_name, user.created_at)
