"""The gate, and the rule that each statement which writes what it reads ends the living sessions."""

import re
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

import authd
from authd.infra.subject import Subject
from authd.login.gate import refuse_tokens
from authd.users.postgres import User

USER = User(
    id=7,
    incarnation=70,
    username="ada@example.org",
    full_name="Ada",
    password_hash="hash",
    password_version=1,
    version=1,
    epoch=1,
    disabled=False,
    created_at=datetime(2026, 11, 23, tzinfo=UTC),
    revocation=0,
)
#: The columns of what the gate reads of a user. An id and an incarnation never change.
COLUMNS = {"id": "id", "incarnation": "incarnation", "disabled": "disabled_at"}
FIXED = {"id", "incarnation"}


@pytest.mark.parametrize(
    ("user", "answer"),
    [
        (USER, None),
        (None, "user_deleted"),
        (msgspec.structs.replace(USER, id=8), "user_deleted"),
        (msgspec.structs.replace(USER, incarnation=71), "user_deleted"),
        (msgspec.structs.replace(USER, disabled=True), "user_disabled"),
    ],
)
def test_who_may_have_tokens(user: User | None, answer: str | None) -> None:
    assert refuse_tokens(Subject(7, 70), user) == answer


def test_the_gate_reads_the_columns_of_this_table() -> None:
    read: set[str] = set()

    class Watched(User, frozen=True, kw_only=True):
        def __getattribute__(self, name: str) -> object:
            if name in User.__struct_fields__:
                read.add(name)
            return super().__getattribute__(name)

    refuse_tokens(USER.subject, Watched(**msgspec.structs.asdict(USER)))
    assert read == COLUMNS.keys()


def test_each_statement_that_writes_what_the_gate_reads_ends_all_sessions() -> None:
    writers = set()
    for path in Path(authd.__file__).parent.rglob("*.sql"):
        if path.parent.name == "migrations":
            continue
        for name, statement in re.findall(r"^-- name: (\w+)$(.*?);$", path.read_text("utf-8"), re.M | re.S):
            # A deletion ends them by a trigger: see 0005_incarnations.sql.
            found = re.search(r"\bUPDATE users\s+SET (.*?)\sWHERE\b", statement, re.S)
            written = set(re.findall(r"(\w+) = ", found[1])) if found else set()
            assert not written & FIXED, name
            if written & set(COLUMNS.values()):
                writers.add(name)
                assert "epoch = version + 1" in statement, name
    assert writers == {"disable_user", "enable_user"}
