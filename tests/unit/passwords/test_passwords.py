import unicodedata

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from authd.passwords import formats as passwords
from authd.passwords.formats import (
    COST_MAX,
    PASSWORD_BYTES_MAX,
    Effort,
    check_password,
    effort_to_hash,
    effort_to_verify,
    hash_password,
    needs_rehash,
    verify_password,
)

COST = 4
#: Composed and decomposed, and a sign that NFKC replaces (№ becomes No).
COMPOSED, DECOMPOSED = "señor-página", unicodedata.normalize("NFD", "señor-página")
#: Published: passlib 1.7.4's tests of bcrypt_sha256, version 2, and hashcat's example of mode 30601.
PREHASHED = [
    ("", "$bcrypt-sha256$v=2,t=2b,r=5$E/e/2AOhqM5W/KJTFQzLce$WFPIZKtDDTriqWwlmRFfHiOTeheAZWe"),
    ("password", "$bcrypt-sha256$v=2,t=2b,r=5$5Hg1DKFqPE8C2aflZ5vVoe$wOK1VFFtS8IGTrGa7.h5fs0u84qyPbS"),
    ("ç" * 60, "$bcrypt-sha256$v=2,t=2b,r=5$TZODI3iMQXZ6n4b.TEfSV.$cGbzAH8JiGgQ.dUTY0x5p7Bb26Er/hS"),
    ("abc123" * 12, "$bcrypt-sha256$v=2,t=2b,r=5$X1g1nh3g0v4h6970O68cxe$zu1cloESVFIOsUIo7fCEgkdHaI9SSue"),
    ("abc123" * 12 + "qwr", "$bcrypt-sha256$v=2,t=2b,r=5$X1g1nh3g0v4h6970O68cxe$CBF9csfEdW68xv3DwE6xSULXMtqEFP."),
    ("hashcat", "$bcrypt-sha256$v=2,t=2b,r=12$KSOjON/ciJR86a00N5q61.$AmWZucQuHk13FGkQWhgMeiFvBfm2GCy"),
]
#: Published: the tests of OpenBSD's and crypt_blowfish's bcrypt.
PLAIN = [
    ("U*U", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"),
    ("U*U*U*U*", "$2a$05$c92SVSfjeiCD6F2nAD6y0uBpJDjdRkt0EgeC4/31Rf2LUZbDRDE.O"),
    ("", "$2a$05$CCCCCCCCCCCCCCCCCCCCC.7uG0VCzI2bS7j6ymqJi9CdcdxiRTWNy"),
]
#: What can never match, and must cost one hash all the same.
HOPELESS = [
    *("nul\0inside", "\ud800surrogate", "x" * 5000, "é" * 513, "é" * 5000, "\u0301" * 5000),
    *("a" + "\u0301" * 31, "a" + "\u0344" * 1000 + "\u0327" * 1000),
]
UNUSABLE = [
    "",
    "x",
    "plain text",
    "$2b$04$",
    "$2b$04$" + "a" * 53,
    "$2b$04$" + "." * 52,
    "$2b$04$" + "." * 54,
    "$2b$04$" + "." * 53 + "\n",
    "$2b$03$" + "." * 53,
    "$2b$31$" + "." * 53,
    "$2b$٠٤$" + "." * 53,
    "$2x$04$" + "." * 53,
    "$2$04$" + "." * 53,
    "$2b$04$" + "€" * 53,
    "$bcrypt-sha256$v=2,t=2b,r=31$" + "." * 22 + "$" + "." * 31,
    "$bcrypt-sha256$v=9,t=2b,r=4$" + "." * 22 + "$" + "." * 31,
    "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$ZGlnZXN0",
    "\ud800",
    "\0",
]


@pytest.fixture
def hashes_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The costs that bcrypt was called with."""
    costs: list[int] = []
    real = bcrypt.hashpw

    def counted(key: bytes, salt: bytes) -> bytes:
        costs.append(int(salt[4:6]))
        return real(key, salt)

    monkeypatch.setattr(bcrypt, "hashpw", counted)
    return costs


@pytest.mark.parametrize("password", ["x" * 8, "x" * PASSWORD_BYTES_MAX, "пароль-1", "é" * 512, "spaces are fine "])
def test_a_password_within_the_rules_is_accepted_and_hashed(password: str) -> None:
    assert check_password(password) is None
    assert verify_password(password, hash_password(password, COST), COST)


@pytest.mark.parametrize(
    ("password", "rule"),
    [
        ("", "at least 8"),
        ("x" * 7, "at least 8"),
        ("ключ", "at least 8"),
        # 21 code points that compose into seven.
        (unicodedata.normalize("NFD", "ế" * 7), "at least 8"),
        ("x" * 1025, "at most 1024 bytes"),
        ("é" * 513, "at most 1024 bytes"),
        # One ligature of these is 18 characters.
        ("\ufdfa" * 60, "at most 1024 bytes"),
        ("x" * 100_000, "at most 1024 bytes"),
        ("aaaaaaaa" + "\u0301" * 31, "at most 30 combining marks in a row"),
        ("a" + "\u0344" * 1000 + "\u0327" * 1000, "at most 30 combining marks in a row"),
        ("password\0", "NUL"),
        ("password\ud800", "Unicode"),
    ],
)
def test_a_broken_rule_is_named_in_a_sentence_without_the_password(password: str, rule: str) -> None:
    sentence = check_password(password)
    assert sentence is not None and rule in sentence and sentence.endswith(".")
    assert not password or password not in sentence


def test_no_password_within_the_byte_limit_is_cut_off_by_the_input_limit() -> None:
    densest = "ǘ" * (PASSWORD_BYTES_MAX // 2)
    decomposed = unicodedata.normalize("NFD", densest)
    assert len(decomposed) == 3 * len(densest) <= passwords.PASSWORD_INPUT_CHARS_MAX
    assert check_password(decomposed) is None
    assert verify_password(decomposed, hash_password(densest, COST), COST)


@pytest.mark.parametrize(("password", "stored"), PREHASHED + PLAIN)
def test_published_hashes_verify(password: str, stored: str) -> None:
    assert verify_password(password, stored, COST)
    assert not verify_password(password + "x", stored, COST)


@pytest.mark.parametrize("ident", ["2a", "2b", "2y"])
def test_hashes_of_the_replaced_service_verify(ident: str) -> None:
    made = bcrypt.hashpw(b"correct horse", bcrypt.gensalt(COST)).decode()
    assert verify_password("correct horse", f"${ident}{made[3:]}", COST)
    assert not verify_password("wrong horse", f"${ident}{made[3:]}", COST)


@pytest.mark.parametrize("password", [DECOMPOSED, "№-пароль-№", "\u00a0" * 10])
def test_the_replaced_service_hashed_text_as_it_came_and_it_still_verifies(password: str) -> None:
    stored = bcrypt.hashpw(password.encode(), bcrypt.gensalt(COST)).decode()
    assert verify_password(password, stored, COST)
    assert needs_rehash(password, stored, COST)
    assert verify_password(password, hash_password(password, COST), COST)


def test_the_replaced_service_cut_at_72_bytes_and_its_long_passwords_still_verify() -> None:
    password = "long " * 20
    stored = bcrypt.hashpw(password.encode()[:72], bcrypt.gensalt(COST)).decode()
    assert verify_password(password, stored, COST)
    assert not verify_password("x" + password, stored, COST)
    # What the user typed after the 72nd byte was not verified, so it is not kept either.
    assert not needs_rehash(password + "typo", stored, COST)


@pytest.mark.parametrize("length", [70, 71, 72, 73, 80, 1000])
@pytest.mark.parametrize("letter", ["a", "ж"])
def test_own_hashes_count_every_byte(length: int, letter: str) -> None:
    password = "a" * length if letter == "a" else letter * (length // 2)
    stored = hash_password(password, COST)
    assert verify_password(password, stored, COST)
    for other in (password + "a", password[:-1], password[:-1] + "b", password[:72] + "b" * (length - 72)):
        assert other == password or not verify_password(other, stored, COST)


def test_a_password_matches_in_every_normal_form() -> None:
    assert COMPOSED != DECOMPOSED
    for kept, typed in ((COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)):
        assert verify_password(typed, hash_password(kept, COST), COST)


def test_a_password_means_the_same_on_every_python() -> None:
    # Their forms, and that the last is a mark, are in Unicode 15, which Python 3.11 does not have.
    password = "\U0001e030\u00e9\U0001fa77 correct \U0001e08f\u0327\u0301"
    stored = "$bcrypt-sha256$v=2,t=2b,r=4$5rCpd/SaLDY4ygEj2w5OcO$Esi67N3uubRVXzPoMRo047rc0LZsA0m"
    assert check_password(password) is None
    assert verify_password(password, stored, COST)
    assert verify_password(unicodedata.normalize("NFD", "\u00e9").join(password.split("\u00e9")), stored, COST)


def test_the_format_follows_from_the_password() -> None:
    assert hash_password("short ascii", COST).startswith("$2b$04$")
    assert bcrypt.checkpw(b"short ascii", hash_password("short ascii", COST).encode())
    for password in ("x" * 72, "x" * 1000, COMPOSED):
        assert hash_password(password, COST).startswith("$bcrypt-sha256$v=2,t=2b,r=4$")
    assert hash_password("same", COST) != hash_password("same", COST)


@pytest.mark.parametrize("password", HOPELESS)
def test_what_cannot_be_hashed_is_refused_by_name(password: str) -> None:
    with pytest.raises(ValueError, match="cannot be hashed"):
        hash_password(password, COST)


@pytest.mark.parametrize("password", [*HOPELESS, "", "wrong password"])
@pytest.mark.parametrize(
    "stored",
    [
        None,
        pytest.param(hash_password("right password", COST), id="another's"),
        pytest.param(hash_password("right password" * 9, COST), id="another's long one"),
        *UNUSABLE,
    ],
)
def test_every_failure_costs_exactly_one_hash(password: str, stored: str | None, hashes_made: list[int]) -> None:
    assert not verify_password(password, stored, COST)
    assert hashes_made == [COST]
    assert effort_to_verify(stored, COST).cost == COST


def test_an_unknown_user_costs_what_the_setting_says_and_a_stored_hash_its_own_cost(hashes_made: list[int]) -> None:
    stored = hash_password("right password", 6)
    hashes_made.clear()
    assert not verify_password("x", None, 5)
    assert verify_password("right password", stored, 5)
    assert hashes_made == [5, 6]
    assert effort_to_verify(stored, 5) == Effort("bcrypt", 6)
    assert effort_to_verify("$2b$31$" + "." * 53, 5) == Effort("bcrypt", 5)
    assert effort_to_hash("é" * 8, COST_MAX) == Effort("bcrypt-sha256", COST_MAX)


@given(password=st.text(max_size=80), stored=st.text(max_size=80))
def test_nothing_raises(password: str, stored: str) -> None:
    assert not verify_password(password, stored, COST)
    assert not needs_rehash(password, stored, COST)
    check_password(password)


@given(password=st.text(min_size=8, max_size=100))
def test_what_the_rules_accept_verifies_in_any_form(password: str) -> None:
    if check_password(password) is None:
        stored = hash_password(unicodedata.normalize("NFKC", password), COST)
        # A plain hash is compared as it came: an ASCII password is its own only form.
        expected = password.isascii() or not unicodedata.normalize("NFKC", password).isascii()
        assert verify_password(password, stored, COST) or not expected
        assert verify_password(password, hash_password(password, COST), COST)


def test_a_rehash_is_due_when_cost_or_format_changed() -> None:
    stored = hash_password("short ascii", 5)
    assert not needs_rehash("short ascii", stored, 5)
    assert needs_rehash("short ascii", stored, 4)
    assert needs_rehash("short ascii", stored, 6)
    long = hash_password("x" * 100, 5)
    assert not needs_rehash("x" * 100, long, 5)
    assert needs_rehash("x" * 100, long, 6)
    assert not needs_rehash("whatever", "unusable", 5)
