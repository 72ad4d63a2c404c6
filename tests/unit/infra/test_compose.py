"""The compose stack, as far as it can be looked at without an engine."""

import re
import shlex
from typing import Any

import msgspec
import pytest
import yaml
from support.paths import ROOT

from authd import __version__
from authd.config import Settings, parse_settings
from authd.events.publisher import FLUSH_S
from authd.runtime import LAST_RESORT_S

FOLDER = ROOT / "compose"
#: A tag that names one release: `18.4`, `3.13.9-slim-bookworm`; not `latest`, `18` or none.
PINNED = re.compile(r"[a-z/]+:\d+\.\d+(\.\d+)?(-[a-z-]+)?")


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def services(stack: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = stack["services"]
    return found


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (FOLDER / "Dockerfile").read_text("utf-8")


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def test_every_image_is_one_release(services: dict[str, Any], dockerfile: str) -> None:
    images = [service["image"] for service in services.values()]
    bases = re.findall(r"^FROM (\S+)", dockerfile, re.M)
    assert [image for image in images + bases if not PINNED.fullmatch(image)] == []
    assert services["authd"]["image"] == f"authd:{__version__}"
    assert len(set(bases)) == 1, "a virtual environment moves between equal images only"


def test_authd_is_given_settings_that_exist_and_are_enough(services: dict[str, Any]) -> None:
    environment = services["authd"]["environment"]
    names = {f"AUTHD_{field.name.upper()}" for field in msgspec.structs.fields(Settings)}
    assert environment.keys() <= names
    values = {name: re.sub(r"\$\{\w+:-(\w*)\}", r"\1", text) for name, text in environment.items()}
    settings = parse_settings(values | {"AUTHD_SECRET": "s" * 32})
    assert settings.database_url.reveal() == "postgresql://authd:authd@postgres:5432/authd"
    assert settings.kafka_bootstrap_servers == ("kafka:9092",)


def test_there_is_no_start_without_a_secret(services: dict[str, Any]) -> None:
    assert services["authd"]["environment"]["AUTHD_SECRET"].startswith("${AUTHD_SECRET:?")


def test_hosts_and_passwords_fit_the_services(services: dict[str, Any]) -> None:
    environment = services["authd"]["environment"]
    for name, host in (
        ("AUTHD_DATABASE_URL", "postgres:5432"),
        ("AUTHD_REDIS_URL", "redis:6379"),
        ("AUTHD_KAFKA_BOOTSTRAP_SERVERS", "kafka:9092"),
    ):
        assert host in environment[name]
        assert host.split(":")[0] in services
    assert services["postgres"]["environment"]["POSTGRES_PASSWORD"] in environment["AUTHD_DATABASE_URL"]
    assert services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"] == "PLAINTEXT://kafka:9092"


def test_only_authd_has_a_port_outside(services: dict[str, Any], dockerfile: str) -> None:
    assert {name: service["ports"] for name, service in services.items() if "ports" in service} == {
        "authd": ["8000:8000"]
    }
    assert services["authd"]["environment"]["AUTHD_BIND"] == "0.0.0.0:8000"
    assert "EXPOSE 8000" in dockerfile


def test_every_part_is_looked_at(services: dict[str, Any], dockerfile: str) -> None:
    for name in services.keys() - {"authd"}:
        check = services[name]["healthcheck"]
        assert check["test"][0] == "CMD", name
        assert seconds(check["timeout"]) <= seconds(check["interval"]), name
        assert check["retries"] >= 3, name
    [line] = re.findall(r"^HEALTHCHECK .*CMD (\[.*\])$", dockerfile, re.M)
    python, option, program = msgspec.json.decode(line)
    assert (python, option) == ("python", "-c")
    assert "/livez" in program
    compile(program, "HEALTHCHECK", "exec")


def test_authd_waits_for_what_it_cannot_do_without(services: dict[str, Any]) -> None:
    conditions = {name: wait["condition"] for name, wait in services["authd"]["depends_on"].items()}
    assert conditions == {"postgres": "service_healthy", "redis": "service_healthy", "kafka": "service_started"}


def test_nothing_that_must_last_is_lost_with_a_container(stack: dict[str, Any], services: dict[str, Any]) -> None:
    mounted = {volume for service in services.values() for volume in service["volumes"]}
    assert {volume.split(":")[0] for volume in mounted} == stack["volumes"].keys()
    assert {service["restart"] for service in services.values()} == {"unless-stopped"}
    command = shlex.join(services["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command


def test_the_image_runs_as_nobody_in_particular_and_owns_its_logs(services: dict[str, Any], dockerfile: str) -> None:
    assert re.findall(r"^USER (\S+)", dockerfile, re.M) == ["10001:10001"]
    [workdir] = re.findall(r"^WORKDIR (/srv)$", dockerfile, re.M)
    settings = parse_settings(
        {"AUTHD_DATABASE_URL": "postgresql://x", "AUTHD_REDIS_URL": "redis://x", "AUTHD_SECRET": "s" * 32}
    )
    folder = f"{workdir}/{settings.log_dir}"
    assert f"VOLUME {folder}" in dockerfile
    assert f"logs:{folder}" in services["authd"]["volumes"]
    assert dockerfile.index("chown") < dockerfile.index("VOLUME")


def test_it_is_given_the_time_that_a_shutdown_takes(services: dict[str, Any], make_settings) -> None:
    settings = make_settings()
    longest = settings.drain_s + FLUSH_S + settings.kafka_timeout_s + LAST_RESORT_S
    assert seconds(services["authd"]["stop_grace_period"]) > longest


def test_the_image_is_built_from_the_package_alone(dockerfile: str) -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = {part for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.M) for part in line.split()[:-1]}
    assert copied == allowed
    root = FOLDER.parent
    assert [name for name in allowed if not (root / name).exists()] == []
