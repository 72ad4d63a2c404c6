"""The worst text that the limits of each endpoint allow: how much of it is normalised, counted in the real process."""

import base64
import os
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from support.api import Credentials, assert_problem
from support.paths import TESTS
from support.process import ServiceProcess
from support.services import Services

from authd.infra.http.reading import FORM_BYTES_MAX
from authd.infra.text import MARKS_MAX
from authd.passwords.formats import PASSWORD_INPUT_CHARS_MAX
from authd.users.usernames import USERNAME_CHARS_MAX

COUNTING = TESTS / "support" / "counting"
NUMBERS = struct.Struct("qq")
#: The highest settings, and as many code points of four bytes as go into each.
BODY_BYTES_MAX, HEADER_BYTES_MAX = 1_048_576, 262_144
BODY_CHARS, HEADER_CHARS, TARGET_CHARS = 250_000, 20_000, 600
#: Beside the other fields of a form, which has a bound of its own.
FORM_CHARS = (FORM_BYTES_MAX - 400) // 4
USERNAME, PASSWORD = "ada@example.com", "correct horse battery"
#: Each code point of a text is looked at a few times; email-validator looks at a window of 32 for each.
LOOKS_MAX = 8
USERNAME_MAX = (LOOKS_MAX + 32) * USERNAME_CHARS_MAX
PASSWORD_MAX = LOOKS_MAX * PASSWORD_INPUT_CHARS_MAX
#: For a short address beside the text in question.
BESIDE_MAX = 32 * len(USERNAME)
#: One ligature of these is 18 code points.
LIGATURE = "\ufdfa"


def filled(unit: str, length: int) -> str:
    return (unit * length)[:length]


def marks(length: int) -> str:
    """The worst of all to sort: marks of a high class, two in each code point, and then those of a low one."""
    return "a" + "\u0344" * (length // 2 - 1) + "\u0327" * (length - length // 2)


#: What takes longest in one way or another. Each fills what it is given.
WORST: dict[str, Callable[[int], str]] = {
    "marks": marks,
    "marks as bounded": lambda length: filled("a" + "\u0344" * (MARKS_MAX // 4) + "\u0327" * (MARKS_MAX // 2), length),
    "ligatures": lambda length: filled(LIGATURE, length),
    "accents": lambda length: filled("\u1ec7", length),
    "digits": lambda length: filled("\u0660", length),
    "newer": lambda length: filled("\U0001e08f", length),
    "ascii": lambda length: filled("x", length),
}


class Counts:
    """What one process has normalised since the last look."""

    def __init__(self, file: Path) -> None:
        file.write_bytes(bytes(NUMBERS.size))
        self.file = file
        self._seen = 0

    def read(self) -> tuple[int, int]:
        """Code points since the last call, and the most marks in a row of all time."""
        total, most = NUMBERS.unpack(self.file.read_bytes())
        new, self._seen = total - self._seen, total
        return new, most


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
    return Counts(tmp_path_factory.mktemp("counting") / "counts")


@pytest.fixture(scope="module")
async def counted(services: Services, counts: Counts) -> AsyncIterator[ServiceProcess]:
    """A process with the highest limits that can be set."""
    path = os.pathsep.join(filter(None, [str(COUNTING), os.environ.get("PYTHONPATH", "")]))
    limits = {"AUTHD_BODY_MAX_BYTES": str(BODY_BYTES_MAX), "AUTHD_HEADER_MAX_BYTES": str(HEADER_BYTES_MAX)}
    locks = {"AUTHD_ADDRESS_MAX_FAILURES": "1000", "AUTHD_MAX_LOGIN_ATTEMPTS": "1000"}
    async with services.running(PYTHONPATH=path, COUNTS=str(counts.file), **limits, **locks) as process:
        yield process


@pytest.fixture(scope="module")
async def access_token(counted: ServiceProcess) -> str:
    async with counted.api() as api:
        token: str = (await api.new_session(await api.new_account()))["access_token"]
        return token


@pytest.fixture(scope="module")
async def client(counted: ServiceProcess) -> Credentials:
    return await counted.new_client()


async def looked_at(counted: ServiceProcess, counts: Counts, method: str, path: str, **request: Any) -> int:
    """How many code points the request had normalised. Of marks no more stood in a row than may."""
    counts.read()
    async with counted.api() as api:
        answer = await api.request(method, path, **request)
    assert answer.status_code != 413
    assert answer.status_code == 201 or assert_problem(answer, range(400, 500))
    total, marks_in_a_row = counts.read()
    assert marks_in_a_row <= MARKS_MAX
    return total


def form_body(fields: dict[str, str], **headers: bytes | str) -> dict[str, Any]:
    """Raw UTF-8, as no client should send it: three times as much goes into a body."""
    content = "&".join(f"{name}={value}" for name, value in fields.items()).encode()
    return {"content": content, "headers": {"Content-Type": "application/x-www-form-urlencoded"} | headers}


def json_body(fields: dict[str, str], **headers: bytes | str) -> dict[str, Any]:
    return {"content": msgspec.json.encode(fields), "headers": {"Content-Type": "application/json"} | headers}


async def test_the_count_is_that_of_the_service(counted: ServiceProcess, counts: Counts) -> None:
    fields = {"username": "\u00e9@example.com", "password": "\u00e9" * 4}
    # The password of nobody is compared with a plain hash, which is of text as it came.
    assert 0 < await looked_at(counted, counts, "POST", "/auth/login", **form_body(fields)) < 50
    assert 8 < await looked_at(counted, counts, "POST", "/auth/register", **json_body(fields)) < USERNAME_MAX


@pytest.mark.parametrize("make", WORST.values(), ids=WORST)
@pytest.mark.parametrize("length", [USERNAME_CHARS_MAX, BODY_CHARS])
@pytest.mark.parametrize("form", ["{}", "{}@x.de", "ada@{}", "ada@{}.de"])
async def test_a_username(
    counted: ServiceProcess, counts: Counts, make: Callable[[int], str], length: int, form: str
) -> None:
    in_form, in_json = (
        {"username": form.format(make(chars - len(form) + 2)), "password": PASSWORD}
        for chars in (min(length, FORM_CHARS), length)
    )
    allowed = USERNAME_MAX if length <= USERNAME_CHARS_MAX else 0
    assert await looked_at(counted, counts, "POST", "/auth/login", **form_body(in_form)) <= allowed
    assert await looked_at(counted, counts, "POST", "/auth/register", **json_body(in_json)) <= allowed


@pytest.mark.parametrize("make", WORST.values(), ids=WORST)
@pytest.mark.parametrize("length", [PASSWORD_INPUT_CHARS_MAX, BODY_CHARS])
async def test_a_password(counted: ServiceProcess, counts: Counts, make: Callable[[int], str], length: int) -> None:
    in_form, in_json = ({"username": USERNAME, "password": make(chars)} for chars in (min(length, FORM_CHARS), length))
    allowed = BESIDE_MAX + (PASSWORD_MAX if length <= PASSWORD_INPUT_CHARS_MAX else 0)
    assert await looked_at(counted, counts, "POST", "/auth/login", **form_body(in_form)) <= allowed
    assert await looked_at(counted, counts, "POST", "/auth/register", **json_body(in_json)) <= allowed


@pytest.mark.parametrize("make", WORST.values(), ids=WORST)
async def test_any_other_text_is_not_normalised(
    counted: ServiceProcess, counts: Counts, make: Callable[[int], str], access_token: str, client: Credentials
) -> None:
    text, form_text = make(BODY_CHARS), make(FORM_CHARS)
    header, target = make(HEADER_CHARS).encode(), quote(make(TARGET_CHARS))
    bearer = {"Authorization": f"Bearer {access_token}"}
    basic = {"Authorization": b"Basic " + base64.b64encode(header + b":" + header)}
    login = {"username": USERNAME, "password": PASSWORD}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/auth/register", json_body(login | {"full_name": text})),
        ("POST", "/auth/refresh_token", json_body({"refresh_token": text})),
        ("POST", "/auth/logout", json_body({"scope": text}, **bearer)),
        ("POST", "/auth/logout", form_body({"scope": form_text}, **bearer)),
        ("POST", f"/auth/logout?scope={target}", {"headers": bearer}),
        ("DELETE", f"/auth/sessions/{target}", {"headers": bearer}),
        ("GET", "/auth/me", {"headers": {"Authorization": b"Bearer " + header}}),
        ("POST", "/auth/login", form_body(login, **{"X-Device-Token": header, "User-Agent": header})),
        ("POST", "/auth/introspect", form_body({"token": form_text}, **basic)),
    ]
    more = ("scope", "client_id", "client_secret", "grant_type", "device_token", "other")
    requests += [("POST", "/auth/login", form_body(login | {name: form_text})) for name in more]
    clients = [{"client_id": form_text, "client_secret": "x"}, {"client_id": client[0], "client_secret": form_text}]
    paths = ("/auth/introspect", "/auth/revoke")
    requests += [("POST", path, form_body({"token": "x"} | fields)) for path in paths for fields in clients]
    for method, path, request in requests:
        allowed = BESIDE_MAX if path in ("/auth/register", "/auth/login") else 0
        assert await looked_at(counted, counts, method, path, **request) <= allowed, (method, path)


async def test_the_token_of_a_registered_client(counted: ServiceProcess, counts: Counts, client: Credentials) -> None:
    async with counted.api() as api:
        for make in WORST.values():
            counts.read()
            assert (await api.introspect(client, make(FORM_CHARS // 3))).json() == {"active": False}
            assert (await api.revoke(client, make(FORM_CHARS // 3))).status_code == 200
            assert counts.read()[0] == 0
