"""The key of a username: one for all spellings of one address, none that two addresses share, on every Python."""

import unicodedata
from hashlib import sha256

import idna
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from authd.accounts.registration import FULL_NAME_CHARS_MAX, Accounts
from authd.errors import InvalidRequest
from authd.infra.text import MARKS_MAX, holds_newer
from authd.users.usernames import USERNAME_CHARS_MAX, address_key, username_key

#: What Postgres takes at most in an index is 2,704 bytes.
KEY_BYTES_MAX = 254
#: What a login may bring: lone surrogates do not pass the edge, but the key takes them all the same.
ANY = st.text(st.characters(), max_size=60)
MAILS = st.builds("{}@{}".format, st.text(st.characters(), max_size=20), st.text(st.characters(), max_size=30))
#: Letters with case, width, marks and domains' exceptions, so that many are addresses.
LETTERS = st.text(
    st.sampled_from("aZ9.-\u00fc\u00dc\u00df\u1e9e\u03c2\u03a3u\u0308\u3042\uff21\ud55c\u0130"), min_size=1, max_size=12
)
ADDRESSES = st.builds("{}@{}.example".format, LETTERS, LETTERS)
#: Whole rooms of Han, Hangul and private use are left out: none has case, width or a form of more than one of its own.
SIGNS = [
    char
    for char in map(chr, [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x20000), *range(0x2F800, 0x2FA20)])
    if unicodedata.category(char) != "Cn" and not holds_newer(char)
]


@pytest.mark.parametrize(
    ("username", "key"),
    [
        ("ada@example.com", "ada@example.com"),
        ("  ADA@Example.COM \n", "ada@example.com"),
        ("\uff41\uff44\uff41\uff20example\uff0ecom", "ada@example.com"),
        ("ada@b\u00fccher.example", "ada@xn--bcher-kva.example"),
        ("ada@BU\u0308CHER.example", "ada@xn--bcher-kva.example"),
        ("ada@xn--bcher-kva.example", "ada@xn--bcher-kva.example"),
        ("ada@XN--BCHER-KVA.example", "ada@xn--bcher-kva.example"),
        ("ada@example\u3002com", "ada@example.com"),
        ("ada@localhost", "ada@localhost"),
        ("ada@stra\u00dfe.de", "ada@xn--strae-oqa.de"),
        ("ada@STRA\u1e9eE.de", "ada@xn--strae-oqa.de"),
        ("ada@xn--strae-oqa.de", "ada@xn--strae-oqa.de"),
        ("ada@strasse.de", "ada@strasse.de"),
        ("\u00c5@example.com", "\u00e5@example.com"),
        ("A\u030a@example.com", "\u00e5@example.com"),
        ("Stra\u00dfe@example.com", "strasse@example.com"),
        # Sara am, which every Thai keyboard has: NFKC writes it as two.
        ("\u0e17\u0e33@example.com", "\u0e17\u0e4d\u0e32@example.com"),
        ("a@b@example.com", "a@b@example.com"),
    ],
)
def test_one_form(username: str, key: str) -> None:
    assert username_key(username) == address_key(username) == key


@pytest.mark.parametrize(
    "username",
    [
        "", "@", "ada", "ada@", "a\0b@c.de", "\ud800@example.com", "ada@exa mple.com", "ada@a..com",
        "ada@a_b.com", "@example.com",
        # The Kelvin sign, the Angstrom sign, a feminine ordinal, a leader dot, an ellipsis, a ligature, a long s: NFKC
        # makes other addresses of them.
        "\u212a@example.com", "\u212b@example.com", "\u00aa@example.com", "a\u2024b@example.com", "\u2026@example.com",
        "\ufb01x@example.com", "\u017f@example.com", "\u1e9b@example.com", "\ufdfa@example.com",
        # Newer than Unicode 14: as it is, and as a domain that Python 3.12 can read and 3.11 cannot.
        "\U0001fa77@example.com", "ada@\U0001e030.com", "ada@xn--ui4h.com", "ada@\U00031350.com", "ada@xn--8o8n.com",
        "a" * (USERNAME_CHARS_MAX - 11) + "@example.com",
        "ada@" + "\u0660" * 200,
        "a" + "\u0301" * (MARKS_MAX + 1) + "@example.com",
        "ada@a" + "\u0301" * (MARKS_MAX + 1) + ".com",
        "\u0130" * 82 + "@example.com",
    ],
)  # fmt: skip
def test_what_can_be_nobodys_has_a_key_of_its_own_that_no_address_has(username: str) -> None:
    assert address_key(username) is None
    key = username_key(username)
    assert "@" not in key and len(key.encode()) == 35
    assert key == username_key(f" {username}\t")
    assert key != username_key(username + "x")


def test_different_people_stay_different() -> None:
    names = ["ada@example.com", "ada@example.org", "ad@example.com", "ada+x@example.com", "a.da@example.com", "ada"]
    names += [
        "ada@strasse.de",
        "ada@stra\u00dfe.de",
        "k@x.de",
        "\u212a@x.de",
        "a@x.de",
        "\u00aa@x.de",
        "a.b@x.de",
        "a\u2024b@x.de",
    ]
    assert len({username_key(name) for name in names}) == len(names)


@given(ANY | MAILS | ADDRESSES)
@example("\ud800@\udfff")
@example("a@xn--\u00e9")
@example("a@xn--a")
@example("a@" + "." * 300)
@example("\ufdfa" * 252 + "@b")
@example("\u1f80" * 240 + "@example.com")
@example("a@" + "\ufdfa" * 240)
@settings(max_examples=300)
def test_any_text_has_a_key_that_postgres_takes_and_a_key_of_an_address_is_its_own(text: str) -> None:
    key = username_key(text)
    assert "\0" not in key
    assert len(key.encode()) <= KEY_BYTES_MAX
    assert (address_key(text) is None) == ("@" not in key)
    if "@" in key:
        assert username_key(key) == key


@given(ADDRESSES | MAILS)
def test_spellings_of_one_address_have_one_key(text: str) -> None:
    key = address_key(text)
    assume(key is not None)
    local, _, domain = text.rpartition("@")
    wide = "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)
    spellings = [f" \t{text}\u3000", unicodedata.normalize("NFC", text), unicodedata.normalize("NFD", text), wide]
    # Not the upper case of a domain: SS is what it makes of the sharp s, and DNS keeps the two apart.
    spellings += [f"{local.upper()}@{domain}", f"{local.casefold()}@{domain}"]
    ascii_domain = address_key(text).rpartition("@")[2]  # type: ignore[union-attr]
    domains = ["".join(map(str.lower, domain)), ascii_domain, ascii_domain.upper(), idna.decode(ascii_domain)]
    spellings += [f"{local}@{spelling}" for spelling in domains]
    assert {username_key(spelling) for spelling in spellings} == {key}


def test_every_python_and_every_idna_makes_the_same_keys() -> None:
    """Users are found by what is stored: an upgrade that fails here would lose some, and needs a migration of keys."""
    keys = [f"{address_key(f'a{sign}b@x.de')} {address_key(f'ada@a{sign}b.de')}" for sign in SIGNS]
    assert sha256("|".join(keys).encode()).hexdigest()[:16] == "4a5c1cf49a9b116e"
    assert len(keys) == 40_264


def test_the_key_of_any_sign_is_its_own_key() -> None:
    for sign in SIGNS:
        key = address_key(f"a{sign}b@x.de")
        assert key is None or address_key(key) == key


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
     "ada@example..com", "a" * (USERNAME_CHARS_MAX - 11) + "@example.com", "\ud800@example.com",
     # No address in its one form: full-width dots, at signs and spaces.
     "\u2026@x.de", "\uff0e\uff0e@x.de", "a\uff0e@x.de", "a\uff20b@x.de", "a\u3000b@x.de", "\uff02a b\uff02@x.de",
     "ada\uff20x.de", "\u212a@x.de", "\u00aa@x.de", "a\u2024b@x.de", "ada@x\u2024de", "a" + "\u0301" * 31 + "@x.de"],
)  # fmt: skip
async def test_what_is_no_mail_address_is_refused(username: str) -> None:
    assert (await refused_fields(username, "long enough", "")).keys() == {"username"}


async def test_the_name_of_a_refused_username_is_not_looked_for_in_the_password() -> None:
    assert (await refused_fields("lovelace" * 40 + "@x.de", "lovelace" * 40, "")).keys() == {"username"}
    assert (await refused_fields("lovelace@x..de", "I am lovelace", "")).keys() == {"username"}
    assert (await refused_fields("lovelace@x.de", "I am lovelace", "")).keys() == {"password"}


def test_names_of_many_scripts_are_addresses() -> None:
    for name in (
        "jos\u00e9",
        "\u0438\u0432\u0430\u043d",
        "\u05d3\u05d5\u05d3",
        "\u0646\u0639\u0645\u0629",
        "\u0928\u0940\u0930\u091c",
        "\u6771\u4eac",
        "\ud55c\uae00",
        "\u0e19\u0e49\u0e33",
        "\u1ea5n",
    ):
        assert address_key(f"{name}@example.com") is not None, ascii(name)
