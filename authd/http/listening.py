"""Opens the socket that the server listens on."""

import socket

from authd.config import ConfigError
from authd.http.server import LISTEN_BACKLOG


def listen(bind: str, setting: str = "AUTHD_BIND") -> socket.socket:
    """Return a listening socket on the `host:port` of `setting`; an IPv6 host stands in brackets.

    :raises ConfigError: when the address cannot be listened on.
    """
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=LISTEN_BACKLOG)
    except OSError as error:
        raise ConfigError(f"{setting}={bind} cannot be listened on: {error.strerror}.") from None
