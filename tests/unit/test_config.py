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
    "hash_queue_max": (1, 1_000_000),
    "log_days": (1, 3650),
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
    "database_timeout_s",
    "redis_timeout_s",
    "kafka_timeout_s",
    "hash_deadline_s",
    "header_timeout_s",
    "keep_alive_s",
)
UNUSABLE_TEXTS = {
    "bind": ("8000", "127.0.0.1", ":8000", "127.0.0.1:http", "127.0.0.1:123456"),
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
    assert sentence.startswith("AUTHD_CORS_ORIGINS takes exact origins")


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
    crowded = make_settings(workers=64, hash_threads=1, database_pool_max=2, redis_pool_max=2)
    assert crowded.hash_threads_per_worker == 1
    assert crowded.database_pool_per_worker == crowded.redis_pool_per_worker == 2
