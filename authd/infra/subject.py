"""Whom tokens, rows of the log and keys in Redis are about."""

from typing import NamedTuple

from authd.config import BUCKETS


class Subject(NamedTuple):
    """Whom tokens, rows of the log and keys in Redis are about: a user's id, and the random number of its row. An id
    that Postgres gives again after a restore is another subject.
    """

    user_id: int
    incarnation: int

    def __str__(self) -> str:
        """Return the form that the names of keys in Redis have."""
        return f"{self.user_id}:{self.incarnation}"


def bucket_of_user(user_id: int) -> int:
    """Return the bucket, and the lane of the outbox, that the user's rows and keys are in."""
    return user_id % BUCKETS
