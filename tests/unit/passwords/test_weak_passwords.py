"""Passwords that guessers try first are refused, and the refusal says which rule."""

import pytest

from authd.passwords.formats import PASSWORD_CHARS_MIN, check_password
from authd.passwords.weak import WeakPasswords

USERNAME = "Ada.Lovelace@example.com"
#: As a Japanese keyboard writes it.
WIDE = "".join(chr(ord(character) + 0xFEE0) for character in "password1")


@pytest.fixture(scope="module")
def weak() -> WeakPasswords:
    return WeakPasswords()


@pytest.mark.parametrize(
    "password",
    ["password1", "Password123", "12345678", "QWERTYUIOP", "iloveyou", "1q2w3e4r", "00000000", "p@ssw0rd", WIDE],
)
def test_the_commonest_are_refused_in_any_case_and_width(weak: WeakPasswords, password: str) -> None:
    assert check_password(password) is None
    assert weak.check(password, USERNAME) == "The password is one of the commonest in known breaches."


@pytest.mark.parametrize(
    "password", ["correct horse", "correct horse battery", "correct horse battery staple", "ü" * 512, "x" * 1024]
)
def test_others_are_taken(weak: WeakPasswords, password: str) -> None:
    assert weak.check(password, USERNAME) is None


@pytest.mark.parametrize(
    ("username", "password"),
    [
        (USERNAME, "ada.lovelace!"),
        (USERNAME, "my ADA.LOVELACE 1815"),
        (" adal@example.com ", "the adal thing"),
        ("straße@example.com", "in STRASSE 7"),
    ],
)
def test_the_name_of_the_mail_address_may_not_stand_in_it(weak: WeakPasswords, username: str, password: str) -> None:
    assert weak.check(password, username) == "The password must not contain the name of your e-mail address."


@pytest.mark.parametrize(
    ("username", "password"),
    [
        ("ada@example.com", "canada canada"),
        (USERNAME, "example.com rules"),
        ("", "any thing"),
        ("no mail", "no mail at all"),
    ],
)
def test_short_names_and_domains_may(weak: WeakPasswords, username: str, password: str) -> None:
    assert weak.check(password, username) is None


def test_the_list_holds_what_can_be_typed_and_is_long_enough_only(weak: WeakPasswords) -> None:
    assert len(weak._common) > 10_000
    assert {text for text in weak._common if len(text) < PASSWORD_CHARS_MIN or text != text.casefold()} == set()
