"""Registers and authenticates service clients."""

import hashlib
import hmac
import secrets
from collections import OrderedDict

import anyio
import msgspec

from authd.errors import InvalidClient, Unavailable
from authd.oauth.postgres import Clients

#: How long a client's registration is believed without asking Postgres: the longest life of a removed client.
FRESH_S = 10.0


#: How long it is believed while Postgres is unavailable.
STALE_S = 3600.0


KNOWN_CLIENTS_MAX = 1000


_CLIENT_ID_CHARS_MAX = 128


class NewClient(msgspec.Struct, frozen=True):
    """A registration. The secret is shown once and kept nowhere."""

    client_id: str
    secret: str

    def __repr__(self) -> str:
        return f"NewClient({self.client_id!r})"


class ClientRegistry:
    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._known: OrderedDict[str, tuple[bytes, float]] = OrderedDict()

    async def add(self, name: str) -> NewClient:
        client = NewClient(secrets.token_hex(8), secrets.token_urlsafe(32))
        await self._clients.insert(client.client_id, name, _digest(client.secret))
        return client

    async def authenticate(self, client_id: str | None, secret: str | None) -> None:
        """Check that the secret is the client's.

        :raises InvalidClient, Unavailable:
        """
        if not client_id or not secret or len(client_id) > _CLIENT_ID_CHARS_MAX or "\0" in client_id:
            raise InvalidClient
        expected = await self._find_hash(client_id)
        if expected is None or not hmac.compare_digest(expected, _digest(secret)):
            raise InvalidClient

    async def _find_hash(self, client_id: str) -> bytes | None:
        now = anyio.current_time()
        known = self._known.get(client_id)
        if known is not None and now - known[1] < FRESH_S:
            return known[0]
        try:
            found = await self._clients.find_secret_hash(client_id)
        except Unavailable:
            if known is not None and now - known[1] < STALE_S:
                return known[0]
            raise
        if found is None:
            self._known.pop(client_id, None)
            return None
        self._known[client_id] = (found, now)
        self._known.move_to_end(client_id)
        if len(self._known) > KNOWN_CLIENTS_MAX:
            self._known.popitem(last=False)
        return found


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
