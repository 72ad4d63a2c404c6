import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from authd.accounts import FULL_NAME_CHARS_MAX, USERNAME_CHARS_MAX, Accounts, username_key
from authd.errors import InvalidRequest

#: What a login may bring: lone surrogates do not pass the edge, but the key takes them all the same.
ANY = st.text(st.characters(), max_size=60)
MAILS = st.builds("{}@{}".format, st.text(st.characters(), max_size=20), st.text(st.characters(), max_size=30))


@pytest.mark.parametrize(
    ("username", "key"),
    [
        ("ada@example.com", "ada@example.com"),
        ("  ADA@Example.COM \n", "ada@example.com"),
        ("\uff41\uff44\uff41\uff20example\uff0ecom", "ada@example.com"),
        ("ada@bücher.example", "ada@xn--bcher-kva.example"),
        ("ada@BU\u0308CHER.example", "ada@xn--bcher-kva.example"),
        ("ada@xn--bcher-kva.example", "ada@xn--bcher-kva.example"),
        ("ada@example\u3002com", "ada@example.com"),
        ("\u00c5@example.com", "\u00e5@example.com"),
        ("A\u030a@example.com", "\u00e5@example.com"),
        ("Straße@example.com", "strasse@example.com"),
        ("a@b@example.com", "a@b@example.com"),
        ("ada", "ada"),
        ("", ""),
        ("@", "@"),
        ("a\0b@c.d", "a\ufffdb@c.d"),
    ],
)
def test_one_form(username: str, key: str) -> None:
    assert username_key(username) == key


def test_different_people_stay_different() -> None:
    names = ["ada@example.com", "ada@example.org", "ad@example.com", "ada+x@example.com", "a.da@example.com", "ada"]
    assert len({username_key(name) for name in names}) == len(names)


@given(ANY | MAILS)
@example("\ud800@\udfff")
@example("a@xn--\u00e9")
@example("a@xn--a")
@example("a@" + "." * 300)
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_key_whose_key_is_itself(text: str) -> None:
    key = username_key(text)
    assert username_key(key) == key
    assert "\0" not in key
    assert key == key.strip()


@given(MAILS)
@settings(deadline=None)
def test_space_around_does_not_matter(text: str) -> None:
    assert username_key(f" \t{text}\u3000") == username_key(text)


async def refused_fields(username: str, password: str, full_name: str) -> dict[str, str]:
    """Which fields a registration refuses. The stores are not reached: they would fail."""
    accounts = Accounts(None, None, None, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest) as caught:
        await accounts.register(username, password, full_name, "192.0.2.1")
    return caught.value.errors


async def test_every_unusable_field_is_named() -> None:
    assert (await refused_fields("ada", "short", "x" * (FULL_NAME_CHARS_MAX + 1))).keys() == {
        "username",
        "password",
        "full_name",
    }
    assert (await refused_fields("ada@example.com", "short", "")).keys() == {"password"}
    assert (await refused_fields("ada@example.com", "long enough", "a\0b")).keys() == {"full_name"}


@pytest.mark.parametrize(
    "username",
    ["", "ada", "@example.com", "ada@", "a b@example.com", "ada@exa mple.com", "ada@@example.com", "a\0@example.com",
     "ada@example..com", "a" * (USERNAME_CHARS_MAX - 11) + "@example.com", "\ud800@example.com"],
)  # fmt: skip
async def test_what_is_no_mail_address_is_refused(username: str) -> None:
    assert (await refused_fields(username, "long enough", "")).keys() == {"username"}
