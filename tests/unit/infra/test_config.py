import re
from ipaddress import ip_network

import msgspec
import pytest

from authd.config import ConfigError, Secret, Settings, load_settings, parse_settings, read_values

SECRETS = ("database_url", "redis_url", "kafka_password", "jwt_secret", "secret", "secret_previous")
DAYS_366 = 366 * 86_400
#: The lowest and the highest value of every number. What is out of bounds is the next one outside.
BOUNDS: dict[str, tuple[int, int]] = {
    "workers": (1, 64),
    "body_max_bytes": (4096, 1_048_576),
    "header_max_bytes": (4096, 262_144),
    "database_pool_max": (2, 200),
    "redis_pool_max": (2, 1000),
    "user_cache_ttl_s": (1, DAYS_366),
    "outbox_degraded_s": (1, DAYS_366),
    "stream_max": (1, 1_000_000),
    "access_ttl_s": (1, DAYS_366),
    "refresh_ttl_s": (1, DAYS_366),
    "refresh_grace_s": (0, 300),
    "session_ttl_s": (1, DAYS_366),
    "max_active_sessions": (1, 100),
    "key_max_age_s": (1, DAYS_366),
    "key_publish_s": (1, 30 * 86_400),
    "max_login_attempts": (1, 1000),
    "lockout_s": (1, DAYS_366),
    "account_max_failures": (1, 10_000),
    "address_max_failures": (1, 100_000),
    "bcrypt_cost": (4, 18),
    "hash_threads": (0, 256),
    "hash_queue_max": (1, 10_000),
    "log_days": (1, 3650),
    "log_max_bytes": (64 * 2**20, 2**40),
    "unready_s": (0, 300),
    "headers_max": (16, 1000),
    "connections_max": (8, 1_000_000),
}
#: Above 0, and at most 300.
TIMEOUTS = (
    "request_timeout_s",
    "header_timeout_s",
    "keep_alive_s",
    "drain_s",
    "start_timeout_s",
    "clock_skew_max_s",
    "database_timeout_s",
    "redis_timeout_s",
    "kafka_timeout_s",
    "hash_deadline_s",
    "header_timeout_s",
    "keep_alive_s",
)
UNUSABLE_TEXTS = {
    "bind": ("8000", "127.0.0.1", ":8000", "127.0.0.1:http", "127.0.0.1:123456", "http://user:pw@host:80"),
    "operations_bind": ("8001", "127.0.0.1", ":8001", "127.0.0.1:http", "127.0.0.1:123456"),
    "deployment": ("Main", "a b", "x" * 33, "a{b}"),
    "trusted_proxies": ("10.0.0.1/8", "10.0.0.0/33", "proxy", "10.0.0.0/8, nowhere"),
    "kafka_registration_topic": ("user created", "x" * 250, "a/b"),
    "kafka_registration_key": ("x" * 257,),
    "kafka_security_protocol": ("plaintext", "TLS"),
    "kafka_sasl_mechanism": ("GSSAPI",),
    "jwt_algorithm": ("none", "hs256", "RS256", "EdDSA"),
    "issuer": ("x" * 257,),
    "audience": ("x" * 257,),
    "session_policy": ("evict", "Refuse"),
    "log_level": ("trace", "INFO"),
    "workers": ("two", "1.5", "0x2"),
    "drain_s": ("nan", "inf", "soon"),
}


def complaints(values: dict[str, str]) -> list[str]:
    try:
        parse_settings(values)
    except ConfigError as error:
        return list(error.args)
    return []


def is_unusable(required: dict[str, str], field: str, text: object) -> bool:
    """Whether the value itself is refused: it may still contradict another setting."""
    name = f"AUTHD_{field.upper()}"
    return any(sentence.startswith(f"{name} is not usable") for sentence in complaints(required | {name: str(text)}))


def test_the_required_settings_are_enough(required: dict[str, str]) -> None:
    settings = parse_settings(required)
    assert settings.bind == "0.0.0.0:8000"
    assert (settings.access_ttl_s, settings.refresh_ttl_s) == (30 * 60, 30 * 86_400)
    assert (settings.max_active_sessions, settings.max_login_attempts, settings.lockout_s) == (10, 15, 300)
    assert (settings.kafka_registration_topic, settings.kafka_registration_key) == ("uploading_data", "new_user")
    assert settings.jwt_algorithm == "ES256"
    assert settings.log_dir == "media/logs"


@pytest.mark.parametrize("name", ["AUTHD_DATABASE_URL", "AUTHD_REDIS_URL", "AUTHD_SECRET"])
@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_missing_setting_is_named(required: dict[str, str], name: str, text: str | None) -> None:
    values = {key: value for key, value in required.items() if key != name}
    if text is not None:
        values[name] = text
    assert complaints(values) == [f"{name} is required."]


def test_every_number_has_its_bounds_in_this_test() -> None:
    numbers = {field.name for field in msgspec.structs.fields(Settings) if type(field.default) in (int, float)}
    assert numbers == BOUNDS.keys() | set(TIMEOUTS)


@pytest.mark.parametrize(("field", "bounds"), BOUNDS.items())
def test_numbers_end_at_their_bounds(required: dict[str, str], field: str, bounds: tuple[int, int]) -> None:
    low, high = bounds
    assert not is_unusable(required, field, low)
    assert not is_unusable(required, field, high)
    assert is_unusable(required, field, low - 1)
    assert is_unusable(required, field, high + 1)


@pytest.mark.parametrize("field", TIMEOUTS)
def test_timeouts_are_above_zero_and_at_most_five_minutes(required: dict[str, str], field: str) -> None:
    assert not is_unusable(required, field, "0.001")
    assert not is_unusable(required, field, "300")
    for text in ("0", "-1", "300.1", "nan", "inf"):
        assert is_unusable(required, field, text)


@pytest.mark.parametrize(
    ("field", "text"), [(field, text) for field, texts in UNUSABLE_TEXTS.items() for text in texts]
)
def test_unusable_texts_are_refused(required: dict[str, str], field: str, text: str) -> None:
    assert is_unusable(required, field, text)


def test_a_port_above_the_last_one_is_refused(required: dict[str, str]) -> None:
    assert complaints(required | {"AUTHD_BIND": "0.0.0.0:65535"}) == []
    assert complaints(required | {"AUTHD_BIND": "0.0.0.0:65536"}) == ["AUTHD_BIND has a port above 65535."]


def test_an_unknown_name_is_refused_and_named(required: dict[str, str]) -> None:
    assert complaints(required | {"AUTHD_MAX_LOGIN_ATEMPTS": "5"}) == [
        "AUTHD_MAX_LOGIN_ATEMPTS is not a setting of authd."
    ]


def test_all_complaints_come_at_once() -> None:
    found = complaints({"AUTHD_WORKERS": "0", "AUTHD_X": "1", "AUTHD_REDIS_URL": "redis://x"})
    assert [sentence.split(" ")[0] for sentence in found] == [
        "AUTHD_X",
        "AUTHD_WORKERS",
        "AUTHD_DATABASE_URL",
        "AUTHD_SECRET",
    ]


def test_an_empty_text_is_the_default(required: dict[str, str]) -> None:
    assert parse_settings(required | {"AUTHD_WORKERS": "", "AUTHD_AUDIENCE": " "}) == parse_settings(required)


def test_lists_are_separated_by_commas(required: dict[str, str]) -> None:
    settings = parse_settings(
        required
        | {
            "AUTHD_TRUSTED_PROXIES": "10.0.0.0/8, fd00::/8,192.0.2.7",
            "AUTHD_KAFKA_BOOTSTRAP_SERVERS": "a:9092, b:9092,",
        }
    )
    assert settings.trusted_proxies == tuple(map(ip_network, ("10.0.0.0/8", "fd00::/8", "192.0.2.7/32")))
    assert settings.kafka_bootstrap_servers == ("a:9092", "b:9092")


@pytest.mark.parametrize("origin", ["https://app.example.com", "http://localhost:3000", "http://[::1]:8080"])
def test_an_exact_origin_is_taken(required: dict[str, str], origin: str) -> None:
    assert parse_settings(required | {"AUTHD_CORS_ORIGINS": f"{origin}, https://b.example"}).cors_origins == (
        origin,
        "https://b.example",
    )


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "app.example.com",
        "https://*.example.com",
        "https://app.example.com/",
        "https://App.example.com",
        "https://app.example.com:443",
        "http://app.example.com:80",
        "https://user@app.example.com",
        "ftp://app.example.com",
        "https://app.example.com https://b.example",
    ],
)
def test_what_no_browser_would_send_as_an_origin_is_refused(required: dict[str, str], origin: str) -> None:
    [sentence] = complaints(required | {"AUTHD_CORS_ORIGINS": origin})
    assert sentence == "AUTHD_CORS_ORIGINS must be exact origins such as https://app.example.com, separated by commas."


@pytest.mark.parametrize(
    "networks",
    [
        "0.0.0.0/0",
        "::/0",
        "0.0.0.0/1, 128.0.0.0/1",
        "10.0.0.0/7",
        "2000::/3",
        "2000::/15",
        ",".join(f"{first}.0.0.0/8" for first in range(256)),
    ],
)
def test_a_trusted_network_that_holds_the_clients_is_refused(required: dict[str, str], networks: str) -> None:
    [sentence] = complaints(required | {"AUTHD_TRUSTED_PROXIES": f"192.0.2.7, {networks}"})
    assert sentence.startswith("AUTHD_TRUSTED_PROXIES holds a network wider than /8 (IPv6: /16)")


@pytest.mark.parametrize("networks", ["10.0.0.0/8", "fc00::/7", "fe80::/10", "2001::/16", "172.16.0.0/12,fd00::/8"])
def test_networks_that_a_proxy_may_have_are_accepted(required: dict[str, str], networks: str) -> None:
    assert complaints(required | {"AUTHD_TRUSTED_PROXIES": networks}) == []


DATABASE_URLS = (
    "postgresql://localhost",
    "postgres://authd@localhost/authd",
    "postgresql:///authd",
    "postgresql:///authd?host=/run/postgresql&user=authd",
    "postgresql:///authd?host=a,b&port=5432,5433",
    "postgresql://authd:p%40ss%23%2F%3F@db.example.com:5432/authd?sslmode=verify-full&sslrootcert=/etc/ca.pem",
    "postgresql://authd:pa:ss%@a:5432,b:5433,[2001:db8::1]:5434/authd?target_session_attrs=read-write",
    "postgresql://authd:pw@%2Frun%2Fpostgresql/authd",
    "postgresql://authd@localhost/authd?application_name=&options=-c%20geqo%3Doff",
)
REDIS_URLS = (
    "redis://localhost",
    "redis://:6379",
    "rediss://authd:p%40ss%23@cache.example.com:6380/2?ssl_ca_certs=/etc/ca.pem&ssl_check_hostname=false",
    "redis://:pa@ss:w%@[2001:db8::1]:6379/0?socket_timeout=1.5&db=3",
    "redis://:pw@a:6379,b:6379, c:6379",
    "redis+sentinel://:pw@a:26379,b:26379,[::1]:26379/service",
    "rediss+sentinel://a,b/service?ssl_ca_certs=/etc/ca.pem",
)


@pytest.mark.parametrize("url", DATABASE_URLS)
def test_every_form_of_a_database_url_is_accepted(required: dict[str, str], url: str) -> None:
    assert complaints(required | {"AUTHD_DATABASE_URL": url}) == []


@pytest.mark.parametrize("url", REDIS_URLS)
def test_every_form_of_a_redis_url_is_accepted(required: dict[str, str], url: str) -> None:
    assert complaints(required | {"AUTHD_REDIS_URL": url}) == []


UNUSABLE_TAILS = (
    "",
    "localhost",
    "http://localhost",
    "{0}:localhost",
    "{0}://u:Secr3t#pw@localhost",
    "{0}://u:Secr3t?pw@localhost",
    "{0}://u:Secr3t/pw@localhost",
    "{0}://u:1234/pw@localhost:1/0",
    "{0}://u:1234?ef=gh@localhost:1/0",
    "{0}://u:pw@ab/cd@localhost:1/0",
    "{0}://u:[pw@localhost",
    "{0}://u:pw@localhost:port",
    "{0}://u:pw@localhost:65536",
    "{0}://u:pw@[::1",
    "{0}://u:pw@::1:5432",
    "{0}://u:pw@localhost/0#part",
    "{0}://u:pw@localhost/0?name",
    "{0}://u:pw\n@localhost/0",
    "{0}://u:pw@localhost/%00",
)


@pytest.mark.parametrize("tail", UNUSABLE_TAILS)
@pytest.mark.parametrize(
    ("name", "scheme"), [("AUTHD_DATABASE_URL", "postgresql"), ("AUTHD_REDIS_URL", "redis")], ids=["postgres", "redis"]
)
def test_an_unusable_url_is_refused_with_a_sentence_that_shows_nothing_of_it(
    required: dict[str, str], name: str, scheme: str, tail: str
) -> None:
    [sentence] = complaints(required | {name: tail.format(scheme)})
    assert sentence.startswith(f"{name} is ")
    if tail:
        assert "percent-encode its password" in sentence
        assert not re.search("Secr3t|1234|localhost|pw|gh", sentence)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:ab@cd@localhost/db",
        "postgresql://a:1,,b:2/db",
        "postgresql:///db?host=a&port=Secr3t",
        "redis:///0",
    ],
)
def test_what_a_driver_reads_otherwise_than_it_was_meant_is_refused(required: dict[str, str], url: str) -> None:
    name = "AUTHD_REDIS_URL" if url.startswith("redis") else "AUTHD_DATABASE_URL"
    [sentence] = complaints(required | {name: url})
    assert sentence.startswith(f"{name} is not a usable URL")


def test_complaints_repeat_no_value_that_may_be_a_password(required: dict[str, str]) -> None:
    """Also where it was pasted into a setting of another kind."""
    for field in msgspec.structs.fields(Settings):
        if field.name != "audience":
            found = complaints(required | {f"AUTHD_{field.name.upper()}": "https://u:Secr3t/pass@h:1/[x"})
            assert not re.search("Secr3t|pass@", " ".join(found)), field.name


def test_the_environment_wins_over_the_file(required: dict[str, str], tmp_path) -> None:
    file = tmp_path / ".env"
    file.write_text("AUTHD_ISSUER=of-the-file\nAUTHD_AUDIENCE='of the file'\n# AUTHD_WORKERS=3\nOTHER=1\n")
    settings = load_settings(required | {"AUTHD_ISSUER": "of-the-environment", "PATH": "/bin"}, env_file=file)
    assert (settings.issuer, settings.audience, settings.workers) == ("of-the-environment", "of the file", 1)


def test_the_file_may_hold_everything_and_a_dollar_stays_one(required: dict[str, str], tmp_path) -> None:
    file = tmp_path / ".env"
    secret = "a$HOME${HOME}-secret-with-dollars-in-it"
    file.write_text("".join(f"{name}={value}\n" for name, value in (required | {"AUTHD_SECRET": secret}).items()))
    assert load_settings({"HOME": "/root"}, env_file=file).secret == Secret(secret)


def test_no_file_is_no_error(required: dict[str, str], tmp_path) -> None:
    assert read_values(required | {"PATH": "/bin"}, env_file=tmp_path / ".env") == required


def test_an_unknown_name_in_the_file_is_refused(required: dict[str, str], tmp_path) -> None:
    file = tmp_path / ".env"
    file.write_text("AUTHD_TYPO=1\n")
    with pytest.raises(ConfigError, match="AUTHD_TYPO is not a setting"):
        load_settings(required, env_file=file)


SECRET_31, SECRET_32, OTHER_32 = "s" * 31, "s" * 32, "o" * 32


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"AUTHD_SECRET": SECRET_31}, "AUTHD_SECRET must have at least 32 bytes"),
        ({"AUTHD_SECRET_PREVIOUS": SECRET_31}, "AUTHD_SECRET_PREVIOUS must have at least 32 bytes"),
        ({"AUTHD_JWT_ALGORITHM": "HS256"}, "AUTHD_JWT_SECRET must have at least 32 bytes"),
        ({"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_JWT_SECRET": SECRET_31}, "AUTHD_JWT_SECRET must have"),
        (
            {"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_JWT_SECRET": SECRET_32, "AUTHD_SECRET": SECRET_32},
            "AUTHD_JWT_SECRET must differ from AUTHD_SECRET",
        ),
        (
            {"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_JWT_SECRET": SECRET_32, "AUTHD_SECRET_PREVIOUS": SECRET_32},
            "AUTHD_JWT_SECRET must differ from AUTHD_SECRET",
        ),
        ({"AUTHD_JWT_SECRET": SECRET_32}, "AUTHD_JWT_SECRET is only for AUTHD_JWT_ALGORITHM=HS256"),
        ({"AUTHD_OPERATIONS_BIND": "0.0.0.0:8000"}, "AUTHD_OPERATIONS_BIND must differ from AUTHD_BIND"),
        ({"AUTHD_OPERATIONS_BIND": "127.0.0.1:65536"}, "AUTHD_OPERATIONS_BIND has a port above 65535"),
        ({"AUTHD_HASH_DEADLINE_S": "15"}, "AUTHD_HASH_DEADLINE_S must be below AUTHD_REQUEST_TIMEOUT_S"),
        ({"AUTHD_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "AUTHD_KAFKA_USERNAME and AUTHD_KAFKA_PASSWORD are required"),
        (
            {"AUTHD_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT", "AUTHD_KAFKA_USERNAME": "authd"},
            "AUTHD_KAFKA_USERNAME and AUTHD_KAFKA_PASSWORD are required",
        ),
    ],
)
def test_contradictions_are_refused(required: dict[str, str], values: dict[str, str], sentence: str) -> None:
    found = complaints(required | values)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_the_modes_that_need_more_are_usable_with_it(required: dict[str, str]) -> None:
    shared = {"AUTHD_JWT_ALGORITHM": "HS256", "AUTHD_JWT_SECRET": OTHER_32}
    sasl = {
        "AUTHD_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "AUTHD_KAFKA_USERNAME": "authd",
        "AUTHD_KAFKA_PASSWORD": "pw",
    }
    assert complaints(required | shared | sasl) == []


def test_no_secret_is_ever_shown(required: dict[str, str]) -> None:
    values = required | {
        "AUTHD_JWT_ALGORITHM": "HS256",
        "AUTHD_JWT_SECRET": "jwt-secret-jwt-secret-jwt-secret-",
        "AUTHD_SECRET_PREVIOUS": "previous-secret-previous-secret-",
        "AUTHD_KAFKA_PASSWORD": "kafka-password",
    }
    settings = parse_settings(values)
    shown = f"{settings!r} {settings} {[getattr(settings, name) for name in SECRETS]}"
    for name in SECRETS:
        assert getattr(settings, name).reveal() == values[f"AUTHD_{name.upper()}"]
        assert values[f"AUTHD_{name.upper()}"] not in shown
    assert not re.search("store-password|kafka-pass|jwt-secret|previous-secret|master-secret", shown)


def test_every_setting_that_holds_a_secret_is_one_of_the_kind() -> None:
    kinds = {field.name for field in msgspec.structs.fields(Settings) if field.type is Secret}
    assert kinds == set(SECRETS)


def test_complaints_repeat_no_secret(required: dict[str, str]) -> None:
    short = "sh0rt"
    found = complaints(required | {"AUTHD_SECRET": short, "AUTHD_JWT_SECRET": short, "AUTHD_SECRET_PREVIOUS": short})
    assert found
    assert short not in " ".join(found)


def test_a_secret_compares_and_hides() -> None:
    assert Secret("a") == Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert len({Secret("a"), Secret("a")}) == 1
    assert (repr(Secret("a")), str(Secret("a")), repr(Secret(""))) == ("Secret(***)", "Secret(***)", "Secret()")
    assert (bool(Secret("a")), bool(Secret(""))) == (True, False)


def test_workers_share_threads_and_pools(make_settings) -> None:
    settings = make_settings(workers=4, hash_threads=8, database_pool_max=20, redis_pool_max=64)
    assert settings.hash_threads_per_worker == 2
    assert settings.database_pool_per_worker == 5
    assert settings.redis_pool_per_worker == 16
    assert settings.log_bytes_per_worker == 2**28
    crowded = make_settings(workers=64, hash_threads=1, database_pool_max=2, redis_pool_max=2)
    assert crowded.hash_threads_per_worker == 1
    assert crowded.database_pool_per_worker == crowded.redis_pool_per_worker == 2


class Part(msgspec.Struct, frozen=True):
    redis_timeout_s: float
    hash_threads_per_worker: int


def test_a_section_has_the_values_of_its_fields_and_of_no_other(required: dict[str, str]) -> None:
    settings = parse_settings(
        required | {"AUTHD_REDIS_TIMEOUT_S": "2", "AUTHD_HASH_THREADS": "6", "AUTHD_WORKERS": "3"}
    )
    assert settings.section(Part) == Part(redis_timeout_s=2.0, hash_threads_per_worker=2)


@pytest.mark.parametrize(("brokers", "entries"), [("", 0), ("127.0.0.1:9092", 500)])
def test_streams_take_events_only_where_kafka_is_configured(
    brokers: str, entries: int, required: dict[str, str]
) -> None:
    settings = parse_settings(required | {"AUTHD_STREAM_MAX": "500", "AUTHD_KAFKA_BOOTSTRAP_SERVERS": brokers})
    assert settings.event_stream_max == entries
