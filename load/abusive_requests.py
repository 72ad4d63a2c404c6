"""Requests that a stranger may send, each as large as a limit allows and as much work as its bytes can be."""

import base64
import json
from collections.abc import Iterator
from typing import NamedTuple

FORM, JSON = "application/x-www-form-urlencoded", "application/json"
ADDRESS, PASSWORD = "ada@example.com", "correct horse battery"
#: As much as a target may have, less its path.
QUERY_BYTES = 7_900
#: What usernames and passwords are cut at, in code points.
USERNAME_CHARS, PASSWORD_CHARS = 254, 2048


class Abuse(NamedTuple):
    """`raw`: all bytes of the request. The connection is closed after it."""

    name: str
    raw: bytes


def ordinary() -> Abuse:
    """What the others are compared with: a refused login."""
    return _post("an ordinary refused login", "/auth/login", FORM, f"username={ADDRESS}&password=wrong".encode())


def abuses(body_bytes: int, head_bytes: int, token: str) -> Iterator[Abuse]:
    """For bodies and heads of these sizes. `token`: an access token, which any stranger has after a registration."""
    yield from _logins(body_bytes)
    yield from _registrations(body_bytes)
    yield from _tokens(body_bytes, token)
    yield from _heads(head_bytes, token)
    yield from _framings(body_bytes)


def _marks(size: int) -> str:
    """Combining marks of a high class, two in each code point, then those of a low one: the worst to sort."""
    return "a" + "\u0344" * (size // 4 - 4) + "\u0327" * (size // 4 - 4)


def _bounded_marks(chars: int) -> str:
    """As many marks in a row as are taken."""
    return (("a" + "\u0344" * 7 + "\u0327" * 16) * chars)[:chars]


def _logins(size: int) -> Iterator[Abuse]:
    usernames = {
        "marks": _marks(size - 100),
        "marks, taken": _bounded_marks(USERNAME_CHARS - 5) + "@x.de",
        "ligatures, taken": "\ufdfa" * (USERNAME_CHARS - 5) + "@x.de",
        "digits of a domain": "a@" + "\u0660" * (USERNAME_CHARS - 2),
        "digits of four labels": "a@" + ("\u0660" * 62 + ".") * 4,
        "a long Punycode label": "a@xn--" + "9" * (USERNAME_CHARS - 6),
        "ASCII": "x" * (size - 100),
    }
    for name, username in usernames.items():
        yield _post(f"login, username: {name}", "/auth/login", FORM, f"username={username}&password=x".encode())
    passwords = {"marks": _marks(size - 100), "ligatures, taken": "\ufdfa" * PASSWORD_CHARS}
    for name, password in passwords.items():
        body = f"username={ADDRESS}&password={password}".encode()
        yield _post(f"login, password: {name}", "/auth/login", FORM, body)
    forms = {
        "escapes": b"username=a&password=" + b"%41" * ((size - 100) // 3),
        "escapes, each no ASCII": b"username=a&password=" + b"%C3%A9" * ((size - 100) // 6),
        "escapes and text in turn": b"username=a&password=" + b"a%41" * ((size - 100) // 4),
        "half an escape": b"username=a&password=" + b"%4" * ((size - 100) // 2),
        "plus signs": b"username=a&password=" + b"+" * (size - 100),
        "fields": b"a=1&" * ((size - 100) // 4),
        "separators": b"&" * (size - 100),
        "31 large fields": b"&".join(b"f%d=" % number + b"%41" * ((size - 300) // 96) for number in range(31)),
    }
    for name, body in forms.items():
        yield _post(f"login, form of {name}", "/auth/login", FORM, body)


def _registrations(size: int) -> Iterator[Abuse]:
    fields = {
        "username: marks": {"username": _marks(size - 200) + "@x.de", "password": PASSWORD},
        "username: marks, taken": {"username": _bounded_marks(120) + "@x.de", "password": PASSWORD},
        "username: digits of four labels": {"username": "a@" + ("\u0660" * 62 + ".") * 4, "password": PASSWORD},
        "password: marks": {"username": ADDRESS, "password": "a" + "\u0344" * 1021 + "\u0327" * 1022},
        "password: marks, taken": {"username": ADDRESS, "password": _bounded_marks(PASSWORD_CHARS)},
        "password: ligatures": {"username": ADDRESS, "password": "\ufdfa" * PASSWORD_CHARS},
        "all three: ASCII": dict.fromkeys(("username", "password", "full_name"), "x" * (size // 3 - 100)),
    }
    for name, body in fields.items():
        yield _json(f"register, {name}", json.dumps(body, ensure_ascii=False).encode())
    start = b'{"username": "a@x.de", "password": 1, "more": '
    values = {
        "nesting": b"[" * (size - 100),
        "nesting, closed": b"[" * (size // 2 - 100) + b"]" * (size // 2 - 100),
        "nested objects": b'{"":' * ((size - 100) // 4),
        "lists": b"[" + b"[]," * ((size - 100) // 3) + b"[]]}",
        "objects": b"[" + b"{}," * ((size - 100) // 3) + b"{}]}",
        "numbers": b"[" + b"1," * ((size - 100) // 2) + b"1]}",
        "fractions": b"[" + b".1e1,"[1:] * ((size - 100) // 4) + b"1]}",
        "members": b"{" + b",".join(b'"%x":0' % number for number in range((size - 100) // 10)) + b"}}",
        "strings": b"[" + b'"",' * ((size - 100) // 3) + b'""]}',
        "escapes": b'"' + b"\\u0344" * ((size - 100) // 6) + b'"}',
        "one long integer": b"9" * (size - 100) + b"}",
        "one long fraction": b"0." + b"9" * (size - 100) + b"}",
        "space": b" " * (size - 100) + b"1}",
    }
    for name, value in values.items():
        yield _json(f"register, JSON of {name}", start + value)


def _tokens(size: int, token: str) -> Iterator[Abuse]:
    long = "x" * (size - 100)
    yield _json("refresh, a long token", json.dumps({"refresh_token": long}).encode(), "/auth/refresh_token")
    yield _json(
        "refresh, a token of dots", json.dumps({"refresh_token": "." * len(long)}).encode(), "/auth/refresh_token"
    )
    bearer = f"Authorization: Bearer {token}\r\n"
    yield _json("logout, a long scope", json.dumps({"scope": long}).encode(), "/auth/logout", bearer)
    yield _json("logout, scopes", b'{"scope": [' + b'"",' * ((size - 100) // 3) + b'""]}', "/auth/logout", bearer)
    form = f"scope={'%41' * (len(long) // 3)}".encode()
    yield _post("logout, a form of escapes", "/auth/logout", FORM, form, bearer)
    for path in ("introspect", "revoke"):
        body = b"client_id=a&client_secret=b&token=" + b"%41" * (len(long) // 3)
        yield _post(f"{path}, a token of escapes", f"/auth/{path}", FORM, body)


def _heads(size: int, token: str) -> Iterator[Abuse]:
    long = size - 600
    login = f"username={ADDRESS}&password=wrong".encode()
    basic = base64.b64encode(b"\xc3\xa9:" * (long // 4)).decode()
    heads = {
        "Basic credentials": ("POST /auth/introspect", f"Authorization: Basic {basic}\r\n", b"token=x"),
        "a long bearer token": ("GET /auth/me", f"Authorization: Bearer {'x' * long}\r\n", b""),
        "a bearer token of dots": ("GET /auth/me", f"Authorization: Bearer {'.' * long}\r\n", b""),
        "a long device token": ("POST /auth/login", f"X-Device-Token: {'A' * long}\r\n", login),
        "a long User-Agent": ("POST /auth/login", f"User-Agent: {'é' * (long // 2)}\r\n", login),
        "hops": ("POST /auth/login", f"X-Forwarded-For: {',' * long}\r\n", login),
        "addresses": ("POST /auth/login", f"X-Forwarded-For: {'127.0.0.1,' * (long // 10)}127.0.0.1\r\n", login),
        "one long hop": ("POST /auth/login", f"X-Forwarded-For: {'1.' * (long // 2)}\r\n", login),
        "a long request id": ("GET /livez", f"X-Request-ID: {'a' * long}\r\n", b""),
        "a long Origin": ("GET /livez", f"Origin: https://{'a' * long}\r\n", b""),
        "a query of fields": (
            f"POST /auth/logout?{'a&' * (QUERY_BYTES // 2)}",
            f"Authorization: Bearer {token}\r\n",
            b"",
        ),
        "a query of escapes": (f"GET /auth/me?{'%41' * (QUERY_BYTES // 3)}", "", b""),
        "a path of escapes": (f"GET /{'%41' * (QUERY_BYTES // 3)}", "", b""),
        "a path of slashes": (f"GET /{'/' * QUERY_BYTES}", "", b""),
        "metrics": ("GET /metrics", "", b""),
        "the description": ("GET /openapi.json", "", b""),
    }
    for name, (target, lines, body) in heads.items():
        yield Abuse(f"head: {name}", _raw(target, FORM, body, lines))
    count = min(95, long // 8)
    lines = "".join(f"h{number}: {'x' * (long // count - 8)}\r\n" for number in range(count))
    yield Abuse("head: many headers", _raw("GET /livez", JSON, b"", lines))
    yield Abuse("head: too many headers", _raw("GET /livez", JSON, b"", "a:\r\n" * (long // 4)))
    kinds = {"parameters": f"{JSON}" + ";a*=utf-8''%41" * (long // 14), "semicolons": JSON + ";" * long}
    kinds |= {"quotes": JSON + ';a="' + '\\"' * (long // 2)}
    for name, kind in kinds.items():
        yield _post(f"Content-Type of {name}", "/auth/register", kind, b"{}")
        yield _post(f"Content-Type of {name}, login", "/auth/login", kind, login)


def _framings(size: int) -> Iterator[Abuse]:
    head = f"POST /auth/login HTTP/1.1\r\nHost: authd\r\nConnection: close\r\nContent-Type: {FORM}\r\n".encode()
    chunks = b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * (size - 100) + b"0\r\n\r\n"
    yield Abuse("a body in chunks of one byte", head + chunks)
    yield Abuse("requests in one packet", b"GET /livez HTTP/1.1\r\nHost: authd\r\n\r\n" * 500 + ordinary().raw)


def _json(name: str, body: bytes, path: str = "/auth/register", lines: str = "") -> Abuse:
    return _post(name, path, JSON, body, lines)


def _post(name: str, path: str, kind: str, body: bytes, lines: str = "") -> Abuse:
    return Abuse(name, _raw(f"POST {path}", kind, body, lines))


def _raw(target: str, kind: str, body: bytes, lines: str) -> bytes:
    head = f"{target} HTTP/1.1\r\nHost: authd\r\nConnection: close\r\n{lines}"
    if body:
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body
