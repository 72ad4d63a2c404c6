"""What a client sees of a user."""

from datetime import datetime

import msgspec

from authd.users.postgres import User


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
