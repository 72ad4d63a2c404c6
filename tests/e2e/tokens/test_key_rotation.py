"""Keys that change under running replicas, and the secret that seals them."""

import base64
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio
import httpx
import jwt
import pytest
from anyio import to_thread
from support.api import Api
from support.process import ServiceProcess
from support.services import Services
from support.waiting import eventually

from authd.embedded.processes import free_port

OLD, NEW, OTHER = (f"{name} secret of this deployment, long enough" for name in ("the old", "the new", "another"))
PUBLISH_S = 3
#: A verifier's, in proportion: by default it is 300 s, and a key is published for 900 s before it signs.
CACHE_S = 1
ROTATIONS = 3
DEVICES = 4


class CachingVerifier:
    """A service that reads the published keys as often as their header asks for, and never for a key it does not know:
    nothing else shows whether a key is published for long enough before it signs.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._keys: dict[str, Any] = {}
        self._until = 0.0

    async def verify(self, token: str) -> dict[str, Any]:
        if time.monotonic() >= self._until:
            asked = time.monotonic()
            answer = await self._api.get("/.well-known/jwks.json")
            self._keys = {key["kid"]: jwt.PyJWK(key) for key in answer.json()["keys"]}
            self._until = asked + float(answer.headers["Cache-Control"].rpartition("max-age=")[2])
        key = self._keys[jwt.get_unverified_header(token)["kid"]]
        claims: dict[str, Any] = jwt.decode(token, key, algorithms=["ES256"])
        return claims


class Tally:
    """What a load saw."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.kids: Counter[str] = Counter()
        self.mac_keys: Counter[int] = Counter()
        self.pairs: list[dict[str, Any]] = []


def mac_key(refresh_token: str) -> int:
    """The number of the key that made it: the first field."""
    text = refresh_token.removeprefix("v2.")
    return int.from_bytes(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))[:4])


async def published(api: Api) -> list[str]:
    answer = await api.get("/.well-known/jwks.json")
    return sorted(key["kid"] for key in answer.json()["keys"])


async def kid_of_new_token(api: Api, pair: dict[str, Any]) -> str:
    """Refreshes the pair in place."""
    answer = await api.refresh(pair["refresh_token"])
    assert answer.status_code == 200, answer.text
    pair.update(answer.json())
    return str(jwt.get_unverified_header(pair["access_token"])["kid"])


async def until_signed_with_another_key(api: Api, pair: dict[str, Any], before: str) -> None:
    async def is_another() -> bool:
        return await kid_of_new_token(api, pair) != before

    await eventually(is_another)


@pytest.fixture(scope="module")
async def service(services: Services) -> AsyncIterator[ServiceProcess]:
    async with services.running(AUTHD_KEY_PUBLISH_S=str(PUBLISH_S)) as process:
        yield process


@pytest.fixture(scope="module")
async def second(services: Services, service: ServiceProcess) -> AsyncIterator[ServiceProcess]:
    async with services.replica(service) as process:
        yield process


async def test_two_replicas_that_start_together_on_an_empty_database_agree_on_one_key(services: Services) -> None:
    async with services.prepared(empty=True) as one, services.replica(one) as two:
        async with anyio.create_task_group() as group:
            group.start_soon(one.start)
            group.start_soon(two.start)
        async with one.api() as api, two.api() as elsewhere:
            assert await published(api) == await published(elsewhere)
            assert len(await published(api)) == 1
            pair = await api.new_session(await elsewhere.new_account())
            assert (await elsewhere.me(pair["access_token"])).status_code == 200
            assert (await elsewhere.refresh(pair["refresh_token"])).status_code == 200
        keys = await one.query("SELECT purpose FROM keys ORDER BY purpose")
        assert [row["purpose"] for row in keys] == ["ES256", "data", "mac"]


async def test_keys_that_are_too_old_are_rotated_by_the_replicas_once(services: Services) -> None:
    settings = {"AUTHD_KEY_MAX_AGE_S": "60", "AUTHD_KEY_PUBLISH_S": "1"}
    async with (
        services.running(**settings) as one,
        services.replica(one) as two,
        one.api() as api,
        two.api() as elsewhere,
    ):
        [first] = await published(api)
        pair = await api.new_session(await api.new_account())
        old = dict(pair)
        await one.query("UPDATE keys SET created_at = created_at - interval '60 seconds'")
        await until_signed_with_another_key(elsewhere, pair, first)
        await until_signed_with_another_key(api, pair, first)
        assert await published(api) == await published(elsewhere)
        rows = await one.query("SELECT purpose FROM keys ORDER BY purpose")
        assert [row["purpose"] for row in rows] == ["ES256", "ES256", "data", "mac", "mac"]
        assert (await elsewhere.me(old["access_token"])).status_code == 200
        assert (await api.me(pair["access_token"])).status_code == 200


# Under load


@pytest.mark.proof
async def test_nobody_notices_that_keys_change(service: ServiceProcess, second: ServiceProcess) -> None:
    tally = Tally()
    async with service.api() as api, second.api() as elsewhere:
        account = await api.new_account()
        tally.pairs = [await api.new_session(account) for _ in range(DEVICES)]
        async with anyio.create_task_group() as load:
            for number in range(DEVICES):
                apis = (api, elsewhere) if number % 2 else (elsewhere, api)
                load.start_soon(refresh_and_verify, number, apis, (service, second), tally)
            for _ in range(ROTATIONS):
                rotated = await service.run("keys", "rotate")
                assert (rotated.returncode, rotated.stderr) == (0, "")
                made = {line.split()[0] for line in rotated.stdout.splitlines()}
                assert len(made) == 2
                await eventually(lambda made=made: tally.failures or made & tally.kids.keys())
            await anyio.sleep(1)
            load.cancel_scope.cancel()
    assert tally.failures == []
    assert len(tally.kids) >= 1 + ROTATIONS
    assert len(tally.mac_keys) >= 1 + ROTATIONS
    assert min(tally.kids.values()) > 1


async def refresh_and_verify(
    number: int, apis: tuple[Api, Api], processes: tuple[ServiceProcess, ServiceProcess], tally: Tally
) -> None:
    """A device that refreshes at one replica, a service that verifies with keys from the other, and PyJWT's client."""
    here, there = apis
    strict = CachingVerifier(there)
    # Within 30 s of its last reading it does not ask again for a key that it does not know.
    client = jwt.PyJWKClient(f"{processes[number % 2].url}/.well-known/jwks.json", lifespan=CACHE_S)
    while True:
        answer = await here.refresh(tally.pairs[number]["refresh_token"])
        if answer.status_code != 200:
            tally.failures.append(answer.text)
            continue
        pair = tally.pairs[number] = answer.json()
        token = pair["access_token"]
        try:
            key = await to_thread.run_sync(client.get_signing_key_from_jwt, token)
            jwt.decode(token, key, algorithms=["ES256"])
            await strict.verify(token)
        except (jwt.PyJWTError, KeyError, httpx.HTTPError) as error:
            tally.failures.append(repr(error))
        me = await there.me(token)
        if me.status_code != 200:
            tally.failures.append(me.text)
        tally.kids[jwt.get_unverified_header(token)["kid"]] += 1
        tally.mac_keys[mac_key(pair["refresh_token"])] += 1
        await anyio.sleep(0.02)


async def test_a_key_is_listed_and_published_before_it_signs(service: ServiceProcess, second: ServiceProcess) -> None:
    async with service.api() as api, second.api() as elsewhere:
        pair = await api.new_session(await api.new_account())
        current, known = await kid_of_new_token(api, pair), set(await published(api))
        rotated_at = time.monotonic()
        made = {line.split()[0] for line in (await service.run("keys", "rotate")).stdout.splitlines()}
        listed = {line.split()[0] for line in (await service.run("keys", "list")).stdout.splitlines()}
        assert made <= listed

        async def is_published_everywhere() -> bool:
            seen = [set(await published(replica)) for replica in (api, elsewhere)]
            assert await kid_of_new_token(elsewhere, pair) == current or time.monotonic() > rotated_at + PUBLISH_S
            return all(keys - known for keys in seen)

        await eventually(is_published_everywhere)
        [next_] = set(await published(api)) - known
        assert next_ in made
        await until_signed_with_another_key(elsewhere, pair, current)
        assert await kid_of_new_token(elsewhere, pair) == next_


async def test_refresh_tokens_outlive_their_mac_key(service: ServiceProcess, second: ServiceProcess) -> None:
    async with service.api() as api, second.api() as elsewhere:
        account = await api.new_account()
        idle, used = await api.new_session(account), await api.new_session(account)
        successor = (await api.refresh(used["refresh_token"])).json()["refresh_token"]
        number = mac_key(idle["refresh_token"])
        await service.run("keys", "rotate")
        probe = await api.new_session(account)

        async def is_rotated() -> bool:
            probe.update((await elsewhere.refresh(probe["refresh_token"])).json())
            return mac_key(probe["refresh_token"]) != number

        await eventually(is_rotated)
        # A repeat within the grace gets the successor that the earlier key made.
        for replica in (api, elsewhere):
            assert (await replica.refresh(used["refresh_token"])).json()["refresh_token"] == successor
        renewed = (await elsewhere.refresh(idle["refresh_token"])).json()
        assert mac_key(renewed["refresh_token"]) > number
        assert (await api.me(renewed["access_token"])).status_code == 200
        assert (await api.refresh(renewed["refresh_token"])).status_code == 200
        assert (await api.refresh(successor)).status_code == 200


# The secret


async def test_after_a_change_of_the_secret_everything_goes_on(services: Services) -> None:
    async with services.running(AUTHD_SECRET=OLD) as before, before.api() as api:
        account = await api.new_account()
        pair = await api.new_session(account)
        keys = await published(api)
        secrets = {"AUTHD_SECRET": NEW, "AUTHD_SECRET_PREVIOUS": OLD}
        async with services.replica(before, **secrets) as after, after.api() as elsewhere:
            assert await published(elsewhere) == keys
            assert (await elsewhere.me(pair["access_token"])).status_code == 200
            assert (await elsewhere.refresh(pair["refresh_token"])).status_code == 200
            assert await before.stop() == 0
            assert (await after.run("keys", "rotate")).returncode == 0
            # A start opens the old keys, and the new ones.
            assert await after.stop() == 0
            await after.start()
            assert len(await published(elsewhere)) == 2
            assert (await elsewhere.me(pair["access_token"])).status_code == 200


async def test_a_start_with_a_wrong_secret_is_refused_with_a_sentence(services: Services) -> None:
    async with services.running(AUTHD_SECRET=OLD) as process, process.api() as api:
        keys = await published(api)
        rows = await process.query("SELECT * FROM keys ORDER BY id")
        for arguments in (("serve",), ("keys", "rotate")):
            bind = f"127.0.0.1:{free_port()}"
            refused = await process.run(*arguments, AUTHD_SECRET=OTHER, AUTHD_BIND=bind)
            assert refused.returncode == 1, refused
            errors = [line for line in refused.stderr.splitlines() if not line.startswith("{")]
            assert len(errors) == 1
            assert errors[0].startswith("authd: Key ")
            assert "AUTHD_SECRET_PREVIOUS" in errors[0]
            assert OTHER not in refused.stderr + refused.stdout
        assert await process.query("SELECT * FROM keys ORDER BY id") == rows
        assert await published(api) == keys
        pair = await api.new_session(await api.new_account())
        assert (await api.me(pair["access_token"])).status_code == 200
