"""Every setting and limit of authd, with its unit, default and bounds; read and checked as a whole, once.

Settings come from environment variables with the prefix ``AUTHD_`` and from a ``.env`` file; the environment wins.
An unknown ``AUTHD_`` name is refused: a misspelt limit that silently keeps its default is a limit nobody set.
"""

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from dotenv import dotenv_values
from msgspec import Meta

PREFIX = "AUTHD_"
SECRET_BYTES_MIN = 32

#: Buckets that users, streams, throttle counters, outbox lanes and the revocation log are divided into. Part of every
#: key in Redis and every row of the log: fixed for the life of a deployment.
BUCKETS = 256

#: As a browser sends it: lower case, no path, the port only where it is not the scheme's own.
_ORIGIN = re.compile(r"(?!http://.*:80$|https://.*:443$)https?://(\[[0-9a-f:.]+\]|[a-z0-9.-]+)(:[0-9]{1,5})?")

#: The forms of the stores' URLs, for the sentence that refuses one.
_URL_FORMS = {
    "AUTHD_DATABASE_URL": "postgresql://user:password@host:port/database",
    "AUTHD_REDIS_URL": "redis://, rediss://, redis+sentinel:// or rediss+sentinel://, as in redis://:password@host:port/0",
}
_DATABASE_SCHEMES = ("postgresql", "postgres")
_REDIS_SCHEMES = ("redis", "rediss", "redis+sentinel", "rediss+sentinel")
#: A host, as a name, an address, a percent-encoded socket folder or nothing, and perhaps a port.
_URL_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[^\[\]:@]*)(?::([0-9]{1,5}))?")
_URL_FIELD = re.compile(r"\w[\w.-]*=")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]|%00")
#: asyncpg reads it by `int`, whose error repeats the text.
_URL_PORTS = re.compile(r"port=(?![0-9]{1,5}(,[0-9]{1,5})*$)")

#: The widest network that may be trusted: a proxy's owner has no more, and in a wider one are the clients themselves.
TRUSTED_PREFIX_MIN_V4, TRUSTED_PREFIX_MIN_V6 = 8, 16
_PRIVATE_V6 = (IPv6Network("fc00::/7"), IPv6Network("fe80::/10"))

Network = IPv4Network | IPv6Network
Seconds = Annotated[int, Meta(ge=1, le=366 * 86_400)]
Timeout = Annotated[float, Meta(gt=0, le=300)]
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
_Section = TypeVar("_Section", bound=msgspec.Struct)


class ConfigError(Exception):
    """The settings cannot be used. Each argument is one sentence that names the setting and repeats no value in which a
    password may be: no secret, URL or origin.
    """


class Secret:
    """A string that never shows in a repr, a log or a traceback; `reveal()` at the one place that needs it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def __repr__(self) -> str:
        return "Secret(***)" if self._value else "Secret()"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of one authd process. A field `x_y` is read from `AUTHD_X_Y`; units stand last in the name."""

    # The edge
    bind: Annotated[str, Meta(pattern=r"^[0-9A-Za-z._:%\[\]-]+:\d{1,5}$")] = "0.0.0.0:8000"
    operations_bind: Annotated[str, Meta(pattern=r"^([0-9A-Za-z._:%\[\]-]+:\d{1,5})?$")] = ""
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    trusted_proxies: tuple[Network, ...] = ()
    request_timeout_s: Timeout = 15.0
    unready_s: Annotated[float, Meta(ge=0, le=300)] = 0.0
    drain_s: Timeout = 20.0
    start_timeout_s: Timeout = 60.0
    clock_skew_max_s: Timeout = 5.0
    body_max_bytes: Annotated[int, Meta(ge=4096, le=1_048_576)] = 16_384
    header_max_bytes: Annotated[int, Meta(ge=4096, le=262_144)] = 16_384
    headers_max: Annotated[int, Meta(ge=16, le=1000)] = 100
    header_timeout_s: Timeout = 10.0
    keep_alive_s: Timeout = 75.0
    connections_max: Annotated[int, Meta(ge=8, le=1_000_000)] = 2000
    cors_origins: tuple[str, ...] = ()

    # The stores
    database_url: Secret
    database_pool_max: Annotated[int, Meta(ge=2, le=200)] = 10
    database_timeout_s: Timeout = 3.0
    redis_url: Secret
    redis_pool_max: Annotated[int, Meta(ge=2, le=1000)] = 64
    redis_timeout_s: Timeout = 1.0
    deployment: Annotated[str, Meta(pattern=r"^[a-z0-9-]{1,32}$")] = "main"
    user_cache_ttl_s: Seconds = 3600

    # Events
    kafka_bootstrap_servers: tuple[str, ...] = ()
    kafka_registration_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,249}$")] = "uploading_data"
    kafka_registration_key: Annotated[str, Meta(min_length=1, max_length=256)] = "new_user"
    kafka_events_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,249}$")] = "auth.events"
    kafka_revocations_topic: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,249}$")] = "auth.revocations"
    kafka_timeout_s: Timeout = 10.0
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    kafka_username: str = ""
    kafka_password: Secret = Secret("")
    kafka_ca_file: str = ""
    outbox_degraded_s: Seconds = 300
    stream_max: Count = 10_000

    # Tokens and sessions
    jwt_algorithm: Literal["ES256", "Ed25519", "HS256"] = "ES256"
    jwt_secret: Secret = Secret("")
    issuer: Annotated[str, Meta(min_length=1, max_length=256)] = "http://localhost:8000"
    audience: Annotated[str, Meta(max_length=256)] = ""
    access_ttl_s: Seconds = 1800
    refresh_ttl_s: Seconds = 30 * 86_400
    refresh_grace_s: Annotated[int, Meta(ge=0, le=300)] = 10
    session_ttl_s: Seconds = 180 * 86_400
    session_policy: Literal["evict_oldest", "refuse"] = "evict_oldest"
    max_active_sessions: Annotated[int, Meta(ge=1, le=100)] = 10
    key_max_age_s: Seconds = 90 * 86_400
    key_publish_s: Annotated[int, Meta(ge=1, le=30 * 86_400)] = 900
    secret: Secret
    secret_previous: Secret = Secret("")

    # The defence of login
    max_login_attempts: Annotated[int, Meta(ge=1, le=1000)] = 15
    lockout_s: Seconds = 300
    account_max_failures: Annotated[int, Meta(ge=1, le=10_000)] = 100
    address_max_failures: Annotated[int, Meta(ge=1, le=100_000)] = 300
    bcrypt_cost: Annotated[int, Meta(ge=4, le=18)] = 12
    hash_threads: Annotated[int, Meta(ge=0, le=256)] = 0
    #: Not more: each arrival looks at every network that waits.
    hash_queue_max: Annotated[int, Meta(ge=1, le=10_000)] = 256
    hash_deadline_s: Timeout = 10.0

    # Logs
    log_dir: str = "media/logs"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_days: Annotated[int, Meta(ge=1, le=3650)] = 14
    log_max_bytes: Annotated[int, Meta(ge=67_108_864, le=1_099_511_627_776)] = 1_073_741_824

    def section(self, kind: type[_Section]) -> _Section:
        """Return the settings that `kind` has fields for, by the same names: what one class reads, and no more."""
        return kind(**{field.name: getattr(self, field.name) for field in msgspec.structs.fields(kind)})

    @property
    def event_stream_max(self) -> int:
        """Entries of a stream of events in Redis: the setting, or 0 where no Kafka takes them."""
        return self.stream_max if self.kafka_bootstrap_servers else 0

    @property
    def hash_threads_per_worker(self) -> int:
        """Threads that hash in this process: the setting, or the cores, divided by the workers."""
        return max(1, (self.hash_threads or os.cpu_count() or 1) // self.workers)

    @property
    def connections_per_worker(self) -> int:
        return max(1, self.connections_max // self.workers)

    @property
    def database_pool_per_worker(self) -> int:
        return max(2, self.database_pool_max // self.workers)

    @property
    def redis_pool_per_worker(self) -> int:
        return max(2, self.redis_pool_max // self.workers)

    @property
    def log_bytes_per_worker(self) -> int:
        return self.log_max_bytes // self.workers


def load_settings(environ: Mapping[str, str], *, env_file: Path = Path(".env")) -> Settings:
    """Read the settings from `environ` over `env_file`.

    :raises ConfigError: with one sentence for each setting that is missing, unknown or out of bounds.
    """
    return parse_settings(read_values(environ, env_file=env_file))


def read_values(environ: Mapping[str, str], *, env_file: Path = Path(".env")) -> dict[str, str]:
    """Return the texts of all `AUTHD_…` names in `environ` and, where it does not have them, in `env_file`."""
    # Without interpolation: a secret may hold a dollar sign.
    values = {name: value or "" for name, value in dotenv_values(env_file, interpolate=False).items()} | dict(environ)
    return {name: value for name, value in values.items() if name.startswith(PREFIX)}


def parse_settings(values: Mapping[str, str]) -> Settings:
    """Settings from `AUTHD_…` names and their texts; see `load_settings`."""
    fields = {PREFIX + field.name.upper(): field for field in msgspec.structs.fields(Settings)}
    problems = [f"{name} is not a setting of authd." for name in sorted(values.keys() - fields.keys())]
    parsed: dict[str, Any] = {}
    for name, field in fields.items():
        text = values.get(name, "").strip()
        if not text:
            if field.required:
                problems.append(f"{name} is required.")
            continue
        try:
            parsed[field.name] = _parse(text, field.type)
        except ValueError as error:  # msgspec.ValidationError is one
            problems.append(f"{name} is not usable: {_without_value(error, field.type)}.")
    if problems:
        raise ConfigError(*problems)
    settings = Settings(**parsed)
    problems = list(_contradictions(settings))
    if problems:
        raise ConfigError(*problems)
    return settings


def _parse(text: str, kind: Any) -> Any:
    if kind is Secret:
        return Secret(text)
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == tuple[Network, ...]:
        return tuple(ip_network(part.strip()) for part in text.split(",") if part.strip())
    return msgspec.convert(text, kind, strict=False)


def _without_value(error: ValueError, kind: Any) -> str:
    """Return what is wrong, without the value that `ip_network` and a choice would repeat."""
    if kind == tuple[Network, ...]:
        return "it must be IP networks without host bits, such as 10.0.0.0/8, separated by commas"
    if get_origin(kind) is Literal:
        return f"it must be one of {', '.join(get_args(kind))}"
    return str(error)


def _contradictions(settings: Settings) -> Iterator[str]:
    yield from _unusable_urls(settings)
    for name, secret in (("AUTHD_SECRET", settings.secret), ("AUTHD_SECRET_PREVIOUS", settings.secret_previous)):
        if secret and len(secret.reveal().encode()) < SECRET_BYTES_MIN:
            yield f"{name} must have at least {SECRET_BYTES_MIN} bytes."
    if settings.jwt_algorithm == "HS256":
        if len(settings.jwt_secret.reveal().encode()) < SECRET_BYTES_MIN:
            yield f"AUTHD_JWT_SECRET must have at least {SECRET_BYTES_MIN} bytes with AUTHD_JWT_ALGORITHM=HS256."
        # Every downstream service holds the JWT secret; it must not open the key ring.
        if settings.jwt_secret and settings.jwt_secret in (settings.secret, settings.secret_previous):
            yield "AUTHD_JWT_SECRET must differ from AUTHD_SECRET: services that hold it would hold the master key."
    elif settings.jwt_secret:
        yield f"AUTHD_JWT_SECRET is only for AUTHD_JWT_ALGORITHM=HS256, which is {settings.jwt_algorithm}."
    if settings.key_max_age_s <= settings.key_publish_s:
        yield "AUTHD_KEY_MAX_AGE_S must be above AUTHD_KEY_PUBLISH_S."
    if settings.hash_deadline_s >= settings.request_timeout_s:
        yield "AUTHD_HASH_DEADLINE_S must be below AUTHD_REQUEST_TIMEOUT_S."
    if settings.kafka_security_protocol.startswith("SASL") and not (
        settings.kafka_username and settings.kafka_password
    ):
        yield "AUTHD_KAFKA_USERNAME and AUTHD_KAFKA_PASSWORD are required with AUTHD_KAFKA_SECURITY_PROTOCOL=SASL_*."
    if not all(map(_ORIGIN.fullmatch, settings.cors_origins)):
        yield "AUTHD_CORS_ORIGINS must be exact origins such as https://app.example.com, separated by commas."
    if _are_too_wide(settings.trusted_proxies):
        yield (
            f"AUTHD_TRUSTED_PROXIES holds a network wider than /{TRUSTED_PREFIX_MIN_V4}"
            f" (IPv6: /{TRUSTED_PREFIX_MIN_V6}): clients inside of it would choose their own address."
            " Name the networks of the proxies alone."
        )
    for name, bind in (("AUTHD_BIND", settings.bind), ("AUTHD_OPERATIONS_BIND", settings.operations_bind)):
        if bind and int(bind.rpartition(":")[2]) > 65_535:
            yield f"{name} has a port above 65535."
    if settings.operations_bind == settings.bind:
        yield "AUTHD_OPERATIONS_BIND must differ from AUTHD_BIND: metrics would be where everybody is."


def _unusable_urls(settings: Settings) -> Iterator[str]:
    """Refuse what a driver would refuse with a traceback that shows parts of the password, or would read as another
    host than was meant, which it then names in its errors.
    """
    for name, secret, is_usable in (
        ("AUTHD_DATABASE_URL", settings.database_url, _is_database_url),
        ("AUTHD_REDIS_URL", settings.redis_url, _is_redis_url),
    ):
        if not is_usable(secret.reveal()):
            yield f"{name} is not a usable URL: it must be {_URL_FORMS[name]}; percent-encode its password."


def _is_database_url(url: str) -> bool:
    authority = _authority(url, _DATABASE_SCHEMES)
    # asyncpg ends the password at the first @.
    if authority is None or authority.count("@") > 1:
        return False
    hosts = authority.rpartition("@")[2]
    return not hosts or (all(hosts.split(",")) and _are_hosts(hosts))


def _is_redis_url(url: str) -> bool:
    authority = _authority(url, _REDIS_SCHEMES)
    if authority is None:
        return False
    hosts = authority.rpartition("@")[2]
    return bool(hosts.replace(",", "").strip()) and _are_hosts(hosts)


def _authority(url: str, schemes: Collection[str]) -> str | None:
    """Return the part between `//` and the path; None where the URL is not one of the schemes or is in doubt."""
    if _CONTROL.search(url):
        return None
    try:
        parts = urlsplit(url)
    except ValueError:
        return None
    # An @ behind the authority is the end of a password that has one of / ? # in it.
    if parts.scheme not in schemes or "://" not in url or "@" in url.partition("://")[2][len(parts.netloc) :]:
        return None
    fields = parts.query.split("&") if parts.query else []
    if "#" in url or not all(_URL_FIELD.match(field) and not _URL_PORTS.match(field) for field in fields):
        return None
    return parts.netloc


def _are_hosts(hosts: str) -> bool:
    found = [_URL_HOST.fullmatch(host.strip()) for host in hosts.split(",")]
    return all(host is not None and int(host[1] or 0) <= 65_535 for host in found)


def _are_too_wide(networks: Sequence[Network]) -> bool:
    """Return whether one of the networks, or several side by side, are wider than any proxy's."""
    v4 = collapse_addresses(network for network in networks if isinstance(network, IPv4Network))
    v6 = collapse_addresses(network for network in networks if isinstance(network, IPv6Network))
    return any(network.prefixlen < TRUSTED_PREFIX_MIN_V4 for network in v4) or any(
        network.prefixlen < TRUSTED_PREFIX_MIN_V6 and not any(map(network.subnet_of, _PRIVATE_V6)) for network in v6
    )
