"""What other services do with our tokens, and what attackers do."""

import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import anyio
import httpx
import jose.jwt
import jwt
import pytest
from anyio import to_thread
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from support.api import Account, Api, assert_problem
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

JWT_SECRET = "the secret that every older service of this team holds"
ADDED_CLAIMS = {"iss", "jti", "sid", "epoch", "inc"}


@pytest.fixture(scope="module")
async def hs256(services: Services) -> AsyncIterator[ServiceProcess]:
    async with services.running(AUTHD_JWT_ALGORITHM="HS256", AUTHD_JWT_SECRET=JWT_SECRET) as process:
        yield process


@pytest.fixture
async def hs256_api(hs256: ServiceProcess) -> AsyncIterator[Api]:
    async with hs256.api() as api:
        yield api


@pytest.fixture
async def account(api: Api) -> Account:
    return await api.new_account()


@pytest.fixture
async def pair(api: Api, account: Account) -> dict[str, Any]:
    return await api.new_session(account)


def encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def parts(token: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Header, claims and signature."""
    header, claims, signature = token.split(".")
    return json.loads(decode(header)), json.loads(decode(claims)), signature


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: str = "") -> str:
    return f"{encode(json.dumps(header).encode())}.{encode(json.dumps(claims).encode())}.{signature}"


async def jwks(api: Api) -> dict[str, Any]:
    answer = await api.get("/.well-known/jwks.json")
    assert answer.status_code == 200
    assert "max-age" in answer.headers["Cache-Control"]
    body: dict[str, Any] = answer.json()
    return body


async def fetch_signing_key(service: ServiceProcess, token: str) -> jwt.PyJWK:
    """By the code of a service that uses PyJWT."""
    client = jwt.PyJWKClient(f"{service.url}/.well-known/jwks.json")
    return await to_thread.run_sync(client.get_signing_key_from_jwt, token)


async def assert_refused(api: Api, *tokens: str) -> None:
    for token in tokens:
        assert_problem(await api.me(token), 401, "token_invalid")


# Verified by other services


async def test_an_hs256_token_is_read_by_the_code_of_an_existing_service(hs256_api: Api) -> None:
    account = await hs256_api.new_account()
    token = (await hs256_api.new_session(account))["access_token"]
    payload = jose.jwt.decode(token, JWT_SECRET, algorithms=["HS256"])
    assert int(payload["sub"]) == account.user_id
    assert isinstance(payload["sub"], str)
    assert payload.keys() == {"sub", "exp", "iat", *ADDED_CLAIMS}
    assert (type(payload["exp"]), type(payload["iat"])) == (int, int)
    assert payload["exp"] - payload["iat"] == 1800
    assert abs(payload["iat"] - time.time()) < 60
    assert jwt.decode(token, JWT_SECRET, algorithms=["HS256"]) == payload
    assert jwt.get_unverified_header(token)["typ"] == "JWT"


async def test_no_public_keys_are_shown_in_hs256_mode(hs256_api: Api) -> None:
    assert await jwks(hs256_api) == {"keys": []}


async def test_an_es256_token_is_verified_with_the_published_keys(
    service: ServiceProcess, account: Account, pair: dict[str, Any]
) -> None:
    token = pair["access_token"]
    key = await fetch_signing_key(service, token)
    payload = jwt.decode(token, key, algorithms=["ES256"])
    assert payload["sub"] == str(account.user_id)
    assert payload.keys() == {"sub", "exp", "iat", *ADDED_CLAIMS}
    assert jwt.get_unverified_header(token) == {"typ": "at+jwt", "alg": "ES256", "kid": key.key_id}


async def test_published_keys_are_public_ones(api: Api) -> None:
    [key] = (await jwks(api))["keys"]
    assert key.keys() == {"kty", "crv", "x", "y", "kid", "alg", "use"}
    assert (key["kty"], key["crv"], key["alg"], key["use"]) == ("EC", "P-256", "ES256", "sig")


async def test_an_audience_appears_when_one_is_configured_and_ed25519_and_expiry_work(services: Services) -> None:
    settings = {"AUTHD_JWT_ALGORITHM": "Ed25519", "AUTHD_ACCESS_TTL_S": "2", "AUTHD_AUDIENCE": "shop"}
    async with services.running(**settings) as process, process.api() as api:
        pair = await api.new_session(await api.new_account())
        assert pair["expires_in"] == 2
        token = pair["access_token"]
        header, claims, signature = parts(token)
        assert claims["aud"] == "shop"
        assert (header["alg"], header["typ"]) == ("Ed25519", "at+jwt")
        # PyJWT 2.15 does not know the name of RFC 9864 yet.
        [key] = (await jwks(api))["keys"]
        assert (key["kty"], key["crv"], key["alg"], key["kid"]) == ("OKP", "Ed25519", "Ed25519", header["kid"])
        public = Ed25519PublicKey.from_public_bytes(decode(key["x"]))
        public.verify(decode(signature), token.rpartition(".")[0].encode())
        assert (await api.me(token)).status_code == 200

        async def is_expired() -> bool:
            return (await api.me(token)).status_code == 401

        await eventually(is_expired, 5)
        assert_problem(await api.me(token), 401, "token_invalid")
        assert time.time() >= claims["exp"]
        fresh = (await api.refresh(pair["refresh_token"])).json()["access_token"]
        assert (await api.me(fresh)).status_code == 200


async def test_every_token_has_its_own_id_and_the_tokens_of_a_session_share_its_id(
    api: Api, account: Account, pair: dict[str, Any]
) -> None:
    tokens = [pair, (await api.refresh(pair["refresh_token"])).json(), await api.new_session(account)]
    claims = [parts(token["access_token"])[1] for token in tokens]
    assert len({each["jti"] for each in claims}) == 3
    assert claims[0]["sid"] == claims[1]["sid"] != claims[2]["sid"]


# Access tokens under attack


async def test_what_is_no_token_is_refused(api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = pair["access_token"].split(".")
    garbage = ["x", "a.b", "a.b.c", "..", "...", "%00", "a" * 4000, "null", '{"alg":"none"}', "Bearer", "é"]
    mixed = [f"{header}.{claims}", f"{header}.{claims}.", f"{header}..{signature}", f".{claims}.{signature}"]
    for token in [*garbage, *mixed, f"{header}.{claims}.{signature}.", f"{header}.{claims}.{signature}.{signature}"]:
        answer = await api.get("/auth/me", headers=[(b"Authorization", b"Bearer " + token.encode())])
        assert_problem(answer, 401)
    for scheme in ("Basic", "Token", "Bearerx"):
        answer = await api.get("/auth/me", headers={"Authorization": f"{scheme} {pair['access_token']}"})
        assert_problem(answer, 401, "token_missing")
    # The scheme's name may be written in any case.
    assert (await api.get("/auth/me", headers={"Authorization": f"bearer {pair['access_token']}"})).status_code == 200


async def test_a_refresh_token_is_no_access_token_and_the_other_way_round(api: Api, pair: dict[str, Any]) -> None:
    await assert_refused(api, pair["refresh_token"])
    assert_problem(await api.refresh(pair["access_token"]), 401, "refresh_token_invalid")


async def test_a_token_without_a_signature_is_refused(api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = parts(pair["access_token"])
    for alg in ("none", "None", "NONE", "nOnE", "", None):
        await assert_refused(api, unsigned(header | {"alg": alg}, claims))
        await assert_refused(api, unsigned(header | {"alg": alg}, claims, signature))
    del header["alg"]
    await assert_refused(api, unsigned(header, claims))


async def test_a_token_signed_with_another_key_is_refused(api: Api, pair: dict[str, Any]) -> None:
    header, claims, _ = parts(pair["access_token"])
    key = ec.generate_private_key(ec.SECP256R1())
    await assert_refused(api, jwt.encode(claims, key, algorithm="ES256", headers=header))
    # A key that the attacker sends along is no key.
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    more = {"jwk": public, "jku": "https://example.com/jwks.json", "x5u": "https://example.com/x5u"}
    await assert_refused(api, jwt.encode(claims, key, algorithm="ES256", headers=header | more))


async def test_a_public_key_is_no_hmac_secret(api: Api, pair: dict[str, Any]) -> None:
    header, claims, _ = parts(pair["access_token"])
    [published] = (await jwks(api))["keys"]
    public = jwt.PyJWK(published).key
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    raw = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    jwk = [json.dumps(published).encode(), json.dumps(published, separators=(",", ":")).encode()]
    for secret in (pem, pem.strip(), der, raw, decode(published["x"]), published["x"].encode(), *jwk, b""):
        for changed in ({}, {"kid": "shared"}, {"typ": "JWT"}):
            body = unsigned(header | {"alg": "HS256"} | changed, claims).rstrip(".")
            await assert_refused(api, f"{body}.{hmac_signature(body, secret)}")


def hmac_signature(body: str, secret: bytes, digest: str = "sha256") -> str:
    """By hand: PyJWT refuses to sign with a public key, and an attacker does not."""
    return encode(hmac.digest(secret, body.encode(), digest))


async def test_a_wrong_key_id_is_refused(api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = parts(pair["access_token"])
    kids = ["", "0", "shared", "../../etc/passwd", "' OR 1=1 --", header["kid"].upper() + "x", None, 1, [], {}, "é\0"]
    for kid in kids:
        await assert_refused(api, unsigned(header | {"kid": kid}, claims, signature))
    del header["kid"]
    await assert_refused(api, unsigned(header, claims, signature))


async def test_an_algorithm_that_is_not_the_keys_own_is_refused(api: Api, hs256_api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = parts(pair["access_token"])
    for alg in (
        "HS256",
        "HS512",
        "ES384",
        "ES512",
        "RS256",
        "PS256",
        "EdDSA",
        "Ed25519",
        "es256",
        "ES256 ",
        ["ES256"],
        1,
    ):
        await assert_refused(api, unsigned(header | {"alg": alg}, claims, signature))
    shared = await hs256_api.new_session(await hs256_api.new_account())
    header, claims, _ = parts(shared["access_token"])
    for algorithm in ("HS384", "HS512"):
        await assert_refused(hs256_api, jws(header | {"alg": algorithm}, claims, algorithm))
    await assert_refused(hs256_api, unsigned(header | {"alg": "none"}, claims))


async def test_tampered_claims_and_headers_are_refused(api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = parts(pair["access_token"])
    for change in ({"sub": "1"}, {"exp": claims["exp"] + 9999}, {"sid": encode(bytes(16))}, {"admin": True}):
        await assert_refused(api, unsigned(header, claims | change, signature))
    for change in ({"typ": "JWT"}, {"typ": None}, {"crit": ["exp"]}, {"b64": False}, {"zip": "DEF"}):
        await assert_refused(api, unsigned(header | change, claims, signature))


def flipped(token: str) -> Iterator[str]:
    """The token with one character changed, at each of its positions in turn."""
    for position, character in enumerate(token):
        yield token[:position] + ("A" if character != "A" else "B") + token[position + 1 :]


async def test_a_token_with_any_character_changed_is_refused(api: Api, pair: dict[str, Any]) -> None:
    await assert_refused(api, *list(flipped(pair["access_token"]))[::7])


async def test_a_second_spelling_of_a_token_is_refused(api: Api, pair: dict[str, Any]) -> None:
    token = pair["access_token"]
    assert (await api.me(token)).status_code == 200
    header, claims, signature = token.split(".")
    raw = decode(signature)
    # 64 bytes leave four bits of the last character unused, which decoders tend to ignore.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twins = [signature[:-1] + last for last in alphabet if last != signature[-1]]
    twins = [twin for twin in twins if decode(twin) == raw]
    assert len(twins) == 15
    padded = [f"{header}.{claims}.{signature}==", f"{header}=.{claims}.{signature}", f"{header}.{claims}=.{signature}"]
    other = [f"{header}.{claims}.{signature[:9]}!{signature[9:]}", f"{header}.{claims}.{signature}\n"]
    standard = f"{header}.{claims}.{base64.b64encode(raw).decode()}"
    for text in [*(f"{header}.{claims}.{twin}" for twin in twins), *padded, other[0], standard]:
        await assert_refused(api, text)


async def test_a_huge_token_is_refused_and_harms_nobody(api: Api, pair: dict[str, Any]) -> None:
    header, claims, signature = parts(pair["access_token"])
    await assert_refused(api, "a" * 10_000, unsigned(header, claims | {"pad": "x" * 8_000}, signature))
    try:
        answer = await api.me("a" * 200_000)
        assert 400 <= answer.status_code < 500
    except httpx.TransportError:
        pass  # closed on us
    assert (await api.me(pair["access_token"])).status_code == 200


async def test_a_forged_token_of_a_holder_of_the_shared_secret_opens_no_session(
    hs256: ServiceProcess, hs256_api: Api
) -> None:
    """Every downstream service can sign in HS256 mode: a session must be one that Redis knows."""
    account = await hs256_api.new_account()
    pair = await hs256_api.new_session(account)
    header, claims, _ = parts(pair["access_token"])
    now = int(time.time())
    changes: list[dict[str, Any]] = [
        {"sid": encode(b"invented-session")},
        {"sid": None},
        {"sid": 7},
        {"sid": "short"},
        {"sub": "0"},
        {"sub": "-1"},
        {"sub": "9" * 19},
        {"sub": "9" * 5000},
        {"sub": "²"},  # a digit to str.isdigit, but no number
        {"sub": account.user_id},
        {"sub": f" {account.user_id}"},
        {"sub": None},
        {"sub": str(account.user_id + 1)},
        {"iss": "another"},
        {"iss": None},
        {"exp": now - 1},
        {"exp": None},
        {"exp": "never"},
        {"exp": True},
        {"exp": 1e400},
        {"exp": -1},
        # One that would be good for 31 years.
        {"exp": now + 10**9},
        {"iat": now + 10**9, "exp": now + 10**9 + 60},
        {"iat": None},
        {"inc": claims["inc"] ^ 1},
        {"inc": str(claims["inc"])},
        {"inc": None},
    ]
    for change in changes:
        await assert_refused(hs256_api, jws(header, claims | change))
    await assert_refused(hs256_api, jws(header | {"typ": "at+jwt"}, claims))
    for claim in ("sub", "inc", "sid", "iss", "iat", "exp"):
        await assert_refused(hs256_api, jws(header, {name: v for name, v in claims.items() if name != claim}))
    for body in (b"[]", b'"x"', b"null", b"{", b"\xff", b"[" * 3000, b'{"sub": "\\ud800"}'):
        head = encode(json.dumps(header).encode())
        await assert_refused(
            hs256_api, f"{head}.{encode(body)}.{hmac_signature(f'{head}.{encode(body)}', JWT_SECRET.encode())}"
        )
    assert (await hs256_api.me(jws(header, claims))).status_code == 200
    await hs256.wipe_redis()
    await assert_refused(hs256_api, pair["access_token"], jws(header, claims | {"sid": encode(b"invented-session")}))
    # The refresh token, which only we can make, brings the session back.
    fresh = await hs256_api.refresh(pair["refresh_token"])
    assert (await hs256_api.me(fresh.json()["access_token"])).status_code == 200


def jws(header: dict[str, Any], claims: dict[str, Any], algorithm: str = "HS256") -> str:
    """What a service that holds the shared secret can sign."""
    body = unsigned(header, claims).rstrip(".")
    return f"{body}.{hmac_signature(body, JWT_SECRET.encode(), 'sha' + algorithm[2:])}"


# Refresh tokens under attack

#: Bytes in the token's wire form: see authd.tokens.refresh.
REFRESH_FIELDS = {
    "key id": 0,
    "user id": 11,
    "incarnation": 15,
    "session": 20,
    "epoch": 35,
    "counter": 43,
    "created": 51,
    "issued": 59,
    "expires": 67,
    "authenticated": 71,
    "factors": 72,
    "kind": 73,
    "filling": 75,
    "first byte of the mac": 76,
    "last byte of the mac": 107,
}


async def test_a_refresh_token_with_one_bit_changed_is_refused(api: Api, pair: dict[str, Any]) -> None:
    token = pair["refresh_token"]
    raw = decode(token.removeprefix("v2."))
    for name, position in REFRESH_FIELDS.items():
        for bit in (1, 128):
            changed = bytearray(raw)
            changed[position] ^= bit
            answer = await api.refresh(f"v2.{encode(bytes(changed))}")
            assert answer.status_code == 401, name
            assert_problem(answer, 401, "refresh_token_invalid")
    assert (await api.refresh(token)).status_code == 200


async def test_a_refresh_token_in_another_form_is_refused(api: Api, pair: dict[str, Any]) -> None:
    token = pair["refresh_token"]
    body = token.removeprefix("v2.")
    spaced = [f" {token}", f"{token} ", f"{token}\n", f"{token[:50]} {token[50:]}", f"v2. {body}"]
    cut = [token[:-1], token[:-4], token[:50], "v2.", "v2", "v", "", body, token + "A", token + "AAAA", token * 2]
    other = [f"v1.{body}", f"V2.{body}", f"{token}=", token.swapcase(), token[:-1] + "é", token[:-1] + "\0", "x" * 9000]
    for text in [*spaced, *cut, *other]:
        assert_problem(await api.refresh(text), 401, "refresh_token_invalid")
    assert (await api.refresh(token)).status_code == 200


async def test_tokens_of_another_deployment_are_refused(api: Api, hs256_api: Api) -> None:
    """Of the same user id, as two deployments that start empty have."""
    account = await api.new_account()
    foreign = await hs256_api.new_account()
    while foreign.user_id < account.user_id:
        foreign = await hs256_api.new_account()
    while account.user_id < foreign.user_id:
        account = await api.new_account()
    assert account.user_id == foreign.user_id
    theirs = await hs256_api.new_session(foreign)
    await api.new_session(account)
    assert_problem(await api.refresh(theirs["refresh_token"]), 401, "refresh_token_invalid")
    await assert_refused(api, theirs["access_token"])
    with anyio.fail_after(5):
        assert (await hs256_api.me(theirs["access_token"])).status_code == 200
