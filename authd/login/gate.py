"""Decides whether a user may have tokens now. Every flow that opens or rebuilds a session asks it last."""

from typing import Literal

from authd.infra.subject import Subject
from authd.users.postgres import User


def refuse_tokens(subject: Subject, user: User | None) -> Literal["user_deleted", "user_disabled"] | None:
    """Return why the subject may have no tokens, None where it may. `user`: its row, as read just before.

    A living session is not asked about: for it, the epoch decides. So each statement that writes what is read here
    raises the epoch.
    """
    if user is None or user.subject != subject:
        return "user_deleted"
    return "user_disabled" if user.disabled else None
