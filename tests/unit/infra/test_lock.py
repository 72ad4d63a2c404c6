"""What the image installs is what pyproject.toml asks for: compared by names and ranges, without a network.

`scripts/lock` makes it so.
"""

import re
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DOCKERFILE = (ROOT / "compose" / "Dockerfile").read_text("utf-8")
#: The image's, for markers.
ENVIRONMENT = {
    "implementation_name": "cpython",
    "os_name": "posix",
    "platform_machine": "x86_64",
    "platform_python_implementation": "CPython",
    "platform_system": "Linux",
    "sys_platform": "linux",
}
LOCKS = {
    "requirements.txt": PROJECT["project"]["dependencies"],
    "build-requirements.txt": PROJECT["build-system"]["requires"],
}


def locked(name: str) -> dict[str, tuple[Version, list[str]]]:
    """The version and the hashes of each package of a lock file."""
    text = (ROOT / "compose" / name).read_text("utf-8")
    found = re.findall(r"^(\S+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.M)
    return {canonicalize_name(package): (Version(version), hashes.split("\n")) for package, version, hashes in found}


def image_python() -> str:
    [python] = set(re.findall(r"^FROM python:(\d+\.\d+)\.\d+", DOCKERFILE, re.M))
    return python


def needed(requirements: list[str]) -> list[Requirement]:
    """The requirements, and those of each package that they lead to, as far as this interpreter has it installed."""
    python = image_python()
    environment = ENVIRONMENT | {"python_version": python, "python_full_version": f"{python}.0"}
    waiting = [(requirement, "") for requirement in requirements]
    found: dict[tuple[str, str], Requirement] = {}
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate(environment | {"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if found.setdefault((str(requirement), wanted), requirement) is not requirement:
                continue
            with suppress(PackageNotFoundError):
                waiting += [(text, wanted) for text in requires(requirement.name) or []]
    return list(found.values())


@pytest.mark.parametrize("lock", LOCKS)
def test_each_requirement_is_locked_to_a_version_in_its_range(lock: str) -> None:
    versions = {name: version for name, (version, _) in locked(lock).items()}
    for requirement in map(Requirement, LOCKS[lock]):
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not locked: run scripts/lock"
        assert version in requirement.specifier, f"{requirement} is locked to {version}: run scripts/lock"


def test_what_is_locked_is_what_is_needed_and_nothing_else() -> None:
    names = {canonicalize_name(requirement.name) for requirement in needed(LOCKS["requirements.txt"])}
    assert locked("requirements.txt").keys() == names, "run scripts/lock"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_of_a_lock_is_understood_and_names_no_place(lock: str) -> None:
    text = (ROOT / "compose" / lock).read_text("utf-8")
    packages = re.findall(r"^[^\s#]+", text, re.M)
    assert {canonicalize_name(package.partition("==")[0]) for package in packages} == locked(lock).keys()
    assert all(hashes for _, hashes in locked(lock).values())
    assert "://" not in text
    assert "--index" not in text


def test_the_image_installs_nothing_without_a_hash_but_authd() -> None:
    installs = re.findall(r"pip (install|wheel) ([^&]*?)(?: \\)?$", DOCKERFILE, re.M)
    assert len(installs) == 4
    for _, arguments in installs:
        if " -r " in arguments:
            assert "--require-hashes --only-binary :all:" in arguments
        else:
            assert "--no-deps" in arguments
            assert re.search(r"(--no-build-isolation .* \.|wheels/authd-\*\.whl)$", arguments), arguments
