"""Opens the sockets that the server listens on."""

import socket
from typing import NamedTuple

from authd.config import ConfigError, Settings
from authd.infra.http.server.server import LISTEN_BACKLOG


class Listeners(NamedTuple):
    """Listening sockets: for everybody, and, where there is one, for operators (`AUTHD_OPERATIONS_BIND`)."""

    public: socket.socket
    operations: socket.socket | None = None


def open_listeners(settings: Settings) -> Listeners:
    """Return listening sockets on `AUTHD_BIND` and, where it is set, on `AUTHD_OPERATIONS_BIND`.

    :raises ConfigError: when an address cannot be listened on.
    """
    public = _listen(settings.bind, "AUTHD_BIND")
    inner = settings.operations_bind
    return Listeners(public, _listen(inner, "AUTHD_OPERATIONS_BIND") if inner else None)


def _listen(bind: str, setting: str) -> socket.socket:
    """Return a listening socket on `host:port`; an IPv6 host stands in brackets."""
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"{setting}={bind} cannot be listened on: {error.strerror}.") from None
