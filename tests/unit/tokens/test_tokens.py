import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable

import jwt as pyjwt
import msgspec
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jose import jwt as python_jose
from joserfc import jws
from joserfc import jwt as jose_jwt
from joserfc.jwk import ECKey

from authd.config import Secret, Settings
from authd.infra.subject import Subject
from authd.tokens.access import (
    ACCESS_TOKEN_CHARS_MAX,
    CLOCKS_APART_S,
    ExpiredToken,
    InvalidToken,
    MintSettings,
    TokenMint,
    decode_base64url,
    encode_base64url,
)
from authd.tokens.refresh import RefreshToken
from authd.tokens.ring import DataKey, KeyRing, MacKey, SigningKey
from authd.tokens.seal import KeySeal, generate_signing_key, load_signing_key, shared_signing_key

NOW = 1_800_000_000
SESSION = bytes(range(16))
SHARED = "shared-secret-of-the-old-services-"
ALGORITHMS = ["ES256", "Ed25519", "HS256"]
KEYS = {
    kid: generate_signing_key(algorithm, kid)
    for kid, algorithm in (("es-1", "ES256"), ("es-2", "ES256"), ("ed-1", "Ed25519"))
}
MAC_1, MAC_2 = MacKey(1, b"1" * 32, 0), MacKey(2, b"2" * 32, NOW + 100)
ADA = Subject(42, 0xFEDCBA98)
TOKEN = RefreshToken(
    key_id=1,
    user_id=42,
    incarnation=0xFEDCBA98,
    session_id=SESSION,
    epoch=3,
    counter=7,
    created_ms=(NOW - 10) * 1000,
    issued_ms=NOW * 1000,
    expires_ms=(NOW + 60) * 1000,
    authenticated_s=NOW - 11,
)
#: What version 1 made of these fields, less those that it had not.
TEXT_V1 = (
    "v1.AAAAAQAAAAAAAAAqAAECAwQFBgcICQoLDA0ODwAAAAMAAAAAAAAABwAAAaMYXCjwAAABoxhcUAAAAAGjGF06YHY5OryZGSJRu"
    "0X8oKsupSF_lBKeBTN_R_RkIYXdgwXJ"
)
GOLDEN_V2 = (
    "v2.AAAAAQAAAAAAAAAq_ty6mAABAgMEBQYHCAkKCwwNDg8AAAADAAAAAAAAAAcAAAGjGFwo8AAAAaMYXFAAAAABoxhdOmBrSdH1AQEAA"
    "EWVA4brf1a20rT3NILBH05IAQy-W3ROTpsf4-XuoCmM"
)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


class Clock:
    """Seconds since the epoch, as the test says."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def signing(kid: str, active_at: float = 0) -> SigningKey:
    algorithm = "Ed25519" if kid.startswith("ed") else "ES256"
    return load_signing_key(KEYS[kid], kid=kid, algorithm=algorithm, active_at=active_at)


def make_ring() -> KeyRing:
    return KeyRing([signing("es-1"), signing("ed-1"), shared_signing_key(Secret(SHARED))], [MAC_1, MAC_2])


def make_mint(make_settings: Callable[..., Settings], algorithm: str = "ES256", **fields: object) -> TokenMint:
    secret = {"jwt_secret": SHARED} if algorithm == "HS256" else {}
    settings = make_settings(jwt_algorithm=algorithm, issuer="https://auth.test", **secret, **fields)
    return TokenMint(settings.section(MintSettings), make_ring(), Clock())


@pytest.fixture
def mint(make_settings) -> TokenMint:
    return make_mint(make_settings)


def split(token: str) -> list[bytes]:
    return [urlsafe_b64decode(part + "=" * (-len(part) % 4)) for part in token.split(".")]


def forge(mint: TokenMint, kid: str = "es-1", header: dict | None = None, **claims: object) -> str:
    """A token that is signed by one of our keys, with anything in it."""
    good = {
        "iss": "https://auth.test",
        "sub": "42",
        "inc": ADA.incarnation,
        "sid": encode_base64url(SESSION),
        "jti": "j",
        "iat": NOW,
        "exp": NOW + 9,
    }
    key = mint._ring.find_signing_key(kid)
    assert key is not None
    full = {"typ": "at+jwt", "alg": key.algorithm, "kid": kid} | (header or {})
    body = {name: value for name, value in (good | claims).items() if value is not None}
    return lower_s(jose_jwt.encode(full, body, key.key, algorithms=[key.algorithm]))


def lower_s(token: str) -> str:
    """The token with the signature that we make; others sign with any of two."""
    if "ES256" not in json.loads(split(token)[0]).values():
        return token
    signed, _, signature = token.rpartition(".")
    raw = decode_base64url(signature)
    s = int.from_bytes(raw[32:])
    return f"{signed}.{encode_base64url(raw[:32] + min(s, P256_ORDER - s).to_bytes(32))}"


# Access tokens


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_access_token_comes_back(make_settings, algorithm: str) -> None:
    mint = make_mint(make_settings, algorithm)
    claims = mint.read_access(mint.make_access(Subject(2**53 + 1, 2**32 - 1), SESSION, 1, "an-id"))
    assert claims.subject == Subject(2**53 + 1, 2**32 - 1)
    assert (claims.user_id, claims.session_id, claims.expires_at) == (2**53 + 1, SESSION, NOW + mint.access_ttl_s)


@pytest.mark.parametrize(("algorithm", "kind"), [("ES256", "at+jwt"), ("Ed25519", "at+jwt"), ("HS256", "JWT")])
def test_what_an_access_token_says(make_settings, algorithm: str, kind: str) -> None:
    header, payload, _ = split(make_mint(make_settings, algorithm).make_access(ADA, SESSION, 1, "an-id"))
    assert json.loads(header)["typ"] == kind
    assert json.loads(header)["alg"] == algorithm
    assert json.loads(payload) == {
        "iss": "https://auth.test",
        "sub": "42",
        "inc": ADA.incarnation,
        "sid": encode_base64url(SESSION),
        "epoch": 1,
        "jti": "an-id",
        "iat": NOW,
        "exp": NOW + 1800,
    }


def test_an_audience_appears_only_when_one_is_set(make_settings) -> None:
    mint = make_mint(make_settings, audience="https://api.test")
    token = mint.make_access(ADA, SESSION, 1, "j")
    assert json.loads(split(token)[1])["aud"] == "https://api.test"
    mint.read_access(token)
    for audience in (None, "https://other.test", ["https://api.test"]):
        with pytest.raises(InvalidToken):
            mint.read_access(forge(mint, aud=audience))


def test_the_old_services_decode_hs256_tokens_as_ever(make_settings) -> None:
    settings = make_settings(jwt_algorithm="HS256", jwt_secret=SHARED)
    token = TokenMint(settings.section(MintSettings), make_ring()).make_access(ADA, SESSION, 1, "j")
    assert int(python_jose.decode(token, SHARED, algorithms=["HS256"])["sub"]) == 42
    assert int(pyjwt.decode(token, SHARED, algorithms=["HS256"])["sub"]) == 42


@pytest.mark.parametrize(("algorithm", "name"), [("ES256", "ES256"), ("Ed25519", "EdDSA")])
def test_a_verifier_needs_only_the_published_key(make_settings, algorithm: str, name: str) -> None:
    ring = make_ring()
    token = TokenMint(make_settings(jwt_algorithm=algorithm).section(MintSettings), ring).make_access(
        ADA, SESSION, 1, "j"
    )
    kid = pyjwt.get_unverified_header(token)["kid"]
    [published] = [key for key in ring.jwks()["keys"] if key["kid"] == kid]
    # PyJWT knows Ed25519 by its older name, which the header does not use.
    public = pyjwt.PyJWK(published | {"alg": name})
    if algorithm == "ES256":
        assert pyjwt.decode(token, public, algorithms=["ES256"])["sub"] == "42"
    else:
        signed, _, signature = token.rpartition(".")
        public.key.verify(decode_base64url(signature), signed.encode())


def test_an_access_token_ends_with_its_last_second(make_settings) -> None:
    clock = Clock()
    mint = TokenMint(make_settings(access_ttl_s=60).section(MintSettings), make_ring(), clock)
    token = mint.make_access(ADA, SESSION, 1, "j")
    clock.now = NOW + 59.9
    mint.read_access(token)
    clock.now = NOW + 60
    with pytest.raises(ExpiredToken):
        mint.read_access(token)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_changed_character_of_an_access_token_is_noticed(make_settings, algorithm: str) -> None:
    mint = make_mint(make_settings, algorithm)
    token = mint.make_access(ADA, SESSION, 1, "j")
    for index, character in enumerate(token):
        # The highest of six bits: the last character of a part may carry fewer than six.
        other = "." if character != "." else "A"
        if character != ".":
            other = ALPHABET[ALPHABET.index(character) ^ 32]
        with pytest.raises(InvalidToken):
            mint.read_access(token[:index] + other + token[index + 1 :])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_cut_or_lengthened_access_token_is_invalid(make_settings, algorithm: str) -> None:
    mint = make_mint(make_settings, algorithm)
    token = mint.make_access(ADA, SESSION, 1, "j")
    head, _, signature = token.rpartition(".")
    for text in (
        token[:-1],
        token[:-4],
        token + "AAAA",
        head,
        head + ".",
        "." + signature,
        token + "." + token,
        token[1:],
    ):
        with pytest.raises(InvalidToken):
            mint.read_access(text)


@pytest.mark.parametrize(
    "text", ["", ".", "..", "a.b.c", "....", "null", "é.é.é", "\ud800.a.b", "\0", "{}", "v1." + "A" * 200]
)
def test_junk_is_invalid_to_both_readers(mint: TokenMint, text: str) -> None:
    for read in (mint.read_access, mint.read_refresh):
        with pytest.raises(InvalidToken):
            read(text)


@given(st.text())
def test_any_text_is_invalid_to_both_readers(make_settings, text: str) -> None:
    mint = make_mint(make_settings)
    for read in (mint.read_access, mint.read_refresh):
        with pytest.raises(InvalidToken):
            read(text)


@pytest.mark.parametrize("payload", [b"[]", b"null", b"1", b'"x"', b"{", b"\xff", b"[" * 3000])
def test_a_signed_payload_that_is_no_object_is_invalid(mint: TokenMint, payload: bytes) -> None:
    key = mint._ring.find_signing_key("es-1")
    assert key is not None
    header = {"typ": "at+jwt", "alg": "ES256", "kid": "es-1"}
    with pytest.raises(InvalidToken):
        mint.read_access(jws.serialize_compact(header, payload, key.key, algorithms=["ES256"]))


def test_a_token_of_any_length_is_refused_at_once(mint: TokenMint) -> None:
    with pytest.raises(InvalidToken):
        mint.read_access(forge(mint, padding="x" * ACCESS_TOKEN_CHARS_MAX))


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": None}, {"iss": "https://other.test"}, {"iss": ["https://auth.test"]},
        {"sub": None}, {"sub": 42}, {"sub": ""}, {"sub": "-1"}, {"sub": "+1"}, {"sub": "0"}, {"sub": "4 2"},
        {"sub": "٤٢"},
        {"sub": "42\n"}, {"sub": str(2**63)}, {"sub": "1" * 4000}, {"sub": "4_2"}, {"sub": "042"},
        {"sid": None}, {"sid": ""}, {"sid": 7}, {"sid": encode_base64url(SESSION[:15])},
        {"sid": encode_base64url(SESSION) + "="},
        {"sid": encode_base64url(SESSION)[:-1] + "x"},
        {"exp": None}, {"exp": str(NOW + 9)}, {"exp": True}, {"exp": NOW}, {"exp": -1}, {"exp": [NOW + 9]},
        {"iat": None}, {"iat": str(NOW)}, {"iat": NOW + 9 - 1801}, {"exp": NOW + 1801}, {"exp": 2**52},
        {"iat": NOW + CLOCKS_APART_S + 1, "exp": NOW + CLOCKS_APART_S + 9},
        {"inc": None}, {"inc": 0}, {"inc": -1}, {"inc": 2**32}, {"inc": "7"}, {"inc": 7.0}, {"inc": True}, {"inc": [7]},
    ],
    ids=repr,
)  # fmt: skip
def test_a_signed_token_with_a_wrong_claim_is_invalid(mint: TokenMint, claims: dict[str, object]) -> None:
    with pytest.raises(InvalidToken):
        mint.read_access(forge(mint, **claims))


@pytest.mark.parametrize("subject", ["1", str(2**53 + 1), str(2**63 - 1)])
def test_user_ids_beyond_the_precision_of_a_double_stay_whole(mint: TokenMint, subject: str) -> None:
    assert mint.read_access(forge(mint, sub=subject)).user_id == int(subject)


def test_of_the_two_es256_signatures_of_a_text_one_counts(make_settings) -> None:
    """(r, s) and (r, order - s) both verify: a second text of one token would pass a deny list of texts."""
    mint = make_mint(make_settings)
    for number in range(20):
        token = mint.make_access(ADA, SESSION, 1, str(number))
        signed, _, signature = token.rpartition(".")
        raw = decode_base64url(signature)
        s = int.from_bytes(raw[32:])
        assert s <= P256_ORDER // 2
        other = f"{signed}.{encode_base64url(raw[:32] + (P256_ORDER - s).to_bytes(32))}"
        # It is a signature to whoever knows the public key.
        public = pyjwt.PyJWK(mint._ring.jwks()["keys"][0])
        options = {"verify_exp": False, "verify_iat": False}
        assert pyjwt.decode(other, public, algorithms=["ES256"], options=options)["sub"] == "42"
        with pytest.raises(InvalidToken):
            mint.read_access(other)
        assert mint.read_access(token).subject == ADA


# Algorithm and key confusion


def unsigned(header: dict[str, object], claims: dict[str, object]) -> str:
    return ".".join([*(encode_base64url(json.dumps(part).encode()) for part in (header, claims)), ""])


CLAIMS = {
    "iss": "https://auth.test",
    "sub": "42",
    "inc": ADA.incarnation,
    "sid": encode_base64url(SESSION),
    "iat": NOW,
    "exp": NOW + 9,
}


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "", None, "HS256", "ES256"])
@pytest.mark.parametrize("kid", ["es-1", "ed-1", "shared"])
def test_an_unsigned_token_is_invalid(mint: TokenMint, algorithm: str | None, kid: str) -> None:
    for kind in ("at+jwt", "JWT"):
        with pytest.raises(InvalidToken):
            mint.read_access(unsigned({"typ": kind, "alg": algorithm, "kid": kid}, CLAIMS))


@pytest.mark.parametrize("kid", ["es-1", "ed-1"])
def test_a_public_key_is_no_shared_secret(mint: TokenMint, kid: str) -> None:
    """The classic: the verifier takes the public key, in any of its texts, as the secret of HS256."""
    [published] = [key for key in mint._ring.jwks()["keys"] if key["kid"] == kid]
    public = pyjwt.PyJWK(published | {"alg": "EdDSA" if kid == "ed-1" else "ES256"}).key
    texts = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        msgspec.json.encode(published),
        decode_base64url(published["x"]),
    ]
    for text in texts:
        for named in (kid, "shared"):
            signed, _, _ = unsigned({"typ": "JWT", "alg": "HS256", "kid": named}, CLAIMS).rpartition(".")
            with pytest.raises(InvalidToken):
                mint.read_access(f"{signed}.{encode_base64url(hmac.digest(text, signed.encode(), 'sha256'))}")


def test_the_kid_decides_the_key_and_the_key_the_algorithm(mint: TokenMint) -> None:
    for kid in ("es-1", "ed-1"):
        mint.read_access(forge(mint, kid))
    for header in (
        {"kid": "ed-1"},
        {"kid": "shared"},
        {"kid": "es-9"},
        {"kid": ""},
        {"kid": None},
        {"kid": 1},
        {"kid": ["es-1"]},
    ):
        with pytest.raises(InvalidToken):
            mint.read_access(_with_header(mint, header))


def test_a_key_in_the_header_is_not_looked_at(mint: TokenMint) -> None:
    own = ECKey.generate_key("P-256", private=True)
    for extra in (
        {"jwk": own.as_dict(private=False)},
        {"jku": "https://evil.test/jwks.json"},
        {"x5u": "https://evil.test"},
    ):
        header = {"typ": "at+jwt", "alg": "ES256", "kid": "es-1", **extra}
        with pytest.raises(InvalidToken):
            mint.read_access(jose_jwt.encode(header, CLAIMS, own, algorithms=["ES256"]))


def test_a_type_that_is_not_the_keys_is_invalid(mint: TokenMint) -> None:
    """What is signed for another purpose is no access token."""
    for kind in ("JWT", "logout+jwt", "", None, 1, "at+jwt2"):
        with pytest.raises(InvalidToken):
            mint.read_access(_with_header(mint, {"typ": kind}))
    mint.read_access(forge(mint, "shared", header={"typ": "JWT"}))
    with pytest.raises(InvalidToken):
        mint.read_access(forge(mint, "shared", header={"typ": "at+jwt"}))


def test_an_unknown_critical_header_is_refused(mint: TokenMint) -> None:
    with pytest.raises(InvalidToken):
        mint.read_access(_with_header(mint, {"crit": ["exp"], "exp": 1}))


def _with_header(mint: TokenMint, changes: dict[str, object]) -> str:
    """A token of es-1's signature whose header says something else."""
    key = mint._ring.find_signing_key("es-1")
    assert key is not None
    header = {"typ": "at+jwt", "alg": "ES256", "kid": "es-1"} | changes
    signed = ".".join(encode_base64url(json.dumps(part).encode()) for part in (header, CLAIMS))
    algorithm = pyjwt.get_algorithm_by_name("ES256")
    signature = algorithm.sign(signed.encode(), algorithm.from_jwk(key.key.as_dict(private=True)))
    return lower_s(f"{signed}.{encode_base64url(signature)}")


def test_the_forger_of_these_tests_makes_valid_tokens(mint: TokenMint) -> None:
    assert mint.read_access(_with_header(mint, {})).user_id == 42
    assert mint.read_access(forge(mint)).user_id == 42


# Refresh tokens


@given(
    st.builds(
        RefreshToken,
        key_id=st.just(1),
        user_id=st.integers(0, 2**64 - 1),
        incarnation=st.integers(0, 2**32 - 1),
        session_id=st.binary(min_size=16, max_size=16),
        epoch=st.integers(0, 2**32 - 1),
        counter=st.integers(0, 2**64 - 1),
        created_ms=st.integers(0, 2**64 - 1),
        issued_ms=st.integers(0, 2**64 - 1),
        expires_ms=st.integers(NOW * 1000 + 1, 2**64 - 1),
        authenticated_s=st.integers(0, 2**32 - 1),
        factors=st.integers(0, 255),
        kind=st.integers(0, 255),
    )
)
def test_a_refresh_token_comes_back_from_equal_bytes(make_settings, token: RefreshToken) -> None:
    mint = make_mint(make_settings)
    text = mint.make_refresh(token)
    assert mint.read_refresh(text) == token
    assert mint.make_refresh(token) == text


def test_equal_fields_give_equal_bytes_on_every_replica_and_after_a_rotation(make_settings) -> None:
    """So the repeated answer is the same successor, also when the MAC key rotated within the grace."""
    settings = make_settings()
    first, second = (TokenMint(settings.section(MintSettings), make_ring(), Clock()) for _ in range(2))
    text = first.make_refresh(TOKEN)
    clock = Clock(NOW + 200)
    later = TokenMint(settings.section(MintSettings), make_ring(), clock)
    assert later.mac_key_id() == 2
    assert second.make_refresh(TOKEN) == later.make_refresh(TOKEN) == text


def test_a_refresh_token_is_these_bytes(mint: TokenMint) -> None:
    """The form of tokens that are out there for months: it cannot change without a new version."""
    text = mint.make_refresh(TOKEN)
    raw = decode_base64url(text.removeprefix("v2."))
    assert raw[:-32].hex(" ", -4) == (
        "00000001 00000000 0000002a fedcba98 00010203 04050607 08090a0b 0c0d0e0f 00000003 00000000 00000007"
        " 000001a3 185c28f0 000001a3 185c5000 000001a3 185d3a60 6b49d1f5 01010000"
    )
    # HKDF's second step (RFC 5869) gives this kind a key of its own.
    key = hmac.digest(MAC_1.secret, b"authd token refresh\1", "sha256")
    assert raw[-32:] == hmac.digest(key, b"v2." + raw[:-32], "sha256")
    assert text == GOLDEN_V2


def test_a_refresh_token_of_version_1_is_read_and_knows_no_incarnation(mint: TokenMint) -> None:
    expected = msgspec.structs.replace(TOKEN, incarnation=0, authenticated_s=NOW - 10)
    assert mint.read_refresh(TEXT_V1) == expected
    for index in range(3, len(TEXT_V1)):
        with pytest.raises(InvalidToken):
            mint.read_refresh(TEXT_V1[:index] + ("A" if TEXT_V1[index] != "A" else "B") + TEXT_V1[index + 1 :])
    clock = Clock(NOW + 60)
    mint._clock = clock
    with pytest.raises(ExpiredToken):
        mint.read_refresh(TEXT_V1)


def test_a_refresh_token_ends_with_its_last_millisecond(make_settings) -> None:
    clock = Clock()
    mint = TokenMint(make_settings().section(MintSettings), make_ring(), clock)
    text = mint.make_refresh(TOKEN)
    clock.now = NOW + 59.999
    assert mint.read_refresh(text) == TOKEN
    clock.now = NOW + 60
    with pytest.raises(ExpiredToken):
        mint.read_refresh(text)


def test_any_changed_character_of_a_refresh_token_is_noticed(mint: TokenMint) -> None:
    text = mint.make_refresh(TOKEN)
    for index, character in enumerate(text):
        for other in {"A", "B", "_", "-", "=", ".", " ", "\n", "é", character.swapcase()} - {character}:
            with pytest.raises(InvalidToken) as caught:
                mint.read_refresh(text[:index] + other + text[index + 1 :])
            assert caught.type is InvalidToken


def test_only_the_one_text_of_a_refresh_token_is_accepted(mint: TokenMint) -> None:
    text = mint.make_refresh(TOKEN)
    for other in (
        text[:-1],
        text + "A",
        text + "=",
        text + "==",
        f" {text}",
        text + "\n",
        "V2." + text[3:],
        "v1." + text[3:],
        "v3." + text[3:],
    ):
        with pytest.raises(InvalidToken):
            mint.read_refresh(other)
    standard = text.replace("_", "/").replace("-", "+")
    assert standard != text
    with pytest.raises(InvalidToken):
        mint.read_refresh(standard)


def test_the_mac_holds_every_field_to_its_key(mint: TokenMint) -> None:
    text = mint.make_refresh(TOKEN)
    raw = decode_base64url(text[3:])
    assert raw is not None
    for index in range(len(raw)):
        changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
        with pytest.raises(InvalidToken):
            mint.read_refresh("v2." + encode_base64url(changed))


def test_an_expired_token_is_called_expired_only_with_a_true_mac(mint: TokenMint) -> None:
    text = mint.make_refresh(msgspec.structs.replace(TOKEN, expires_ms=1))
    with pytest.raises(ExpiredToken):
        mint.read_refresh(text)
    with pytest.raises(InvalidToken) as caught:
        mint.read_refresh(text[:-4] + ("AAAA" if not text.endswith("AAAA") else "BBBB"))
    assert caught.type is InvalidToken


@given(st.binary(max_size=200))
def test_base64url_comes_back(raw: bytes) -> None:
    assert decode_base64url(encode_base64url(raw)) == raw


@pytest.mark.parametrize(
    "text", ["A", "AB", "AAB", "AA==", "AA=", "A A", "AA\n", "+/AA", "é", "AAAAA", "====", "\ud800"]
)
def test_base64url_has_one_text(text: str) -> None:
    assert decode_base64url(text) is None


# The key ring


def test_a_key_is_published_at_once_and_signs_from_its_time(make_settings) -> None:
    clock = Clock()
    ring = KeyRing([signing("es-2", NOW + 100), signing("es-1")], [MAC_2, MAC_1])
    mint = TokenMint(make_settings().section(MintSettings), ring, clock)
    assert {key["kid"] for key in ring.jwks()["keys"]} == {"es-1", "es-2"}
    old = mint.make_access(ADA, SESSION, 1, "j")
    assert json.loads(split(old)[0])["kid"] == "es-1"
    assert mint.mac_key_id() == 1
    clock.now = NOW + 100
    new = mint.make_access(ADA, SESSION, 1, "j")
    assert json.loads(split(new)[0])["kid"] == "es-2"
    assert mint.mac_key_id() == 2
    for token in (old, new):
        assert mint.read_access(token).user_id == 42


def test_a_clock_that_is_behind_every_key_signs_with_the_oldest(make_settings) -> None:
    ring = KeyRing([signing("es-2", NOW + 100), signing("es-1", NOW + 50)], [MacKey(1, b"m" * 32, NOW + 50), MAC_2])
    mint = TokenMint(make_settings().section(MintSettings), ring, Clock(NOW - 3600))
    assert mint.read_access(mint.make_access(ADA, SESSION, 1, "j")).subject == ADA
    assert ring.signing_key("ES256", NOW - 3600).kid == "es-1"
    assert mint.mac_key_id() == 1


def test_a_derived_key_is_its_purposes_own_and_no_key_shows() -> None:
    key = DataKey(1, b"d" * 32)
    assert len({key.secret, key.derive("digests"), key.derive("others"), DataKey(2, b"e" * 32).derive("digests")}) == 4
    assert repr(key) == "DataKey(1)"


def test_a_replica_that_does_not_sign_with_a_key_yet_proves_with_it(make_settings) -> None:
    """Clocks differ: a replica ahead signs with the new key first."""
    keys = [signing("es-1"), signing("es-2", NOW + 100)]
    ahead, behind = (
        TokenMint(make_settings().section(MintSettings), KeyRing(keys, [MAC_1, MAC_2]), Clock(NOW + s))
        for s in (100, 0)
    )
    assert behind.read_access(ahead.make_access(ADA, SESSION, 1, "j")).user_id == 42
    token = msgspec.structs.replace(TOKEN, key_id=ahead.mac_key_id())
    assert behind.read_refresh(ahead.make_refresh(token)) == token


def test_a_replaced_ring_counts_at_once_and_a_retired_key_proves_nothing(make_settings) -> None:
    ring = KeyRing([signing("es-1")], [MAC_1])
    mint = TokenMint(make_settings().section(MintSettings), ring, Clock())
    access, refresh = mint.make_access(ADA, SESSION, 1, "j"), mint.make_refresh(TOKEN)
    ring.replace([signing("es-2")], [MacKey(3, b"3" * 32, 0)])
    for read, text in ((mint.read_access, access), (mint.read_refresh, refresh)):
        with pytest.raises(InvalidToken):
            read(text)
    with pytest.raises(InvalidToken):
        mint.make_refresh(TOKEN)
    assert mint.mac_key_id() == 3
    assert mint.read_access(mint.make_access(ADA, SESSION, 1, "j")).user_id == 42


def test_after_a_change_of_the_algorithm_the_old_tokens_still_count(make_settings) -> None:
    old = make_mint(make_settings, "ES256").make_access(ADA, SESSION, 1, "j")
    assert make_mint(make_settings, "Ed25519").read_access(old).user_id == 42


def test_published_keys_are_public_and_the_shared_one_is_none_of_them() -> None:
    published = make_ring().jwks()["keys"]
    assert {key["kid"] for key in published} == {"es-1", "ed-1"}
    for key in published:
        assert key["use"] == "sig"
        assert not {"d", "k", "p", "q"} & key.keys()
    assert SHARED not in str(published)
    assert KeyRing([shared_signing_key(Secret(SHARED))], [MAC_1]).jwks() == {"keys": []}


def test_keys_do_not_show_their_secrets() -> None:
    shown = repr([signing("es-1"), shared_signing_key(Secret(SHARED)), MAC_1])
    assert shown == "[SigningKey('es-1', 'ES256'), SigningKey('shared', 'HS256'), MacKey(1)]"


# The seal

OLD, NEW, NONE = Secret("the-old-master-secret-of-32-bytes"), Secret("the-new-master-secret-of-32-bytes"), Secret("")


def test_a_sealed_key_opens_under_its_secret_and_label() -> None:
    seal = KeySeal(NEW, NONE)
    sealed = seal.seal(b"a key", label="mac/1")
    assert seal.open(sealed, label="mac/1") == b"a key"
    assert "key" not in str(split(sealed)[-2])


def test_two_seals_of_one_key_differ() -> None:
    seal = KeySeal(NEW, NONE)
    assert seal.seal(b"a key", label="mac/1") != seal.seal(b"a key", label="mac/1")


def test_rows_cannot_be_swapped() -> None:
    seal = KeySeal(NEW, NONE)
    with pytest.raises(InvalidToken):
        seal.open(seal.seal(b"a key", label="mac/1"), label="ES256/1")


def test_another_secret_opens_nothing() -> None:
    with pytest.raises(InvalidToken):
        KeySeal(NEW, NONE).open(KeySeal(OLD, NONE).seal(b"a key", label="mac/1"), label="mac/1")


def test_the_previous_secret_opens_and_the_new_one_seals() -> None:
    both = KeySeal(NEW, OLD)
    assert both.open(KeySeal(OLD, NONE).seal(b"a key", label="mac/1"), label="mac/1") == b"a key"
    assert KeySeal(NEW, NONE).open(both.seal(b"a key", label="mac/1"), label="mac/1") == b"a key"


def test_any_changed_byte_of_a_seal_is_noticed() -> None:
    seal = KeySeal(NEW, NONE)
    sealed = seal.seal(b"a key", label="mac/1")
    for index, part in enumerate(sealed.split(".")):
        raw = split(sealed)[index]
        changed = bytes([raw[0] ^ 1]) + raw[1:] if raw else b"x"
        parts = sealed.split(".")
        parts[index] = urlsafe_b64encode(changed).rstrip(b"=").decode()
        assert parts[index] != part
        with pytest.raises(InvalidToken):
            seal.open(".".join(parts), label="mac/1")


@pytest.mark.parametrize("text", ["", "x", "a.b.c.d.e", "....", "é", "\0"])
def test_junk_is_no_seal(text: str) -> None:
    with pytest.raises(InvalidToken):
        KeySeal(NEW, NONE).open(text, label="mac/1")
